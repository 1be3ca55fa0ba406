"""Batch norm in Triton, for CUDA devices; through Triton's interpreter on the CPU, slowly, for tests."""

import torch
from torch import Tensor
from triton import JITFunction

from ..layout import layout
from .augment import augment
from .conv_grad_signs import conv_grad_signs
from .grad_input import grad_input
from .grad_sums import grad_sums
from .merge import merge, statistics
from .moments import moments, moments_kernel, partial_moments
from .normalize import normalize

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
]

# TRITON_INTERPRET is read when a kernel is defined; later changes do not turn it.
_INTERPRETED = not isinstance(moments_kernel, JITFunction)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def refuses(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why these kernels cannot serve such an input, or None."""
    if device.type != "cuda" and not (device.type == "cpu" and _INTERPRETED):
        return "Triton kernels run on CUDA devices; on the CPU only under TRITON_INTERPRET=1"
    if dtype not in _DTYPES:
        return f"has no kernels for {dtype}"
    return None


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    act: str | None,
    save_mask: bool,
    *,
    record: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """y, mean, invstd and the mask, as :func:`bnkern.backends.reference.forward`; three launches in training.

    ``record`` takes no more of them in training, one more where there are no batch statistics.
    """
    mean = invstd = None
    if training and x.numel() == 0:
        _, mean, invstd = moments(x)
        if num_batches_tracked is not None:
            num_batches_tracked += 1
    elif training or running_mean is not None:
        parts = partial_moments(x, record is not None) if training else None
        running = (running_mean, running_var, num_batches_tracked)
        mean, invstd = statistics(parts, layout(x).count, *running, momentum, eps, x.dtype, record)
    y, mask = normalize(x, mean, invstd, weight, bias, residual, act, save_mask, record, training)
    return y, mean, invstd, mask


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    invstd: Tensor | None,
    mask: Tensor | None,
    act: str | None,
    training: bool,
    needs: tuple[bool, bool, bool, bool],
    *,
    record_gradient: Tensor | None = None,
    record_affine: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dweight, dbias, dresidual), each only where ``needs`` says so; three launches where all are needed.

    ``record_gradient`` takes one more; ``record_affine`` none, unless the affine sums were not needed.
    """
    need_x, need_weight, need_bias, need_residual = needs
    common = (dy, x, mean, invstd, weight, bias, mask, act)
    dweight = dbias = sums = None
    record_affine = None if mean is None else record_affine
    if need_weight or need_bias or (need_x and training) or record_affine is not None:
        sum_dy, sum_dy_xhat = grad_sums(*common, record_affine)
        dweight = sum_dy_xhat.to(weight.dtype) if need_weight else None
        dbias = sum_dy.to(bias.dtype) if need_bias else None
        sums = (sum_dy, sum_dy_xhat, max(layout(x).count, 1)) if training else None
    dx, dresidual = grad_input(*common, sums, need_x, need_residual, record_gradient)
    return dx, dweight, dbias, dresidual
