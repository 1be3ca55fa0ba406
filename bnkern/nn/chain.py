"""Chains of convolutions and batch norms: what the kernels of :mod:`bnkern.chain` serve, and the modules."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..backends.calls import ForwardCall
from ..chain import Link, chain, kernels_for
from ..norm.context import is_plain, is_plain_eager
from .convolution import Conv2d
from .norms import BatchNorm2d


class ChainLink(NamedTuple):
    """One step of :func:`run_chain`: ``norm(conv(value), residual)``. The modules may be of any class."""

    conv: Any
    norm: Any
    residual: Tensor | int | None = None  # a tensor, or the number of an earlier value; value 0 is the chain's input


def run_chain(x: Tensor, links: Sequence[ChainLink]) -> Tensor:
    """Applies ``norm(conv(value), residual)`` for each link to the value of the link before it, and returns the last.

    If bnkern's kernels for chains serve all links, the batch norms make no pass over memory of their own: a convolution
    normalises its input when it loads it, and computes the moments of its output when it stores it. They serve float32
    tensors in channels_last on the CPU in training, 3 x 3 convolutions (:class:`Conv2d` or torch's) of stride and
    padding 1 without bias whose channels are multiples of 16, and :class:`BatchNorm2d`. Autograd must be on, outside of
    compilers and transforms, and the modules must have no hooks. The probes of batch norms record in the same pass
    (``norm_gradient_noise`` for images of at most 16,384 values). Otherwise the modules are called one after the other,
    so everything that looks at a value between them gets it.

    For images of at most 16,384 values whose width is a multiple of 8, the results and gradients have the bits of the
    modules called one by one. With other sizes sums may be added in another order.

    On CUDA devices there are kernels for the forward, which **have not run on a GPU yet** and must be switched on by
    :func:`bnkern.use_cuda_chains`. They serve bfloat16 and float16 with 16, 32 or 64 channels that do not change within
    the chain, and images of at most 16,384 values, without probes. The convolutions' weights must have this dtype: a
    module in bfloat16, or parameters in float32 with the bfloat16 copies of :mod:`bnkern.train` under autocast, whose
    batch norms stay in float32.
    """
    y = fused_chain(x, links)
    if y is not None:
        return y
    values = [x]
    for conv, norm, residual in links:
        residual = values[residual] if isinstance(residual, int) else residual
        values.append(norm(conv(values[-1]), residual))
    return values[-1]


def fused_chain(x: Tensor, links: Sequence[ChainLink]) -> Tensor | None:
    """:func:`run_chain` by the kernels for chains, or None if they do not serve this call. Then nothing was done."""
    if not (
        is_plain_eager()
        and type(x) is Tensor
        and links
        and torch.is_grad_enabled()
        and all(is_chainable(link) for link in links)
        and _autocast_keeps(x)
        and x.dim() == 4
        and not x.is_neg()
        and x.shape[1] == links[0].conv.in_channels
    ):
        return None
    kernels = kernels_for(x)
    if kernels is None:
        return None
    channels: list[int] = [links[0].conv.in_channels, *(link.conv.out_channels for link in links)]
    recorded: set[str] = {field for link in links if link.norm.taps for field in link.norm.taps[0].requested(link.norm)}
    skips = any(link.norm._buffers.get("num_batches_skipped") is not None for link in links)
    if (recorded or skips) and not kernels.records_conv_norm:
        return None
    if "samples" in recorded and x.shape[2] * x.shape[3] * max(channels) > 16_384:
        return None
    if not kernels.prefers_conv_norm(x, channels) or not all(_fits(link, x, channels) for link in links):
        return None
    return chain(x, [_link_call(link) for link in links], kernels)


def is_chainable(link: ChainLink) -> bool:
    """Whether the modules of the link are of the kinds that :func:`run_chain` fuses, without hooks."""
    conv, norm = link.conv, link.norm
    return (
        type(conv) in (Conv2d, torch.nn.Conv2d)
        and type(norm) is BatchNorm2d
        and norm.training
        and not norm.statistics_frozen
        and (conv.kernel_size, conv.stride, conv.padding, conv.dilation) == ((3, 3), (1, 1), (1, 1), (1, 1))
        and conv.groups == 1
        and conv.bias is None
        and conv.padding_mode == "zeros"
        and norm.__dict__["num_features"] == conv.out_channels
        and not _has_hooks(conv)
        and not _has_hooks(norm)
        and not torch.nn.modules.module._has_any_global_hook()
        and _is_plain_parameter(conv.weight)
        and conv.weight.requires_grad
        and all(p is None or _is_plain_parameter(p) for p in (norm.weight, norm.bias, norm.running_mean))
    )


def _is_plain_parameter(p: Tensor) -> bool:
    return is_plain(p) and p.dtype in (torch.float32, torch.bfloat16, torch.float16)


def _autocast_keeps(x: Tensor) -> bool:
    """Whether autocast is off, or casts to the dtype of x. Operands of this dtype are not cast then."""
    device = x.device.type
    return not torch.is_autocast_enabled(device) or torch.get_autocast_dtype(device) is x.dtype


def _has_hooks(module: torch.nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _fits(link: ChainLink, x: Tensor, channels: list[int]) -> bool:
    """Whether the kernels can read the link's parameters and residual, and the residual has the size of the output."""
    conv, norm, residual = link
    if conv.weight.dtype is not x.dtype or conv.weight.device != x.device:
        return False
    vectors = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    if any(v is not None and (v.dtype not in (x.dtype, torch.float32) or v.device != x.device) for v in vectors):
        return False
    if isinstance(residual, int):
        return channels[residual] == conv.out_channels
    if residual is None:
        return True
    return (
        is_plain(residual)
        and residual.dtype is x.dtype
        and residual.device == x.device
        and residual.shape == (x.shape[0], conv.out_channels, *x.shape[2:])
        and residual.is_contiguous(memory_format=torch.channels_last)
    )


def _link_call(link: ChainLink) -> Link:
    conv, norm, residual = link
    running_mean, running_var, counter, skipped, momentum = norm._running(training=True)
    call = ForwardCall(
        None,  # type: ignore[arg-type]  # the kernels make x
        norm.weight,
        norm.bias,
        None,
        running_mean,
        running_var,
        counter,
        True,
        momentum,
        norm.__dict__["eps"],
        norm.act,
        num_batches_skipped=skipped,
    )
    records = norm.taps[0].records(norm, (conv.out_channels,), conv.weight.device) if norm.taps else None
    return Link(conv.weight, call, residual, records)


class ConvBNAct(torch.nn.Module):
    """``act(batch_norm(conv(input)) + residual)``: a convolution without bias and a batch norm, as one module.

    The children are ``conv`` (:class:`Conv2d`) and ``norm`` (:class:`BatchNorm2d`). Where the kernels of
    :func:`run_chain` serve the call, the convolution's kernel computes the moments of the batch norm, and the gradient
    of its input. In a :class:`Chain` the following convolution also normalises.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode: as torch.nn.Conv2d.
            The default padding keeps the size of an image with stride 1 and an odd kernel.
        act: None or "relu".
        eps, momentum: of the batch norm.

    forward: [N, in_channels, H, W], and optionally a residual of the output's shape -> [N, out_channels, H', W'].
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        padding: int | None = None,
        dilation: int = 1,
        groups: int = 1,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        *,
        act: str | None = "relu",
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        padding = dilation * (kernel_size - 1) // 2 if padding is None else padding
        sizes = (kernel_size, stride, padding, dilation, groups)
        self.conv = Conv2d(in_channels, out_channels, *sizes, False, padding_mode, device, dtype)
        self.norm = BatchNorm2d(out_channels, eps, momentum, device=device, dtype=dtype, act=act)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        return run_chain(input, [ChainLink(self.conv, self.norm, residual)])

    def chain_links(self) -> list[ChainLink]:
        return [ChainLink(self.conv, self.norm)]


class Chain(torch.nn.Sequential):
    """``torch.nn.Sequential`` that joins the convolutions and batch norms of its modules to chains (:func:`run_chain`).

    It joins :class:`ConvBNAct` modules, and modules with one of these methods. All other modules, and those with hooks,
    are called.

        chain_links() -> list of ChainLink, or None
            The forward of the module is ``run_chain(input, links)``. The number 0 as a residual means the input.
        start_chain(input) -> (value, list of ChainLink)
            The forward of the module is ``run_chain(value, links)``. It is called if chain_links() is absent or None.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not is_plain_eager():
            return super().forward(input)
        value: Tensor = input
        links: list[ChainLink] = []
        for module in self:
            part = None
            if not _has_hooks(module):
                part = module.chain_links() if hasattr(module, "chain_links") else None  # type: ignore[operator]
                if part is None and hasattr(module, "start_chain"):
                    value, part = module.start_chain(run_chain(value, links))  # type: ignore[operator]
                    links = []
            if part is None:
                value, links = module(run_chain(value, links)), []
            elif all(is_chainable(link) for link in part):
                first = len(links)
                links += [
                    link._replace(residual=link.residual + first) if isinstance(link.residual, int) else link
                    for link in part
                ]
            else:
                value, links = run_chain(run_chain(value, links), part), []
        return run_chain(value, links)
