"""The conversion of batch norms to those whose statistics are of all processes."""

import warnings

import torch
from torch.nn.utils import parametrize

from .norms import SyncBatchNorm, _Fused


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
