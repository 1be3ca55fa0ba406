"""Phase ``moments``: count, mean and M2 of every channel, by local two-pass sums merged with Chan's formula."""

import torch
import triton.language as tl
from torch import Tensor

from ..layout import addressed, layout
from ..reference import accumulator
from .common import addresses, kernel, launch, locate, plan, position
from .merge import chan, merge


@kernel
def moments_kernel(
    x_ptr, counts_ptr, means_ptr, m2s_ptr, outer, inner, lines, length, channels, tiles, share, spans, beside,
    ROWS: tl.constexpr, FLAT: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr,
    GROUP: tl.constexpr, OCTETS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """One row of partial (count, mean, M2) per split."""
    ACC: tl.constexpr = means_ptr.dtype.element_ty
    first = tl.program_id(1) * share
    # Each lane keeps moments of its own, about the first value that it sees, so that they are small numbers however
    # large the mean, and zero in a constant channel. Lanes of an octet share a count unless a line may end within.
    COUNTED: tl.constexpr = 1 if ROWS or ALIGN == 8 else 8
    count = tl.zeros((GROUP, COUNTED), ACC)
    pivot = tl.zeros((GROUP, 8), ACC)
    mean = tl.zeros((GROUP, 8), ACC)
    m2 = tl.zeros((GROUP, 8), ACC)
    for t in range(first, tl.minimum(first + share, tiles)):
        xs, known = (), ()
        tile_count = tl.zeros((GROUP, COUNTED), ACC)
        tile_mean = tl.zeros((GROUP, 8), ACC)
        tile_m2 = tl.zeros((GROUP, 8), ACC)
        for u in tl.static_range(UNROLL):
            line, octet = locate(t, u, spans, beside, ROWS, WIDE, GROUP, OCTETS, UNROLL)
            there = (line < lines) & (position(octet) < length * ALIGN)
            at = addresses(x_ptr, outer, inner, line, octet, channels, ROWS, FLAT, ALIGN)
            xs += (tl.load(at, mask=there, other=0.0),)
            known += (there,)
            if ROWS:  # lanes beyond the last channel may count: their results are dropped
                tile_count += (line < lines).to(ACC)
            elif ALIGN == 8:
                tile_count += ((line < lines) & (octet * 8 < length * ALIGN)).to(ACC)
            else:
                tile_count += there.to(ACC)
        pivot = tl.where(count == 0, xs[0].to(ACC), pivot)
        for u in tl.static_range(UNROLL):
            tile_mean += tl.where(known[u], xs[u].to(ACC) - pivot, 0.0)
        tile_mean *= 1.0 / tl.maximum(tile_count, 1.0)
        for u in tl.static_range(UNROLL):
            deviation = tl.where(known[u], (xs[u].to(ACC) - pivot) - tile_mean, 0.0)
            tile_m2 = tl.fma(deviation, deviation, tile_m2)
        count, mean, m2 = chan(count, mean, m2, tile_count, tile_mean, tile_m2)
    # All lanes of a channel into one, about a centre that they share.
    WIDTH: tl.constexpr = OCTETS * 8 if ROWS else 1  # channels of a program
    LANES: tl.constexpr = GROUP * 8 // WIDTH
    count = tl.reshape(tl.broadcast_to(count, (GROUP, 8)), (LANES, WIDTH))
    pivot = tl.reshape(pivot, (LANES, WIDTH))
    mean = tl.reshape(mean, (LANES, WIDTH))
    m2 = tl.reshape(m2, (LANES, WIDTH))
    centre = tl.sum((pivot + mean) * (count / tl.maximum(tl.sum(count, 0), 1.0)[None, :]), 0)
    mean = tl.where(count > 0, (pivot - centre[None, :]) + mean, 0.0)
    count, mean, m2 = tl.reduce((count, mean, m2), 0, chan)
    channel = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    at = tl.program_id(1) * channels + channel
    tl.store(means_ptr + at, centre + mean, mask=channel < channels)
    tl.store(m2s_ptr + at, m2, mask=channel < channels)
    if tl.program_id(0) == 0:
        tl.store(counts_ptr + tl.program_id(1), tl.max(count, 0))


def partial_moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Counts [K], means [K, C] and M2s [K, C] of the K parts into which the partition cuts each channel of x."""
    like = layout(x)
    x = addressed(x, like.rows)
    how = plan(like, [x], [])
    means, m2s = torch.empty((2, how.grid[1], like.c), dtype=accumulator(x.dtype), device=x.device)
    counts = means.new_empty(how.grid[1])
    launch(moments_kernel, how.grid, x.device, x, counts, means, m2s, *how.strides, *how.sizes, **how.constants)
    return counts, means, m2s


def moments(x: Tensor) -> tuple[int, Tensor, Tensor]:
    """Count, mean [C] and M2 [C] of x."""
    if x.numel() == 0:
        zeros = torch.zeros(x.shape[1], dtype=accumulator(x.dtype), device=x.device)
        return layout(x).count, zeros, zeros.clone()
    _, mean, m2 = merge(*partial_moments(x))
    return layout(x).count, mean, m2
