"""The specification of every kernel in plain torch: a backend for all devices and dtypes, which is accurate and slow.

Arithmetic is float64 for float64 input and float32 otherwise. The tests compare all kernels with it in float64.
"""

import torch

from .batch_norm import (
    activation,
    affine,
    backward,
    differentiable_backward,
    forward,
    grad_input,
    grad_sums,
    gradient,
    merge,
    moments,
    normalize,
    pack_mask,
    samples,
    unpack_mask,
    update_running,
)
from .conv_norm import conv_norm_backward, conv_norm_forward, grad_before_act
from .convolution import conv_grad_signs
from .dtypes import accumulator
from .images import augment
from .update import update

__all__ = [
    "accumulator",
    "activation",
    "affine",
    "augment",
    "backward",
    "conv_grad_signs",
    "conv_norm_backward",
    "conv_norm_forward",
    "differentiable_backward",
    "forward",
    "grad_before_act",
    "grad_input",
    "grad_sums",
    "gradient",
    "merge",
    "moments",
    "normalize",
    "pack_mask",
    "refuses",
    "samples",
    "unpack_mask",
    "update",
    "update_running",
]


def refuses(device: torch.device, dtype: torch.dtype) -> str | None:
    """Always None, because plain torch serves every input."""
    return None
