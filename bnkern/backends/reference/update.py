"""The update of all parameters of a network by SGD with momentum in plain torch, as a specification of the kernels."""

import torch
from torch import Tensor

from ..calls import UpdateCall


def update(call: UpdateCall) -> None:
    """One step of SGD for all parameters, by the formula of :class:`..calls.UpdateCall`."""
    stopped, values = call.stop != 0, call.values
    for parameter, gradient in zip(call.parameters, call.gradients, strict=True):
        start = int(parameter.storage_offset()) - int(values.storage_offset())
        p = _part(values, parameter, start)
        v = gradient.to(p.dtype) + call.weight_decay * p
        if call.velocity is not None:
            old = _part(call.velocity, parameter, start)
            v = call.momentum * old + v
            old.copy_(torch.where(stopped, old, v))
        before = _part(call.before, parameter, start)
        before.copy_(torch.where(stopped, before, p))
        p.copy_(torch.where(stopped, p, p - call.lr * v))
        if call.shadow is not None and start < len(call.shadow):
            rounded = _part(call.shadow, parameter, start)
            rounded.copy_(torch.where(stopped, rounded, p.to(call.shadow.dtype)))


def _part(flat: Tensor, parameter: Tensor, start: int) -> Tensor:
    """The values of a parameter in a flat tensor, with the strides of the parameter."""
    return flat.as_strided(parameter.shape, parameter.stride(), int(flat.storage_offset()) + start)
