"""The batch norms, and the activation that replaces one in a network without normalisation."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from ..backends import activations
from ..guard import Hyperparameter
from ..norm import add_act, batch_norm, ranks_of, sync_batch_norm
from ..norm.context import is_recomputed
from .leaf import fx_leaf


def _tensor(module: torch.nn.Module, stored: Mapping[str, Tensor | None], name: str) -> Tensor | None:
    """Returns ``module.name``. If it is stored as usual, this saves the half microsecond of Module.__getattr__."""
    if name in stored:
        return stored[name]
    return getattr(module, name)  # the module is parametrized, pruned or a replica


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
            count_skips(self, type(self).__name__)

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


def count_skips(module: "_Fused", name: str) -> None:
    """Adds the counter ``num_batches_skipped``, unless the module has one."""
    if module.running_mean is None:
        raise ValueError(f"skip_nonfinite: {name} has no running statistics")
    if "num_batches_skipped" not in module._buffers:
        counter = torch.zeros((), dtype=torch.int64, device=module.running_mean.device)
        module.register_buffer("num_batches_skipped", counter, persistent=False)
