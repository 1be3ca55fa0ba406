"""Phase ``grad_sums``: sum g and sum g * xhat of every channel, the gradients of bias and weight."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import addressed, layout
from ..reference import accumulator
from .common import addresses, affine, channel_of, channel_vectors, gated, kernel, launch, locate, plan, position

PARTS, CHANNELS = 32, 16  # the block that a program of the fold adds at a time


@kernel
def grad_sums_kernel(
    dy_ptr, x_ptr, mask_ptr, mean_ptr, invstd_ptr, weight_ptr, bias_ptr, sums_ptr, dots_ptr,
    dy_outer, dy_inner, x_outer, x_inner, lines, length, channels, tiles, share, spans, beside,
    has_statistics, has_weight, has_bias, relu,
    ROWS: tl.constexpr, FLAT: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr,
    GROUP: tl.constexpr, OCTETS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """One row of partial sums per split."""
    STORED: tl.constexpr = x_ptr.dtype.element_ty
    ACC: tl.constexpr = mean_ptr.dtype.element_ty
    first = tl.program_id(1) * share
    _, octet = locate(first, 0, spans, beside, ROWS, WIDE, GROUP, OCTETS, UNROLL)
    channel, exists = channel_of(octet, length, channels, ROWS, FLAT, ALIGN)
    vectors = (mean_ptr, invstd_ptr, weight_ptr, bias_ptr)
    given = (has_statistics, has_weight, has_bias)
    mean, invstd, weight, bias = affine(vectors, given, channel, exists, ROWS, ALIGN)
    total = tl.zeros((GROUP, 8), ACC)
    dot = tl.zeros((GROUP, 8), ACC)
    for t in range(first, tl.minimum(first + share, tiles)):
        places, dys, xs = (), (), ()
        for u in tl.static_range(UNROLL):
            line, octet = locate(t, u, spans, beside, ROWS, WIDE, GROUP, OCTETS, UNROLL)
            known = (line < lines) & (position(octet) < length * ALIGN)
            places += ((line, octet, known),)
            at = addresses(dy_ptr, dy_outer, dy_inner, line, octet, channels, ROWS, FLAT, ALIGN)
            dys += (tl.load(at, mask=known, other=0.0),)
            at = addresses(x_ptr, x_outer, x_inner, line, octet, channels, ROWS, FLAT, ALIGN)
            xs += (tl.load(at, mask=known, other=0.0),)
        for u in tl.static_range(UNROLL):
            line, octet, known = places[u]
            xhat = (xs[u].to(ACC) - mean) * invstd
            g = gated(
                dys[u].to(ACC), xhat, weight, bias, mask_ptr, relu, line, octet, lines, length, channels, known,
                STORED, ROWS, FLAT, ALIGN,
            )  # fmt: skip
            total += g
            # An idle lane has g = 0, but its xhat may overflow.
            dot = tl.fma(g, tl.where(known, xhat, 0.0), dot)
    # All lanes of a channel into one.
    WIDTH: tl.constexpr = OCTETS * 8 if ROWS else 1
    total = tl.sum(tl.reshape(total, (GROUP * 8 // WIDTH, WIDTH)), 0)
    dot = tl.sum(tl.reshape(dot, (GROUP * 8 // WIDTH, WIDTH)), 0)
    channel = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    at = tl.program_id(1) * channels
    tl.store(sums_ptr + at + channel, total, mask=channel < channels)
    tl.store(dots_ptr + at + channel, dot, mask=channel < channels)


@kernel
def fold_kernel(
    sums_ptr, dots_ptr, sum_ptr, dot_ptr, parts, channels, PARTS: tl.constexpr, CHANNELS: tl.constexpr
):  # fmt: skip
    """The parts added in their order: a tree over each block, the blocks one by one."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    total = tl.zeros((CHANNELS,), sum_ptr.dtype.element_ty)
    dot = tl.zeros((CHANNELS,), sum_ptr.dtype.element_ty)
    for first in range(0, parts, PARTS):
        part = (first + tl.arange(0, PARTS))[:, None]
        known = (part < parts) & (channel < channels)[None, :]
        at = part.to(tl.int64) * channels + channel[None, :]
        total += tl.sum(tl.load(sums_ptr + at, mask=known, other=0.0), 0)
        dot += tl.sum(tl.load(dots_ptr + at, mask=known, other=0.0), 0)
    tl.store(sum_ptr + channel, total, mask=channel < channels)
    tl.store(dot_ptr + channel, dot, mask=channel < channels)


def grad_sums(
    dy: Tensor,
    x: Tensor,
    mean: Tensor | None,
    invstd: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    act: str | None,
) -> tuple[Tensor, Tensor]:
    """sum g [C] and sum g * xhat [C]."""
    like, acc = layout(x), accumulator(x.dtype)
    if x.numel() == 0:
        zeros = torch.zeros(like.c, dtype=acc, device=x.device)
        return zeros, zeros.clone()
    dy, x = addressed(dy, like.rows), addressed(x, like.rows)
    vectors, given = channel_vectors(x, mean, invstd, weight, bias)
    how = plan(like, [dy, x], vectors)
    sums, dots = torch.empty((2, how.grid[1], like.c), dtype=acc, device=x.device)
    total, dot = (torch.empty(like.c, dtype=acc, device=x.device) for _ in range(2))
    launch(
        grad_sums_kernel, how.grid, x.device, dy, x, mask if act == "relu" else None, *vectors, sums, dots,
        *how.strides, *how.sizes, *given, int(act == "relu"), **how.constants,
    )  # fmt: skip
    launch(
        fold_kernel, (triton.cdiv(like.c, CHANNELS),), x.device, sums, dots, total, dot, how.grid[1], like.c,
        PARTS=PARTS, CHANNELS=CHANNELS,
    )  # fmt: skip
    return total, dot
