"""Functions that change how the batch norms of a model use and update their running statistics."""

import torch

from .norms import _Fused, count_skips


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
            count_skips(module, name)
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


def _is_instance_norm(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.modules.instancenorm._InstanceNorm)
