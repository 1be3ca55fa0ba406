"""Phase ``moments``: count, mean and M2 of every channel, from two-pass sums of tiles, merged with Chan's formula."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import addressed, layout
from ..records import ACTIVATION
from ..reference import accumulator
from .common import addresses, inside, kernel, launch, load_weights, locate, plan
from .merge import LEAST_COUNT, chan, merge
from .records import about, columns_sum, owned, write_part


@triton.jit
def no_moments(
    ACC: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, FLAT: tl.constexpr, ALIGN: tl.constexpr,
    WEIGHTED: tl.constexpr,
):  # fmt: skip
    """The state of lanes before their first value: count, pivot, mean, M2 and, for records, M3, M4, least, largest and
    the number of values that are not finite.

    The lanes of an octet share one count, unless a line, or one of the rows in a line, may end within an octet, or
    values of planes have weights.
    """
    COUNTED: tl.constexpr = 1 if (ROWS and not FLAT) or (ALIGN == 8 and not WEIGHTED) else 8
    zero = tl.zeros((GROUP, 8), ACC)
    infinite = tl.full((GROUP, 8), float("inf"), ACC)
    none = tl.zeros((GROUP, 8), tl.float32)  # of a lane it is exact, and takes fewer registers than an integer
    return tl.zeros((GROUP, COUNTED), ACC), zero, zero, zero, zero, zero, infinite, -infinite, none


@triton.jit
def counted(line, octet, valid, lines, length, ROWS: tl.constexpr, FLAT: tl.constexpr, ALIGN: tl.constexpr):
    """Whether lanes have a value: [GROUP, 1] if it is the same for all lanes of an octet, otherwise ``valid``."""
    if ROWS and not FLAT:  # lanes beyond the last channel may count, because their results are not stored
        return line < lines
    elif ALIGN == 8:
        return (line < lines) & (octet * 8 < length * ALIGN)
    else:
        return valid


@triton.jit
def add_tile(
    lanes, xs, valid, tile_count, weights, UNROLL: tl.constexpr, RECORD: tl.constexpr, WEIGHTED: tl.constexpr
):  # fmt: skip
    """Adds the values ``xs`` of a tile, UNROLL for each lane, to the moments of the lanes, where ``valid``. The other
    values must be 0.

    If ``WEIGHTED``, ``weights`` has their weights, ``valid`` is false where these are 0, and ``tile_count`` is their
    sum.

    Means are relative to the first value of a lane, its pivot. So they are small even if the mean is large, and zero in
    a constant channel.
    """
    count, pivot, mean, m2, m3, m4, least, largest, nonfinite = lanes
    tile_mean = tl.zeros_like(mean)
    tile_m2 = tl.zeros_like(mean)
    if WEIGHTED:
        for u in tl.static_range(UNROLL):  # the last valid value is a pivot as well as the first one
            pivot = tl.where((count == 0) & valid[u], xs[u].to(mean.dtype), pivot)
    else:
        pivot = tl.where(count == 0, xs[0].to(mean.dtype), pivot)
    for u in tl.static_range(UNROLL):
        deviation = tl.where(valid[u], xs[u].to(mean.dtype) - pivot, 0.0)
        tile_mean += deviation * weights[u] if WEIGHTED else deviation
    tile_mean *= 1.0 / tl.maximum(tile_count, LEAST_COUNT)
    tile_m3 = tl.zeros_like(mean)
    tile_m4 = tl.zeros_like(mean)
    for u in tl.static_range(UNROLL):
        deviation = tl.where(valid[u], (xs[u].to(mean.dtype) - pivot) - tile_mean, 0.0)
        tile_m2 = tl.fma(deviation * weights[u] if WEIGHTED else deviation, deviation, tile_m2)
        if RECORD:
            square = deviation * deviation
            tile_m3 = tl.fma(square, deviation, tile_m3)
            tile_m4 = tl.fma(square, square, tile_m4)
            value = xs[u].to(mean.dtype)
            least = tl.where(valid[u] & (value < least), value, least)  # ignores NaN, as does the next line
            largest = tl.where(valid[u] & (value > largest), value, largest)
            nonfinite = tl.where(tl.abs(value) < float("inf"), nonfinite, nonfinite + 1.0)
    total, middle, m2_of_both = chan(count, mean, m2, tile_count, tile_mean, tile_m2)
    if RECORD:
        m3, m4 = about(count, m2, m3, m4, mean - middle)
        tile_m3, tile_m4 = about(tile_count, tile_m2, tile_m3, tile_m4, tile_mean - middle)
        m3 += tile_m3
        m4 += tile_m4
    return total, pivot, middle, m2_of_both, m3, m4, least, largest, nonfinite


@triton.jit
def join_lanes(lanes, WIDTH: tl.constexpr, RECORD: tl.constexpr):
    """Joins the lanes of each of WIDTH channels: count, a centre, the mean relative to the centre, and the rest."""
    count, pivot, mean, m2, m3, m4, least, largest, nonfinite = lanes
    LANES: tl.constexpr = mean.numel // WIDTH
    count = tl.reshape(tl.broadcast_to(count, mean.shape), (LANES, WIDTH))
    pivot = tl.reshape(pivot, (LANES, WIDTH))
    mean = tl.reshape(mean, (LANES, WIDTH))
    m2 = tl.reshape(m2, (LANES, WIDTH))
    centre = tl.sum((pivot + mean) * (count / tl.maximum(tl.sum(count, 0), LEAST_COUNT)[None, :]), 0)
    mean = tl.where(count > 0, (pivot - centre[None, :]) + mean, 0.0)
    total, middle, m2_of_all = tl.reduce((count, mean, m2), 0, chan)
    if RECORD:
        m3 = tl.reshape(m3, (LANES, WIDTH))
        m4 = tl.reshape(m4, (LANES, WIDTH))
        m3, m4 = about(count, m2, m3, m4, mean - middle[None, :])
        m3 = tl.sum(m3, 0)
        m4 = tl.sum(m4, 0)
        least = tl.min(tl.reshape(least, (LANES, WIDTH)), 0)
        largest = tl.max(tl.reshape(largest, (LANES, WIDTH)), 0)
        nonfinite = columns_sum(nonfinite.to(tl.int32), WIDTH)
    return total, centre, middle, m2_of_all, m3, m4, least, largest, nonfinite


@triton.jit
def write_moments(parts_ptr, joined, part, channel, channels, valid):
    """Writes the first eight rows of a part of ``records.ACTIVATION``. The mean is not rounded, because rounding would
    change M3."""
    count, centre, mean, m2, m3, m4, least, largest, nonfinite = joined
    mean = centre.to(tl.float64) + mean.to(tl.float64)
    rows = (count, mean, m2, m3, m4, least, largest, nonfinite)
    write_part(parts_ptr, rows, 0, 9, part, channel, channels, valid)


@kernel
def moments_kernel(
    x_ptr, counts_ptr, means_ptr, m2s_ptr, parts_ptr, weights_ptr,
    outer, inner, lines, length, channels, tiles, share, spans, beside,
    ROWS: tl.constexpr, FLAT: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr,
    GROUP: tl.constexpr, OCTETS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """One row of partial (count, mean, M2) for each split and, with ``parts_ptr``, a part of the record.

    With ``weights_ptr`` the count is the sum of the weights. ``parts_ptr`` is then None.
    """
    ACC: tl.constexpr = means_ptr.dtype.element_ty
    RECORD: tl.constexpr = parts_ptr is not None
    first = tl.program_id(1) * share
    WEIGHTED: tl.constexpr = weights_ptr is not None
    lanes = no_moments(ACC, GROUP, ROWS, FLAT, ALIGN, WEIGHTED)
    for t in range(first, tl.minimum(first + share, tiles)):
        xs, valid, weights = (), (), ()
        tile_count = tl.zeros_like(lanes[0])
        for u in tl.static_range(UNROLL):
            line, octet = locate(t, u, spans, beside, ROWS, WIDE, GROUP, OCTETS, UNROLL)
            in_bounds = inside(line, octet, lines, length, channels, ROWS, FLAT, ALIGN)
            pointers = addresses(x_ptr, outer, inner, line, octet, channels, ROWS, FLAT, ALIGN)
            xs += (tl.load(pointers, mask=in_bounds, other=0.0),)
            if not WEIGHTED:
                valid += (in_bounds,)
                tile_count += counted(line, octet, in_bounds, lines, length, ROWS, FLAT, ALIGN).to(ACC)
            else:
                exists = line < lines if ROWS else in_bounds
                weight = load_weights(weights_ptr, line, octet, exists, length, channels, ROWS, FLAT, ALIGN)
                valid += (in_bounds & (weight != 0),)
                weights += (weight,)
                tile_count += weight
        lanes = add_tile(lanes, xs, valid, tile_count, weights if WEIGHTED else xs, UNROLL, RECORD, WEIGHTED)
    WIDTH: tl.constexpr = OCTETS * 8 if ROWS else 1  # channels of a program
    joined = join_lanes(lanes, WIDTH, RECORD)
    count, centre, mean, m2 = joined[0], joined[1], joined[2], joined[3]
    channel = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    offsets = tl.program_id(1) * channels + channel
    tl.store(means_ptr + offsets, centre + mean, mask=channel < channels)
    tl.store(m2s_ptr + offsets, m2, mask=channel < channels)
    if tl.program_id(0) == 0:
        tl.store(counts_ptr + tl.program_id(1), tl.max(count, 0))
    if RECORD:
        part, channel, in_bounds = owned(channels, WIDTH, FLAT)
        write_moments(parts_ptr, joined, part, channel, channels, in_bounds)


def partial_moments(x: Tensor, recording: bool = False, sample_weight: Tensor | None = None) -> tuple[Tensor, ...]:
    """Counts [K], means [K, C] and M2s [K, C] of the K parts into which the partition divides each channel of x.

    If ``recording`` also the parts [K, 9, C] of ``records.ACTIVATION``, without their last row. With
    ``sample_weight`` the counts are sums of weights.
    """
    like = layout(x)
    x = addressed(x, like.rows)
    walk = plan(like, [x], [])
    means, m2s = torch.empty((2, walk.grid[1], like.c), dtype=accumulator(x.dtype), device=x.device)
    counts = means.new_empty(walk.grid[1])
    parts = means.new_empty((walk.grid[1], len(ACTIVATION), like.c), dtype=torch.float64) if recording else None
    launch(
        moments_kernel, walk.grid, x.device, x, counts, means, m2s, parts, sample_weight, *walk.strides, *walk.sizes,
        **walk.constants,
    )  # fmt: skip
    return (counts, means, m2s, parts) if recording else (counts, means, m2s)


def moments(x: Tensor) -> tuple[int, Tensor, Tensor]:
    """Count, mean [C] and M2 [C] of x."""
    if x.numel() == 0:
        zeros = torch.zeros(x.shape[1], dtype=accumulator(x.dtype), device=x.device)
        return layout(x).count, zeros, zeros.clone()
    _, mean, m2 = merge(*partial_moments(x))
    return layout(x).count, mean, m2
