"""Phase ``normalize``: y = act(weight * (x - mean) * invstd + bias + residual), and the mask of z > 0."""

import torch
import triton.language as tl
from torch import Tensor

from ..activations import code
from ..calls import ForwardCall
from ..layout import addressed, empty_like, layout
from ..records import ACTIVATION, fill_empty_activation
from .common import (
    activate,
    addresses,
    affine,
    channel_of,
    channel_vectors,
    inside,
    kernel,
    launch,
    locate,
    mask_addresses,
    plan,
)
from .moments import add_tile, counted, join_lanes, no_moments, write_moments
from .records import columns_sum, fold_activation, owned, tell, write_part


@kernel
def normalize_kernel(
    x_ptr, residual_ptr, y_ptr, mask_ptr, mean_ptr, invstd_ptr, weight_ptr, bias_ptr, parts_ptr, tally_ptr, row_ptr,
    x_outer, x_inner, residual_outer, residual_inner, y_outer, y_inner,
    lines, length, channels, tiles, share, spans, beside,
    has_statistics, has_weight, has_bias, has_residual, act, part_count,
    ROWS: tl.constexpr, FLAT: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr,
    GROUP: tl.constexpr, OCTETS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """With ``tally_ptr`` also counts z > 0 for the record. With ``parts_ptr`` writes parts of the whole record."""
    STORED: tl.constexpr = y_ptr.dtype.element_ty
    RECORD: tl.constexpr = parts_ptr is not None or tally_ptr is not None
    vectors = (mean_ptr, invstd_ptr, weight_ptr, bias_ptr)
    present = (has_statistics, has_weight, has_bias)
    first = tl.program_id(1) * share
    if ROWS or not FLAT:
        _, octet = locate(first, 0, spans, beside, ROWS, WIDE, GROUP, OCTETS, UNROLL)
        channel, exists = channel_of(octet, length, channels, ROWS, FLAT, ALIGN)
        mean, invstd, weight, bias = affine(vectors, present, channel, exists, ROWS, ALIGN)
    if RECORD:
        active = tl.zeros((GROUP, 8), tl.int32)
    if parts_ptr is not None:
        lanes = no_moments(mean_ptr.dtype.element_ty, GROUP, ROWS, FLAT, ALIGN, False)
    for t in range(first, tl.minimum(first + share, tiles)):
        places, xs, residuals = (), (), ()
        for u in tl.static_range(UNROLL):
            line, octet = locate(t, u, spans, beside, ROWS, WIDE, GROUP, OCTETS, UNROLL)
            valid = inside(line, octet, lines, length, channels, ROWS, FLAT, ALIGN)
            places += ((line, octet, valid),)
            pointers = addresses(x_ptr, x_outer, x_inner, line, octet, channels, ROWS, FLAT, ALIGN)
            xs += (tl.load(pointers, mask=valid, other=0.0),)
            pointers = addresses(residual_ptr, residual_outer, residual_inner, line, octet, channels, ROWS, FLAT, ALIGN)
            residuals += (tl.load(pointers, mask=valid & (has_residual != 0), other=0.0),)
        for u in tl.static_range(UNROLL):
            line, octet, valid = places[u]
            if FLAT and not ROWS:
                channel, _ = channel_of(octet, length, channels, ROWS, FLAT, ALIGN)
                mean, invstd, weight, bias = affine(vectors, present, channel, valid, ROWS, ALIGN)
            xhat = (xs[u].to(mean.dtype) - mean) * invstd
            z = (tl.fma(xhat, weight, bias) + residuals[u].to(mean.dtype)).to(STORED).to(mean.dtype)
            below = z <= 0  # false for NaN
            pointers = addresses(y_ptr, y_outer, y_inner, line, octet, channels, ROWS, FLAT, ALIGN)
            y = activate(z, (act != 0) & below, act)
            tl.store(pointers, y, mask=valid)
            if RECORD:
                active += (valid & (z > 0)).to(tl.int32)
            if mask_ptr is not None:
                bits = tl.where(valid & (below == 0), 1 << tl.arange(0, 8)[None, :], 0)
                byte = tl.sum(bits, 1, keep_dims=True).to(tl.uint8)
                pointers, in_bounds = mask_addresses(mask_ptr, line, octet, lines, length, channels, ROWS, FLAT, ALIGN)
                tl.store(pointers, byte, mask=(line < lines) & in_bounds)
        if parts_ptr is not None:
            everywhere, tile_count = (), tl.zeros_like(lanes[0])
            for u in tl.static_range(UNROLL):
                line, octet, valid = places[u]
                everywhere += (valid,)
                tile_count += counted(line, octet, valid, lines, length, ROWS, FLAT, ALIGN).to(mean.dtype)
            lanes = add_tile(lanes, xs, everywhere, tile_count, xs, UNROLL, 1, False)
    if RECORD:
        WIDTH: tl.constexpr = OCTETS * 8 if ROWS else 1
        part, channel, in_bounds = owned(channels, WIDTH, FLAT)
        active = columns_sum(active, WIDTH)
        if parts_ptr is not None:
            write_moments(parts_ptr, join_lanes(lanes, WIDTH, 1), part, channel, channels, in_bounds)
            write_part(parts_ptr, (active,), 8, 9, part, channel, channels, in_bounds)
        else:
            tell(tally_ptr, row_ptr, active, part_count, channel, in_bounds)


def normalize(
    call: ForwardCall, mean: Tensor | None, invstd: Tensor | None, tallied: bool = False
) -> tuple[Tensor, Tensor | None]:
    """y, and its mask if the call requests one.

    A second launch fills ``call.record``. If ``tallied``, the first launch fills only its last row, which must be 0.
    """
    x, residual, record = call.x, call.residual, call.record
    like = layout(x)
    y = empty_like(x, like.rows)
    mask = torch.empty(like.mask_shape, dtype=torch.uint8, device=x.device) if call.has_mask else None
    if x.numel() == 0:
        if record is not None:
            fill_empty_activation(record)
        return y, mask
    x = addressed(x, like.rows)
    z = x if residual is None else addressed(residual, like.rows)
    vectors, present = channel_vectors(x, mean, invstd, call.weight, call.bias)
    walk = plan(like, [x, z, y], vectors, pointwise=True, recording=record is not None)
    part_count = walk.parts
    parts = tally = row = None
    if record is not None and tallied:
        row = record[-1]
        tally = row.view(torch.int64)
    elif record is not None:
        parts = torch.empty((part_count, len(ACTIVATION), like.c), dtype=torch.float64, device=x.device)
    launch(
        normalize_kernel, walk.grid, x.device, x, z, y, mask, *vectors, parts, tally, row,
        *walk.strides, *walk.sizes, *present, int(residual is not None), code(call.act), part_count,
        **walk.constants,
    )  # fmt: skip
    if parts is not None:
        fold_activation(parts, record, like.count)
    return y, mask
