"""The update of all parameters of a network by SGD with momentum in plain torch, as a specification of the kernels."""

from collections.abc import Sequence

import torch
from torch import Tensor


def update(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    values: Tensor,
    before: Tensor,
    velocity: Tensor | None,
    shadow: Tensor | None,
    lr: Tensor,
    stop: Tensor,
    momentum: float,
    weight_decay: float,
) -> None:
    """One step of SGD for all parameters, which are views of one flat tensor.

    With the gradient g of a parameter p, and its velocity v:

        before = p,  v = momentum * v + (g + weight_decay * p),  p = p - lr * v,  shadow = p rounded to bfloat16

    The kernels compute fma(weight_decay, p, g), round momentum * v before the addition, and compute fma(-lr, v, p). If
    ``stop`` is not 0, nothing is written.

    Args:
        parameters: dense views of ``values`` in the order of their addresses. Each begins at a multiple of 64 values.
        gradients: of the shapes and strides of the parameters. They are bfloat16 for parameters that have a shadow, and
            otherwise of the dtype of ``values``.
        values: [P], float32 or float64. P is a multiple of 64. Values between the parameters are undefined.
        before: [P] of the same dtype, as all flat tensors; written.
        velocity: [P], updated; None if there is no momentum, and then v = g + weight_decay * p.
        shadow: bfloat16 [S], written: the first S of ``values``, which are whole parameters; or None.
        lr, stop: float32 scalars on the device.
    """
    stopped = stop != 0
    for parameter, gradient in zip(parameters, gradients, strict=True):
        start = int(parameter.storage_offset()) - int(values.storage_offset())
        p = _part(values, parameter, start)
        v = gradient.to(p.dtype) + weight_decay * p
        if velocity is not None:
            old = _part(velocity, parameter, start)
            v = momentum * old + v
            old.copy_(torch.where(stopped, old, v))
        kept = _part(before, parameter, start)
        kept.copy_(torch.where(stopped, kept, p))
        p.copy_(torch.where(stopped, p, p - lr * v))
        if shadow is not None and start < len(shadow):
            rounded = _part(shadow, parameter, start)
            rounded.copy_(torch.where(stopped, rounded, p.to(shadow.dtype)))


def _part(flat: Tensor, parameter: Tensor, start: int) -> Tensor:
    """The values of a parameter in a flat tensor, with the strides of the parameter."""
    return flat.as_strided(parameter.shape, parameter.stride(), int(flat.storage_offset()) + start)
