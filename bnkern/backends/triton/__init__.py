"""Batch norm in Triton for CUDA devices. Tests also run it on the CPU with Triton's interpreter, which is slow."""

from typing import cast

import torch
from triton import JITFunction

from ..calls import BackwardCall, Forward, ForwardCall, Gradients
from ..layout import layout
from .augment import augment
from .conv_grad_signs import conv_grad_signs
from .grad_input import grad_input
from .grad_sums import grad_sums
from .merge import merge, statistics
from .moments import moments, moments_kernel, partial_moments
from .normalize import normalize
from .running import forward_with_skips
from .update import update

__all__ = [
    "augment",
    "backward",
    "conv_grad_signs",
    "forward",
    "grad_input",
    "grad_sums",
    "merge",
    "moments",
    "normalize",
    "refuses",
    "update",
]

# TRITON_INTERPRET is read when a kernel is defined. Later changes of it have no effect.
_INTERPRETED = not isinstance(moments_kernel, JITFunction)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def refuses(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why these kernels cannot serve such an input, or None."""
    if device.type != "cuda" and not (device.type == "cpu" and _INTERPRETED):
        return "Triton kernels run on CUDA devices; on the CPU only under TRITON_INTERPRET=1"
    if dtype not in _DTYPES:
        return f"has no kernels for {dtype}"
    return None


def forward(call: ForwardCall) -> Forward:
    """y, mean, invstd and the mask, as :func:`bnkern.backends.reference.forward`; three launches in training.

    A record needs no more launches in training, and one more if there are no batch statistics. ``num_batches_skipped``
    needs two more.
    """
    if call.num_batches_skipped is not None:
        return cast(Forward, forward_with_skips(forward, call))
    x = call.x
    mean = invstd = None
    if call.training and x.numel() == 0:
        _, mean, invstd = moments(x)
        if call.num_batches_tracked is not None:
            call.num_batches_tracked.add_(1)
    elif call.normalizes:
        parts = partial_moments(x, call.record is not None, call.sample_weight) if call.training else None
        mean, invstd = statistics(parts, layout(x).count, call)
    y, mask = normalize(call, mean, invstd, tallied=call.training)
    return y, mean, invstd, mask


def backward(call: BackwardCall) -> Gradients:
    """(dx, dweight, dbias, dresidual), with None for those not in ``call.needs``; three launches if all are needed.

    ``record_gradient`` needs one more launch. ``record_affine`` needs none, unless only the record needs the sums.
    ``record_samples`` needs one more pass over dy and x.
    """
    _, need_weight, need_bias, _ = call.needs
    dweight = dbias = sums = None
    if call.needs_sums:
        sum_dy, sum_dy_xhat = grad_sums(call)
        dweight = sum_dy_xhat.to(call.weight.dtype) if need_weight and call.weight is not None else None
        dbias = sum_dy.to(call.bias.dtype) if need_bias and call.bias is not None else None
        sums = (sum_dy, sum_dy_xhat, max(layout(call.x).count, 1)) if call.training else None
    dx, dresidual = grad_input(call, sums)
    return dx, dweight, dbias, dresidual
