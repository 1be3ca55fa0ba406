"""Chains of convolutions and batch norms: what the kernels of :mod:`bnkern.chain` serve, and the modules."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..backends.calls import ForwardCall
from ..backends.protocol import ChainBackend
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

    Where bnkern's kernels for chains serve a link, or several in sequence, the batch norms make no pass over memory of
    their own: a convolution normalises its input when it loads it, and computes the moments of its output when it
    stores it. The kernels serve float32 tensors in channels_last on the CPU, in training, in eval mode and without
    gradients: 3 x 3 convolutions (:class:`Conv2d` or torch's) of stride and padding 1 whose channels are multiples of
    16, and :class:`BatchNorm2d`. The call must be outside of compilers and transforms, and the modules must have no
    hooks. The probes of batch norms in training record in the same pass, except after a convolution with a bias
    (``norm_gradient_noise`` for images of at most 16,384 values). The modules of all other links are called, so
    everything that looks at a value between them gets it.

    On the CPU, for images of at most 16,384 values whose width is a multiple of 8, the results and gradients of
    convolutions without bias have the bits of the modules called one by one. With other sizes sums may be added in
    another order. The bias of a convolution has no effect on a batch norm in training but on its running mean, so its
    gradient is 0.

    On CUDA devices there are kernels for the forward, which **have not run on a GPU yet** and must be switched on by
    :func:`bnkern.use_cuda_chains`. They serve bfloat16 and float16 in training, with 16, 32 or 64 channels that do not
    change from one value to the next, convolutions without bias, and images of at most 16,384 values, without probes.
    The convolutions' weights must have this dtype: a module in bfloat16, or parameters in float32 with the bfloat16
    copies of :mod:`bnkern.train` under autocast, whose batch norms stay in float32.
    """

    def call(k: int, value: Tensor, residual: Tensor | None) -> Tensor:
        return links[k].norm(links[k].conv(value), residual)

    return run_links(x, links, call)


def run_links(x: Tensor, links: Sequence[ChainLink], call: Callable[[int, Tensor, Tensor | None], Tensor]) -> Tensor:
    """:func:`run_chain`, where ``call(k, value, residual)`` calls the modules of link k."""
    values: list[Any] = [x]  # those within a chain remain None
    while len(values) <= len(links):
        first = len(values) - 1
        kernels = _kernels_for(values[first])
        count = 0 if kernels is None else _count_served(values, links[first:], kernels)
        if kernels is None or count == 0:
            values.append(call(first, values[first], _residual(links[first], values)))
            continue
        count = _without_used_values(links[first:], first, count)
        calls = [_link_call(link, first, values) for link in links[first : first + count]]
        values += [None] * (count - 1)
        values.append(chain(values[first], calls, kernels))
    return values[-1]


def _without_used_values(links: Sequence[ChainLink], first: int, count: int) -> int:
    """The number of links, at most ``count``, after which no link needs a value from within their chain."""
    while True:
        used = (link.residual - first for link in links[count:] if isinstance(link.residual, int))
        shorter = min((k for k in used if 0 < k < count), default=count)
        if shorter == count:
            return count
        count = shorter


def _residual(link: ChainLink, values: Sequence[Tensor]) -> Tensor | None:
    return values[link.residual] if isinstance(link.residual, int) else link.residual


def _kernels_for(x: Tensor) -> ChainBackend | None:
    """The backend with kernels for chains of this input, or None if there is none in the present context."""
    plain = is_plain_eager() and type(x) is Tensor and x.dim() == 4 and not x.is_neg()
    return kernels_for(x) if plain and _autocast_keeps(x) else None


def _count_served(values: Sequence[Tensor], links: Sequence[ChainLink], kernels: ChainBackend) -> int:
    """The number of links from the first one on that the kernels serve as one chain of the last value."""
    x, first = values[-1], len(values) - 1
    channels = [x.shape[1]]
    pixels, most, samples = x.shape[2] * x.shape[3], 0, False
    for count, link in enumerate(links):
        if not is_chainable(link) or link.conv.in_channels != channels[-1]:
            return count
        channels.append(link.conv.out_channels)
        most = max(most, *channels[-2:])
        samples = samples or (bool(link.norm.taps) and "samples" in link.norm.taps[0].requested(link.norm))
        if not kernels.conv_norm_options and _needs_options(link):
            return count
        if link.norm.taps and (not _uses_batch(link.norm) or link.conv.bias is not None):
            return count
        if samples and pixels * most > 16_384:
            return count
        if isinstance(link.residual, int) and link.residual >= first:
            fits = channels[link.residual - first] == channels[-1]
        else:
            fits = _fits(_residual(link, values), (x.shape[0], channels[-1], *x.shape[2:]), x)
        if not fits or not _parameters_fit(link, x) or not kernels.prefers_conv_norm(x, channels[-2:]):
            return count
    return len(links)


def _needs_options(link: ChainLink) -> bool:
    """Whether the link needs what :attr:`ChainBackend.conv_norm_options` says."""
    skips = link.norm._buffers.get("num_batches_skipped") is not None
    return bool(link.norm.taps) or skips or link.conv.bias is not None or not _uses_batch(link.norm)


def _fits(residual: Tensor | None, shape: tuple[int, ...], x: Tensor) -> bool:
    """Whether the kernels can read a residual."""
    return residual is None or (
        is_plain(residual)
        and residual.dtype is x.dtype
        and residual.device == x.device
        and residual.shape == shape
        and residual.is_contiguous(memory_format=torch.channels_last)
    )


def _parameters_fit(link: ChainLink, x: Tensor) -> bool:
    """Whether the kernels can read the link's parameters."""
    conv, norm = link.conv, link.norm
    vectors = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    return all(p is None or (p.dtype is x.dtype and p.device == x.device) for p in (conv.weight, conv.bias)) and all(
        v is None or (v.dtype in (x.dtype, torch.float32) and v.device == x.device) for v in vectors
    )


def is_chainable(link: ChainLink) -> bool:
    """Whether the modules of the link are of the kinds that :func:`run_chain` fuses, without hooks."""
    conv, norm = link.conv, link.norm
    return (
        type(conv) in (Conv2d, torch.nn.Conv2d)
        and type(norm) is BatchNorm2d
        and (conv.kernel_size, conv.stride, conv.padding, conv.dilation) == ((3, 3), (1, 1), (1, 1), (1, 1))
        and conv.groups == 1
        and conv.padding_mode == "zeros"
        and norm.__dict__["num_features"] == conv.out_channels
        and (norm.__dict__["eps"] > 0 or not _uses_batch(norm))  # with others the module raises an error
        and not _has_hooks(conv)
        and not _has_hooks(norm)
        and not torch.nn.modules.module._has_any_global_hook()
        and _is_plain_parameter(conv.weight)
        and all(
            p is None or _is_plain_parameter(p)
            for p in (conv.bias, norm.weight, norm.bias, norm.running_mean, norm.running_var)
        )
    )


def _uses_batch(norm: BatchNorm2d) -> bool:
    """Whether the norm uses the statistics of the batch."""
    return (norm.training and not norm.statistics_frozen) or norm.running_mean is None


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


def _link_call(link: ChainLink, first: int, values: Sequence[Tensor]) -> Link:
    """The link of a chain whose input is value ``first``."""
    conv, norm, residual = link
    if isinstance(residual, int):
        residual = residual - first if residual >= first else values[residual]
    training = norm.training and not norm.statistics_frozen
    running_mean, running_var, counter, skipped, momentum = norm._running(training)
    call = ForwardCall(
        None,  # type: ignore[arg-type]  # the kernels make x
        norm.weight,
        norm.bias,
        None,
        running_mean,
        running_var,
        counter,
        _uses_batch(norm),
        momentum,
        norm.__dict__["eps"],
        norm.act,
        num_batches_skipped=skipped,
    )
    records = norm.taps[0].records(norm, (conv.out_channels,), conv.weight.device) if norm.taps else None
    return Link(conv.weight, conv.bias, call, residual, records)


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
                continue
            first = len(links)
            links += [
                link._replace(residual=link.residual + first) if isinstance(link.residual, int) else link
                for link in part
            ]
        return run_chain(value, links)
