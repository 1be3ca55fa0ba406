"""The modules of torch.nn's batch norms with ``act`` and ``residual``. A state_dict fits both torch's and these."""

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, fx
from torch.nn.utils import parametrize

from .backends import activations
from .backends.calls import ForwardCall
from .chain import Link, chain, kernels_for
from .conv import conv2d, plan
from .guard import Hyperparameter
from .norm import add_act, batch_norm, ranks_of, sync_batch_norm
from .norm.context import is_plain, is_plain_eager, is_recomputed


def _tensor(module: torch.nn.Module, stored: Mapping[str, Tensor | None], name: str) -> Tensor | None:
    """Returns ``module.name``. If it is stored as usual, this saves the half microsecond of Module.__getattr__."""
    if name in stored:
        return stored[name]
    return getattr(module, name)  # the module is parametrized, pruned or a replica


def fx_leaf(module: torch.nn.Module, input: object, *others: object, **keywords: object) -> fx.Proxy | None:
    """Returns the call of ``module`` as one node if torch.fx is tracing, as it does for modules of torch.nn, else None.

    The result is also None if the module is the root of the trace, because the trace then goes into its forward.
    """
    if not isinstance(input, fx.Proxy) or not isinstance(input.tracer, fx.Tracer) or module is input.tracer.root:
        return None
    args = (input, *(other for other in others if other is not None))
    keywords = {name: value for name, value in keywords.items() if value is not None}
    return input.tracer.create_proxy("call_module", input.tracer.path_of_module(module), args, keywords)


if TYPE_CHECKING:
    _Parent = torch.nn.modules.batchnorm._BatchNorm  # each subclass of _Fused names one of its classes as second base
else:
    _Parent = object


class _Fused(_Parent):
    """The part that the batch norms add to their torch.nn parents: the fused call and the ``act`` argument.

    Parameters, buffers, their names, defaults and reset are those of the parent. A state_dict therefore fits both, and
    ``isinstance(module, torch.nn.BatchNorm2d)`` is true. Functions that rebuild any such instance from its attributes
    would drop ``act``. :mod:`bnkern.guard` raises an error or warns there.
    """

    taps: tuple = ()  # one for each recording of this module (bnkern.probes)
    statistics_frozen = False  # see freeze_statistics
    # Reads return an int and a float as in torch. Annotations are left out, because torch.jit.script would use them.
    num_features, eps = Hyperparameter(), Hyperparameter()  # type: ignore[assignment]

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        act: str | None = None,
        skip_nonfinite: bool = False,
        **kwargs: Any,
    ) -> None:
        # Keywords that only newer versions of torch have (bias=, in 2.13) are passed to the parent.
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, **kwargs)
        activations.check(type(self).__name__, act)
        self.act = act
        if skip_nonfinite:
            _count_skips(self, type(self).__name__)

    def forward(self, input: Tensor, residual: Tensor | None = None, sample_weight: Tensor | None = None) -> Tensor:
        if type(input) is not Tensor and isinstance(input, fx.Proxy):
            node = fx_leaf(self, input, residual, sample_weight=sample_weight)
            if node is not None:
                return node
        else:
            self._check_input_dim(input)
        training, parameters = self.training and not self.statistics_frozen, self._parameters
        running_mean, running_var, counter, skipped, momentum = self._running(training)
        return batch_norm(
            input,
            running_mean,
            running_var,
            _tensor(self, parameters, "weight"),
            _tensor(self, parameters, "bias"),
            training or running_mean is None,
            momentum,
            self.__dict__["eps"],
            residual=residual,
            act=self.act,
            num_batches_tracked=counter,
            num_batches_skipped=skipped,
            sample_weight=sample_weight,
            records=self.taps[0].records(self, input.shape[1:2], input.device) if self.taps else None,
        )

    def _running(
        self, training: bool
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, float | None]:
        """The running statistics, counters and momentum of a call."""
        running_mean = running_var = counter = skipped = None
        buffers, momentum = self._buffers, self.momentum
        # A recomputation in a backward pass normalises by the batch again and updates nothing.
        if not training or (self.track_running_stats and not is_recomputed()):
            running_mean, running_var = _tensor(self, buffers, "running_mean"), _tensor(self, buffers, "running_var")
            if training:
                counter, skipped = self.num_batches_tracked, buffers.get("num_batches_skipped")
        if momentum is None and counter is None:
            momentum = 0.0  # without a counter torch does not update the running statistics, and neither does this
        return running_mean, running_var, counter, skipped, momentum

    def extra_repr(self) -> str:
        skips = ", skip_nonfinite=True" if "num_batches_skipped" in self._buffers else ""
        return super().extra_repr() + (f", act={self.act!r}" if self.act else "") + skips


class BatchNorm1d(_Fused, torch.nn.BatchNorm1d):
    """``torch.nn.BatchNorm1d`` ([N, C] or [N, C, L]) computing ``act(batch_norm(input) + residual)`` as one call.

    Arguments are those of torch.nn.BatchNorm1d and ``act``: None or "relu". See :func:`bnkern.batch_norm`.
    """


class BatchNorm2d(_Fused, torch.nn.BatchNorm2d):
    """``torch.nn.BatchNorm2d`` ([N, C, H, W]) computing ``act(batch_norm(input) + residual)`` as one call.

    Arguments are those of torch.nn.BatchNorm2d and ``act``: None or "relu". See :func:`bnkern.batch_norm`.
    """


class BatchNorm3d(_Fused, torch.nn.BatchNorm3d):
    """``torch.nn.BatchNorm3d`` ([N, C, D, H, W]) computing ``act(batch_norm(input) + residual)`` as one call.

    Arguments are those of torch.nn.BatchNorm3d and ``act``: None or "relu". See :func:`bnkern.batch_norm`.
    """


class Activation(torch.nn.Module):
    """``act(input + residual)``, computed by the same kernels. It replaces a batch norm in an un-normalised network."""

    taps: tuple = ()

    def __init__(self, act: str | None = "relu") -> None:
        super().__init__()
        activations.check(type(self).__name__, act)
        self.act = act

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        node = fx_leaf(self, input, residual)
        if node is not None:
            return node  # type: ignore[return-value]  # a Proxy stands for the result
        records = self.taps[0].records(self, input.shape[1:2], input.device) if self.taps else None
        return add_act(input, residual, self.act, records=records)

    def extra_repr(self) -> str:
        return f"act={self.act!r}"


class Conv2d(torch.nn.Conv2d):
    """``torch.nn.Conv2d`` with bnkern's CPU kernels where these were measured to be faster than torch's.

    All of them are for float32 in channels_last. Which convolutions they serve is decided for the output, the input
    gradient and the weight gradient apart, by the ``prefers`` functions of bnkern/backends/cpu/convolution.py:

        3 x 3, stride and padding 1, no bias, multiples of 16 channels   Winograd's F(2 x 2, 3 x 3)
        stride 2, 1 x 1 kernels, few input channels                      the definition, for up to some hundred products
        the weight gradient of all these                                 the kernel that also computes the probe's sums

    With the probe ``weight_gradient_signs`` the weight gradient has the same bits as without it. Where Winograd's form
    is used, results may be NaN where the definition gives an infinity, and a value that is not finite may spread to all
    nine weight gradients of its channel. The choice depends on the CPU's instruction set. In all other cases torch's
    convolution is used, and the probe is computed in addition. Arguments and state_dict are those of torch.
    """

    def forward(self, input: Tensor) -> Tensor:
        node = fx_leaf(self, input)
        if node is not None:
            return node  # type: ignore[return-value]
        if (
            type(input) is Tensor
            and torch.is_grad_enabled()
            and self.weight.requires_grad
            and not isinstance(self.padding, str)
            and self.padding_mode == "zeros"
            and is_plain_eager()
            and not torch.is_autocast_enabled(input.device.type)
            and input.dim() == 4
        ):
            options = (self.stride, self.padding)
            kernels = plan(input, self.weight, self.bias, *options, self.dilation, self.groups)  # type: ignore[arg-type]
            if kernels is not None:
                return conv2d(input, self.weight, self.bias, *options, kernels)  # type: ignore[arg-type]
        return super().forward(input)


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
        and not torch.is_autocast_enabled(x.device.type)
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
    return is_plain(p) and p.dtype is torch.float32 and p.device.type == "cpu"


def _has_hooks(module: torch.nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _fits(link: ChainLink, x: Tensor, channels: list[int]) -> bool:
    """Whether the kernels can read the link's residual, and it has the size of the output."""
    residual = link.residual
    if isinstance(residual, int):
        return channels[residual] == link.conv.out_channels
    if residual is None:
        return True
    return (
        is_plain(residual)
        and residual.dtype is x.dtype
        and residual.shape == (x.shape[0], link.conv.out_channels, *x.shape[2:])
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


class SyncBatchNorm(_Fused, torch.nn.modules.batchnorm._BatchNorm):
    """``torch.nn.SyncBatchNorm`` ([N, C, ...]) computing ``act(batch_norm(input) + residual)`` over all ranks' batches.

    Arguments are those of torch.nn.SyncBatchNorm and ``act``: None or "relu". In training, in a process group of two or
    more ranks, the statistics are those of the joint batch (:func:`bnkern.norm.sync_batch_norm`). Every rank must make
    the call, even if its batch is empty. In eval mode, with one rank and without a process group this is a plain batch
    norm. It works on the CPU (gloo) as on CUDA (nccl). It is not an instance of torch's class, because
    DistributedDataParallel refuses such instances on the CPU.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: "torch.distributed.ProcessGroup | None" = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        act: str | None = None,
        skip_nonfinite: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            num_features,
            eps,
            momentum,
            affine,
            track_running_stats,
            device,
            dtype,
            act=act,
            skip_nonfinite=skip_nonfinite,
            **kwargs,
        )
        self.process_group = process_group

    _check_input_dim = torch.nn.SyncBatchNorm._check_input_dim
    _check_non_zero_input_channels = torch.nn.SyncBatchNorm._check_non_zero_input_channels

    def forward(self, input: Tensor, residual: Tensor | None = None, sample_weight: Tensor | None = None) -> Tensor:
        group = ranks_of(self.process_group) if self.training and not self.statistics_frozen else None
        if group is None or isinstance(input, fx.Proxy):
            return super().forward(input, residual, sample_weight)
        if sample_weight is not None:
            raise RuntimeError("SyncBatchNorm: sample_weight is not supported with statistics across ranks")
        # These methods are of another class. They read only attributes that this class has too.
        self._check_input_dim(input)  # type: ignore[misc]
        self._check_non_zero_input_channels(input)  # type: ignore[misc]
        tracked = self.track_running_stats and not is_recomputed()
        counter = self.num_batches_tracked if tracked else None
        momentum = 0.0 if self.momentum is None and counter is None else self.momentum
        return sync_batch_norm(
            input,
            self.running_mean if tracked else None,
            self.running_var if tracked else None,
            self.weight,
            self.bias,
            momentum,
            self.__dict__["eps"],
            group=group,
            residual=residual,
            act=self.act,
            num_batches_tracked=counter,
            num_batches_skipped=self._buffers.get("num_batches_skipped") if tracked else None,
            records=self.taps[0].records(self, input.shape[1:2], input.device) if self.taps else None,
        )


def freeze_statistics(model: torch.nn.Module, frozen: bool = True) -> None:
    """Makes bnkern's batch norms in ``model`` normalise by their running statistics also in training mode.

    The running statistics and their counters stay as they are. Weight and bias are trained as before, and gradients are
    those of eval mode. ``model.train()`` and ``model.eval()`` do not change this; ``freeze_statistics(model, False)``
    undoes it. A copy of a frozen module is frozen, and the state_dict does not have this setting.

    Raises:
        ValueError: A batch norm is not bnkern's, or it has no running statistics. The message names it. Nothing has
            been changed.
    """
    for _, module in _tracking_norms(model, "freeze_statistics"):
        module.statistics_frozen = frozen


def skip_nonfinite(model: torch.nn.Module, skip: bool = True) -> None:
    """Makes bnkern's batch norms in ``model`` ignore batches with infinite or NaN statistics.

    In training such a batch changes neither the running statistics of a norm nor its ``num_batches_tracked``. It
    increments the norm's ``num_batches_skipped``, an int64 buffer that begins at 0 and is not part of the state_dict.
    The output of the batch is what it is without this setting. The decision is made on the device for each norm, from
    the statistics of all its channels (in a :class:`SyncBatchNorm` those of the joint batch), so the host does not
    wait. ``skip_nonfinite(model, False)`` undoes it. The argument ``skip_nonfinite=True`` of the modules does the same.

    Raises:
        ValueError: A batch norm is not bnkern's, or it has no running statistics. The message names it. Nothing has
            been changed.
    """
    for name, module in _tracking_norms(model, "skip_nonfinite"):
        if skip:
            _count_skips(module, name)
        else:
            module._buffers.pop("num_batches_skipped", None)
            module._non_persistent_buffers_set.discard("num_batches_skipped")


def _tracking_norms(model: torch.nn.Module, function: str) -> "list[tuple[str, _Fused]]":
    """All batch norms of the model, which must be bnkern's and have running statistics."""
    norms: list[tuple[str, _Fused]] = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.modules.batchnorm._NormBase) and not _is_instance_norm(module):
            if not isinstance(module, _Fused):
                kind = f"{type(module).__module__}.{type(module).__name__}"
                raise ValueError(f"{function}: {name or 'the model'} is a {kind}; call bnkern.convert first")
            if module.running_mean is None:
                raise ValueError(f"{function}: {name or 'the model'} has no running statistics")
            norms.append((name or "the model", module))
    return norms


def _count_skips(module: "_Fused", name: str) -> None:
    """Adds the counter ``num_batches_skipped``, unless the module has one."""
    if module.running_mean is None:
        raise ValueError(f"skip_nonfinite: {name} has no running statistics")
    if "num_batches_skipped" not in module._buffers:
        counter = torch.zeros((), dtype=torch.int64, device=module.running_mean.device)
        module.register_buffer("num_batches_skipped", counter, persistent=False)


def _is_instance_norm(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.modules.instancenorm._InstanceNorm)


def convert_sync_batchnorm(
    model: torch.nn.Module, process_group: "torch.distributed.ProcessGroup | None" = None
) -> torch.nn.Module:
    """Replaces every batch norm of the model, torch's or bnkern's, by a :class:`SyncBatchNorm` of the group.

    As ``torch.nn.SyncBatchNorm.convert_sync_batchnorm`` it changes the model in place. If the model is itself a batch
    norm, a new module is returned. The new modules have the parameters and buffers of the old ones (the same tensors),
    their mode, hooks and ``act``. A module that the model holds in two places remains one module. A subclass with a
    forward of its own would lose that forward. It is not replaced, and a warning says so.

    Raises:
        ValueError: A batch norm is lazy, parametrized or sharded by ``fully_shard``. The message names it.
    """
    results: dict[torch.nn.Module, torch.nn.Module] = {}

    def converted(module: torch.nn.Module, name: str) -> torch.nn.Module:
        if module not in results:
            results[module] = _synchronized(module, name or "the model", process_group)
            for key, child in module._modules.items():
                if child is not None:
                    results[module]._modules[key] = converted(child, f"{name}.{key}" if name else key)
        return results[module]

    return converted(model, "")


_FORWARDS = (
    torch.nn.modules.batchnorm._BatchNorm.forward,
    torch.nn.SyncBatchNorm.forward,
    _Fused.forward,
    SyncBatchNorm.forward,
)


def _synchronized(
    module: torch.nn.Module, name: str, process_group: "torch.distributed.ProcessGroup | None"
) -> torch.nn.Module:
    """Returns the module itself, or for a batch norm a SyncBatchNorm with its parameters, buffers and hooks."""
    if not isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
        return module
    kind = type(module).__name__
    if isinstance(module, torch.nn.modules.lazy.LazyModuleMixin):
        raise ValueError(f"convert_sync_batchnorm: {name} ({kind}) must be initialised by a first call")
    if parametrize.is_parametrized(module):
        raise ValueError(f"convert_sync_batchnorm: {name} must not be parametrized; remove its parametrizations first")
    if hasattr(module, "unshard"):  # of fully_shard's classes; the new module would not gather parameters
        raise ValueError(f"convert_sync_batchnorm: {name} ({kind}) must not be sharded; call fully_shard afterwards")
    if type(module).forward not in _FORWARDS:
        warnings.warn(f"convert_sync_batchnorm: {name} ({kind}) has a forward of its own and is kept", stacklevel=4)
        return module
    new = SyncBatchNorm.__new__(SyncBatchNorm)
    new.__dict__ = module.__dict__.copy()
    for attribute in ("_parameters", "_buffers", "_modules"):
        new.__dict__[attribute] = module.__dict__[attribute].copy()
    new.act, new.process_group = getattr(module, "act", None), process_group
    return new
