"""Phase ``normalize``: y = relu(weight * (x - mean) * invstd + bias + residual), and the ReLU mask."""

import torch
import triton.language as tl
from torch import Tensor

from ..layout import addressed, empty_like, layout
from .common import (
    addresses,
    affine,
    channel_of,
    channel_vectors,
    kernel,
    launch,
    locate,
    mask_addresses,
    plan,
    position,
)


@kernel
def normalize_kernel(
    x_ptr, residual_ptr, y_ptr, mask_ptr, mean_ptr, invstd_ptr, weight_ptr, bias_ptr,
    x_outer, x_inner, residual_outer, residual_inner, y_outer, y_inner,
    lines, length, channels, tiles, share, spans, beside,
    has_statistics, has_weight, has_bias, has_residual, relu,
    ROWS: tl.constexpr, FLAT: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr,
    GROUP: tl.constexpr, OCTETS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    STORED: tl.constexpr = y_ptr.dtype.element_ty
    vectors = (mean_ptr, invstd_ptr, weight_ptr, bias_ptr)
    given = (has_statistics, has_weight, has_bias)
    first = tl.program_id(1) * share
    if not FLAT:
        _, octet = locate(first, 0, spans, beside, ROWS, WIDE, GROUP, OCTETS, UNROLL)
        channel, exists = channel_of(octet, length, channels, ROWS, FLAT, ALIGN)
        mean, invstd, weight, bias = affine(vectors, given, channel, exists, ROWS, ALIGN)
    for t in range(first, tl.minimum(first + share, tiles)):
        places, xs, residuals = (), (), ()
        for u in tl.static_range(UNROLL):
            line, octet = locate(t, u, spans, beside, ROWS, WIDE, GROUP, OCTETS, UNROLL)
            known = (line < lines) & (position(octet) < length * ALIGN)
            places += ((line, octet, known),)
            at = addresses(x_ptr, x_outer, x_inner, line, octet, channels, ROWS, FLAT, ALIGN)
            xs += (tl.load(at, mask=known, other=0.0),)
            at = addresses(residual_ptr, residual_outer, residual_inner, line, octet, channels, ROWS, FLAT, ALIGN)
            residuals += (tl.load(at, mask=known & (has_residual != 0), other=0.0),)
        for u in tl.static_range(UNROLL):
            line, octet, known = places[u]
            if FLAT:
                channel, _ = channel_of(octet, length, channels, ROWS, FLAT, ALIGN)
                mean, invstd, weight, bias = affine(vectors, given, channel, known, ROWS, ALIGN)
            xhat = (xs[u].to(mean.dtype) - mean) * invstd
            z = (tl.fma(xhat, weight, bias) + residuals[u].to(mean.dtype)).to(STORED).to(mean.dtype)
            stopped = z <= 0  # NaN is not, and passes
            at = addresses(y_ptr, y_outer, y_inner, line, octet, channels, ROWS, FLAT, ALIGN)
            tl.store(at, tl.where((relu != 0) & stopped, 0.0, z), mask=known)
            if mask_ptr is not None:
                bits = tl.where(known & (stopped == 0), 1 << tl.arange(0, 8)[None, :], 0)
                byte = tl.sum(bits, 1, keep_dims=True).to(tl.uint8)
                at, there = mask_addresses(mask_ptr, line, octet, length, channels, ROWS, FLAT, ALIGN)
                tl.store(at, byte, mask=(line < lines) & there)


def normalize(
    x: Tensor,
    mean: Tensor | None,
    invstd: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    act: str | None,
    save_mask: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """y and, with residual and ReLU and unless not wanted, the mask."""
    like = layout(x)
    save_mask = save_mask and act == "relu" and residual is not None
    y = empty_like(x, like.rows)
    mask = torch.empty(like.mask_shape, dtype=torch.uint8, device=x.device) if save_mask else None
    if x.numel() == 0:
        return y, mask
    x = addressed(x, like.rows)
    z = x if residual is None else addressed(residual, like.rows)
    vectors, given = channel_vectors(x, mean, invstd, weight, bias)
    how = plan(like, [x, z, y], vectors, pointwise=True)
    launch(
        normalize_kernel, how.grid, x.device, x, z, y, mask, *vectors,
        *how.strides, *how.sizes, *given, int(residual is not None), int(act == "relu"), **how.constants,
    )  # fmt: skip
    return y, mask
