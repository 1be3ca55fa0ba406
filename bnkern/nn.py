"""Modules: torch.nn's batch norms with ``act`` and ``residual``, and the same state_dict both ways."""

import torch
from torch import Tensor

from .functional import add_act, batch_norm


class _Fused:
    """What the three batch norms add to their torch.nn parents: the fused call and the ``act`` argument.

    Parameters and buffers, their names, defaults and reset are the parent's, so a state_dict goes both ways and
    ``isinstance(module, torch.nn.BatchNorm2d)`` holds.
    """

    taps: tuple = ()  # of the recordings that watch this module (bnkern.probes)

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
        **kwargs: object,
    ) -> None:
        # Keywords that newer versions of torch add (bias=, in 2.13) pass through to the parent that knows them.
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, **kwargs)
        if act not in (None, "relu"):
            raise ValueError(f'act must be None or "relu", got {act!r}')
        self.act = act

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        self._check_input_dim(input)
        updating = self.training and self.track_running_stats
        use_running = updating or not self.training
        running_mean = self.running_mean if use_running else None
        running_var = self.running_var if use_running else None
        counter = self.num_batches_tracked if updating else None
        momentum = self.momentum
        if momentum is None and counter is None:
            momentum = 0.0  # nothing to count by: torch leaves the running statistics alone, and so does this
        return batch_norm(
            input,
            running_mean,
            running_var,
            self.weight,
            self.bias,
            self.training or running_mean is None,
            momentum,
            self.eps,
            residual=residual,
            act=self.act,
            num_batches_tracked=counter,
            records=self.taps[0].records(self, input) if self.taps else None,
        )

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", act={self.act!r}" if self.act else "")


class BatchNorm1d(_Fused, torch.nn.BatchNorm1d):
    """``torch.nn.BatchNorm1d`` ([N, C] or [N, C, L]) computing ``act(batch_norm(input) + residual)`` in one kernel.

    Arguments are those of torch.nn.BatchNorm1d and ``act``: None or "relu". See :func:`bnkern.batch_norm`.
    """


class BatchNorm2d(_Fused, torch.nn.BatchNorm2d):
    """``torch.nn.BatchNorm2d`` ([N, C, H, W]) computing ``act(batch_norm(input) + residual)`` in one kernel.

    Arguments are those of torch.nn.BatchNorm2d and ``act``: None or "relu". See :func:`bnkern.batch_norm`.
    """


class BatchNorm3d(_Fused, torch.nn.BatchNorm3d):
    """``torch.nn.BatchNorm3d`` ([N, C, D, H, W]) computing ``act(batch_norm(input) + residual)`` in one kernel.

    Arguments are those of torch.nn.BatchNorm3d and ``act``: None or "relu". See :func:`bnkern.batch_norm`.
    """


class Activation(torch.nn.Module):
    """``act(input + residual)``: the place of a batch norm in an un-normalised network, on the same kernels."""

    taps: tuple = ()

    def __init__(self, act: str | None = "relu") -> None:
        super().__init__()
        if act not in (None, "relu"):
            raise ValueError(f'act must be None or "relu", got {act!r}')
        self.act = act

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        records = self.taps[0].records(self, input) if self.taps else None
        return add_act(input, residual, self.act, records=records)

    def extra_repr(self) -> str:
        return f"act={self.act!r}"


class Conv2d(torch.nn.Conv2d):
    """``torch.nn.Conv2d`` whose weight gradient can be probed (``weight_gradient_signs`` of :mod:`bnkern.probes`)."""
