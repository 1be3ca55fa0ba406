"""The C++ CPU kernels (csrc/cpu), called through the native module.

They read planes with unit stride within a plane, and rows that are dense or have a multiple of 16 channels. Any other
tensor is copied once to the dense form of its layout. Formulas are those of ``reference``. Large results reuse memory
of freed results, because fresh pages cost more than the kernel.
"""

import torch
from torch import Tensor

from ..native import (
    _native,
    backward,
    forward,
    grad_input,
    grad_sums,
    moments,
    normalize,
    try_forward,
    update,
)
from ..reference import merge
from .convolution import (
    conv3x3,
    conv_direct,
    conv_grad_signs,
    conv_norm_backward,
    conv_norm_forward,
    conv_norm_options,
    grad_before_act,
    prefers_conv_norm,
    prefers_direct,
    prefers_own_gradient,
    prefers_winograd,
)

__all__ = [
    "augment",
    "backward",
    "conv3x3",
    "conv_direct",
    "conv_grad_signs",
    "conv_norm_backward",
    "conv_norm_forward",
    "conv_norm_options",
    "forward",
    "grad_before_act",
    "grad_input",
    "grad_sums",
    "merge",
    "moments",
    "normalize",
    "prefers_conv_norm",
    "prefers_direct",
    "prefers_own_gradient",
    "prefers_winograd",
    "refuses",
    "try_forward",
    "update",
]


def refuses(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this backend cannot serve such an input, or None."""
    return None if device.type == "cpu" else f"its kernels run on the CPU, the input is on {device}"


def release_memory() -> None:
    """Returns the memory of freed results to the system: at most BNKERN_POOL_MB, by default an eighth of the memory."""
    _native.pool_clear()


def augment(
    images: Tensor,
    labels: Tensor,
    order: Tensor,
    state: Tensor,
    position: Tensor,
    table: Tensor,
    out: Tensor,
    labels_out: Tensor,
    size: int,
    first: int,
    random: bool,
) -> None:
    """Writes one batch of an epoch to ``out`` and ``labels_out``. Raises IndexError if the order has no such batch."""
    batch = position.item()
    if not 0 <= batch < len(order) // size:
        raise IndexError(f"position must be 0 to {len(order) // size - 1}, got {batch}")
    seed, epoch = state.tolist()
    begin = batch * size + first
    chosen = order[begin : begin + len(out)]
    _native.augment(images, labels, chosen, table, out, labels_out, random, seed, epoch)
