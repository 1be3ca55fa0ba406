"""Phase ``grad_sums``: sum g and sum g * xhat of every channel, the gradients of bias and weight."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..activations import code
from ..calls import BackwardCall
from ..layout import addressed, layout
from ..reference import accumulator
from .common import addresses, affine, channel_of, channel_vectors, gated, kernel, launch, locate, plan, position
from .records import columns_sum, fold_row, owned, write_part
from .samples import record_samples

PARTS, CHANNELS = 32, 16  # the block that a program of fold_kernel adds at a time


@triton.jit
def sign(v):
    """1, -1 or 0. The sign of NaN is 0."""
    return (v > 0).to(tl.int32) - (v < 0).to(tl.int32)


@kernel
def grad_sums_kernel(
    dy_ptr, x_ptr, mask_ptr, mean_ptr, invstd_ptr, weight_ptr, bias_ptr, sums_ptr, dots_ptr, parts_ptr,
    dy_outer, dy_inner, x_outer, x_inner, lines, length, channels, tiles, share, spans, beside,
    has_statistics, has_weight, has_bias, act,
    ROWS: tl.constexpr, FLAT: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr,
    GROUP: tl.constexpr, OCTETS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Writes one row of partial sums per split, and with ``parts_ptr`` also a part of the record."""
    STORED: tl.constexpr = x_ptr.dtype.element_ty
    ACC: tl.constexpr = mean_ptr.dtype.element_ty
    first = tl.program_id(1) * share
    _, octet = locate(first, 0, spans, beside, ROWS, WIDE, GROUP, OCTETS, UNROLL)
    channel, exists = channel_of(octet, length, channels, ROWS, FLAT, ALIGN)
    vectors = (mean_ptr, invstd_ptr, weight_ptr, bias_ptr)
    present = (has_statistics, has_weight, has_bias)
    mean, invstd, weight, bias = affine(vectors, present, channel, exists, ROWS, ALIGN)
    total = tl.zeros((GROUP, 8), ACC)
    dot = tl.zeros((GROUP, 8), ACC)
    if parts_ptr is not None:
        absolute = tl.zeros((GROUP, 8), ACC)
        signs = tl.zeros((GROUP, 8), tl.int32)
        nonzero = tl.zeros((GROUP, 8), tl.int32)
        absolute_dot = tl.zeros((GROUP, 8), ACC)
        dot_signs = tl.zeros((GROUP, 8), tl.int32)
        dot_nonzero = tl.zeros((GROUP, 8), tl.int32)
    for t in range(first, tl.minimum(first + share, tiles)):
        places, dys, xs = (), (), ()
        for u in tl.static_range(UNROLL):
            line, octet = locate(t, u, spans, beside, ROWS, WIDE, GROUP, OCTETS, UNROLL)
            valid = (line < lines) & (position(octet) < length * ALIGN)
            places += ((line, octet, valid),)
            pointers = addresses(dy_ptr, dy_outer, dy_inner, line, octet, channels, ROWS, FLAT, ALIGN)
            dys += (tl.load(pointers, mask=valid, other=0.0),)
            pointers = addresses(x_ptr, x_outer, x_inner, line, octet, channels, ROWS, FLAT, ALIGN)
            xs += (tl.load(pointers, mask=valid, other=0.0),)
        for u in tl.static_range(UNROLL):
            line, octet, valid = places[u]
            xhat = (xs[u].to(ACC) - mean) * invstd
            g = gated(
                dys[u].to(ACC), xhat, weight, bias, mask_ptr, act, line, octet, lines, length, channels, valid,
                STORED, ROWS, FLAT, ALIGN,
            )  # fmt: skip
            total += g
            # An idle lane has g = 0, but its xhat may overflow, and the product would be NaN.
            dot = tl.fma(g, tl.where(valid, xhat, 0.0), dot)
            if parts_ptr is not None:
                absolute += tl.abs(g)
                signs += sign(g)
                nonzero += (g != 0).to(tl.int32)
                summand = g * tl.where(valid, xhat, 0.0)
                absolute_dot += tl.abs(summand)
                dot_signs += sign(summand)
                dot_nonzero += (summand != 0).to(tl.int32)
    # Add all lanes of a channel.
    WIDTH: tl.constexpr = OCTETS * 8 if ROWS else 1
    total = tl.sum(tl.reshape(total, (GROUP * 8 // WIDTH, WIDTH)), 0)
    dot = tl.sum(tl.reshape(dot, (GROUP * 8 // WIDTH, WIDTH)), 0)
    channel = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    offsets = tl.program_id(1) * channels
    tl.store(sums_ptr + offsets + channel, total, mask=channel < channels)
    tl.store(dots_ptr + offsets + channel, dot, mask=channel < channels)
    if parts_ptr is not None:
        absolute = columns_sum(absolute, WIDTH)
        signs = columns_sum(signs, WIDTH)
        nonzero = columns_sum(nonzero, WIDTH)
        absolute_dot = columns_sum(absolute_dot, WIDTH)
        dot_signs = columns_sum(dot_signs, WIDTH)
        dot_nonzero = columns_sum(dot_nonzero, WIDTH)
        rows = (total, absolute, signs, nonzero, dot, absolute_dot, dot_signs, dot_nonzero)
        part, channel, in_bounds = owned(channels, WIDTH, FLAT)
        write_part(parts_ptr, rows, 0, 8, part, channel, channels, in_bounds)


@kernel
def fold_kernel(
    sums_ptr, dots_ptr, sum_ptr, dot_ptr, parts_ptr, record_ptr, parts, channels,
    PARTS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Adds the parts in a fixed order: a tree over each block, then the blocks one by one.

    Further programs (axis 1 of the grid) add the rows of the record.
    """
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    if record_ptr is not None:
        row = tl.program_id(1) - 1
        if row >= 0:
            fold_row(parts_ptr, row, 8, record_ptr, row, parts, channel, channels, PARTS, CHANNELS)
            return
    total = tl.zeros((CHANNELS,), sum_ptr.dtype.element_ty)
    dot = tl.zeros((CHANNELS,), sum_ptr.dtype.element_ty)
    for first in range(0, parts, PARTS):
        part = (first + tl.arange(0, PARTS))[:, None]
        valid = (part < parts) & (channel < channels)[None, :]
        offsets = part.to(tl.int64) * channels + channel[None, :]
        total += tl.sum(tl.load(sums_ptr + offsets, mask=valid, other=0.0), 0)
        dot += tl.sum(tl.load(dots_ptr + offsets, mask=valid, other=0.0), 0)
    tl.store(sum_ptr + channel, total, mask=channel < channels)
    tl.store(dot_ptr + channel, dot, mask=channel < channels)


def grad_sums(call: BackwardCall) -> tuple[Tensor, Tensor]:
    """sum g [C] and sum g * xhat [C]. These launches also fill ``call.record_affine``, unless this is the identity.

    ``call.record_samples`` needs launches of its own.
    """
    record_samples(call)
    dy, x, mask = call.dy, call.x, call.mask
    record = None if call.mean is None else call.record_affine
    like, acc = layout(x), accumulator(x.dtype)
    if x.numel() == 0:
        if record is not None:
            record.zero_()
        zeros = torch.zeros(like.c, dtype=acc, device=x.device)
        return zeros, zeros.clone()
    dy, x = addressed(dy, like.rows), addressed(x, like.rows)
    vectors, present = channel_vectors(x, call.mean, call.invstd, call.weight, call.bias)
    walk = plan(like, [dy, x], vectors)
    sums, dots = torch.empty((2, walk.grid[1], like.c), dtype=acc, device=x.device)
    total, dot = (torch.empty(like.c, dtype=acc, device=x.device) for _ in range(2))
    parts = None if record is None else torch.empty((walk.parts, 8, like.c), dtype=torch.float64, device=x.device)
    launch(
        grad_sums_kernel, walk.grid, x.device, dy, x, mask if call.act else None, *vectors, sums, dots, parts,
        *walk.strides, *walk.sizes, *present, code(call.act), **walk.constants,
    )  # fmt: skip
    launch(
        fold_kernel, (triton.cdiv(like.c, CHANNELS), 1 if record is None else 9), x.device,
        sums, dots, total, dot, parts, record, walk.grid[1], like.c,
        PARTS=PARTS, CHANNELS=CHANNELS,
    )  # fmt: skip
    return total, dot
