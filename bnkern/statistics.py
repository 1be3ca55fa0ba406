"""The statistics of batch norm over a whole data set, for weights that were averaged or loaded (SWA, EMA)."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .backends import reference
from .norm import channel_moments, ranks_of
from .norm.ranks import gather_moments


class _Total:
    """The moments of all values of one layer's channels so far: count, mean [C] and M2 [C], in float64."""

    def __init__(self, layer: _BatchNorm) -> None:
        assert layer.running_mean is not None
        self.calls = self.count = 0
        self.mean = torch.zeros_like(layer.running_mean, dtype=torch.float64)
        self.m2 = torch.zeros_like(self.mean)

    def add(self, x: Tensor) -> None:
        """Merges the moments of x [N, C, ...] by Chan's formula."""
        self.calls += 1
        if not x.numel():
            return
        count, mean, var = channel_moments(x)
        joint, delta = self.count + count, mean.double() - self.mean
        self.mean += delta * (count / joint)
        self.m2 += var.double() * count + delta.square() * (self.count * count / joint)
        self.count = joint


@torch.no_grad()
def recompute_statistics(
    model: nn.Module,
    batches: Iterable[Any],
    device: torch.device | str | None = None,
    process_group: "torch.distributed.ProcessGroup | None" = None,
) -> None:
    """Sets the running statistics of every batch norm in ``model`` to those of all values that ``batches`` give it.

        running_mean = sum x / M,  running_var = sum (x - mean)^2 / (M - 1)

    The sums are over all M values of a channel, in all batches and in all processes of the group, merged by Chan's
    formula in float64. ``torch.optim.swa_utils.update_bn`` averages the means and the variances of the batches instead.
    That leaves out the variance between the means, and a smaller last batch weighs as much as the others.

    During the call every batch norm normalises by the statistics of its batch, as in training, because its inputs
    depend on the layers before it. All other modules are in eval mode. Nothing is updated but the running statistics,
    and ``num_batches_tracked``, which becomes the number of batches of this process. Modes are as before afterwards.
    Batch norms that no batch reaches, that have no running statistics, or that :func:`bnkern.nn.freeze_statistics` has
    frozen stay as they are. The inputs of each batch norm are read once more than by a forward.

    Args:
        model: torch's and bnkern's batch norms may be mixed.
        batches: inputs of the model, or tuples and lists whose first item is the input, as a DataLoader returns them.
        device: where to move the inputs to, if they are not on the model's device.
        process_group: the processes whose batches are joined; by default all, if torch.distributed is initialised.
            Every process must make the call. A process may have no batches, unless there is a SyncBatchNorm, which
            requires equally many in each process.

    Raises:
        ValueError: there are no batches, and no process group whose other processes may have some.

    Source: Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979.
    """
    totals = {
        module: _Total(module)
        for module in model.modules()
        if isinstance(module, _BatchNorm)
        and module.track_running_stats
        and module.running_mean is not None
        and not getattr(module, "statistics_frozen", False)
    }
    modes = {module: module.training for module in model.modules()}
    hooks = [layer.register_forward_pre_hook(_hook(total), with_kwargs=True) for layer, total in totals.items()]
    try:
        model.eval()
        for layer in totals:
            layer.training, layer.track_running_stats = True, False  # normalises by the batch and updates nothing
        number = 0
        for batch in batches:
            number += 1
            x = batch[0] if isinstance(batch, tuple | list) else batch
            model(x if device is None else x.to(device))
    finally:
        for hook in hooks:
            hook.remove()
        for layer in totals:
            layer.track_running_stats = True
        for module, training in modes.items():
            module.training = training
    group = ranks_of(process_group)
    if not number and not group:
        raise ValueError("recompute_statistics: there are no batches")
    for layer, total in totals.items():
        _store(layer, total, group)


def _hook(total: _Total):
    def add(_: nn.Module, args: tuple, kwargs: dict) -> None:
        total.add(args[0] if args else kwargs["input"])

    return add


def _store(layer: _BatchNorm, total: _Total, group: tuple[str, int] | None) -> None:
    count, mean, m2 = total.count, total.mean, total.m2
    if group:
        joint, mean, m2 = gather_moments(reference, count, mean, m2, *group)  # float64 is not in all backends
        count = int(joint)
    if not count:
        return
    assert layer.running_mean is not None and layer.running_var is not None
    layer.running_mean.copy_(mean)
    layer.running_var.copy_(m2 / max(count - 1, 1))
    if layer.num_batches_tracked is not None:
        layer.num_batches_tracked.fill_(total.calls)
