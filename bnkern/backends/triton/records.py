"""What the kernels record: how the parts that their programs write are joined into a record.

Parts are float64 tensors [K, rows, C]. They are added in the order of their numbers, a tree over each block, the
blocks one by one, so that nothing depends on which program ended first. Only the count of what is above zero is
added by atomics, on integers.

The fold of a record runs in a kernel that is launched anyway, as programs beside those that do its work; where none
is, in one of two small ones here: one more launch for ``record`` without batch statistics, one for
``record_gradient``.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..records import GRADIENT
from .common import kernel, launch

PARTS, CHANNELS = 32, 16  # the block that a program adds at a time
# A tally of a channel: how many values are above zero and, from this bit on, how many parts have told theirs.
TOLD = tl.constexpr(40)


# -------------------------------------------------------------------------------- one program's part of a record


@triton.jit
def owned(channels, WIDTH: tl.constexpr, FLAT: tl.constexpr):
    """A program's columns [WIDTH]: the parts that they are, their channels, and which exist.

    FLAT: a line is eight rows, and so holds eight parts of each channel.
    """
    column = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    if FLAT:
        return tl.program_id(1) * 8 + column // channels, column % channels, column < 8 * channels
    else:
        return tl.program_id(1) + tl.zeros_like(column), column, column < channels


@triton.jit
def write_part(parts_ptr, values, first, rows, part, channel, channels, valid):
    """Writes ``values``, a tuple of [WIDTH], as the rows of a part from ``first`` on."""
    pointers = parts_ptr + ((part * rows + first) * channels + channel)
    for i in tl.static_range(len(values)):
        tl.store(pointers + i * channels, values[i].to(tl.float64), mask=valid)


@triton.jit
def columns_sum(values, WIDTH: tl.constexpr):
    """The lanes [GROUP, 8] of each of a program's columns [WIDTH], added."""
    return tl.sum(tl.reshape(values, (values.numel // WIDTH, WIDTH)), 0)


@triton.jit
def tell(tally_ptr, record_ptr, counted, parts, channel, valid):
    """Adds a part to its channels' tallies, which begin at 0; whoever completes one writes the count in its place.

    Integers make the same sum in any order, and the sum itself says when it is complete, so nothing is waited for.
    ``tally_ptr`` and ``record_ptr`` are one row of the record, as int64 and as float64.
    """
    one = tl.full(counted.shape, 1, tl.int64) << TOLD
    told = one + counted.to(tl.int64)
    total = tl.atomic_add(tally_ptr + channel, told, mask=valid, sem="relaxed") + told
    count = total & (one - 1)
    tl.store(record_ptr + channel, count.to(tl.float64), mask=valid & ((total >> TOLD) == parts))


# ------------------------------------------------------------------------------------------- all parts of a record


@triton.jit
def about(count, m2, m3, m4, delta):
    """sum d^3 and sum d^4, d being the distances from a centre that lies ``delta`` below the mean.

    m2, m3 and m4 are the same sums about the mean. The binomial theorem, with sum (d - delta) = 0: parts brought to
    one centre just add. Source: Pebay, "Formulas for robust, one-pass parallel computation of covariances and
    arbitrary-order statistical moments", 2008.
    """
    squares = delta * delta * count
    third = tl.fma(delta, tl.fma(m2, 3.0, squares), m3)
    return third, tl.fma(delta, tl.fma(delta, tl.fma(m2, 6.0, squares), 4.0 * m3), m4)


@triton.jit
def block(parts_ptr, row, rows, first, parts, channel, channels, PARTS: tl.constexpr):
    """A row [PARTS, CHANNELS] of the parts from ``first`` on; 0 where there is none."""
    part = (first + tl.arange(0, PARTS))[:, None]
    valid = (part < parts) & (channel < channels)[None, :]
    offsets = (part.to(tl.int64) * rows + row) * channels + channel[None, :]
    return tl.load(parts_ptr + offsets, mask=valid, other=0.0)


@triton.jit
def fold_row(
    parts_ptr, row, rows, record_ptr, to, parts, channel, channels, PARTS: tl.constexpr, CHANNELS: tl.constexpr
):  # fmt: skip
    """Row ``to`` of a record: row ``row`` of all parts, added."""
    total = tl.zeros((CHANNELS,), tl.float64)
    for first in range(0, parts, PARTS):
        total += tl.sum(block(parts_ptr, row, rows, first, parts, channel, channels, PARTS), 0)
    tl.store(record_ptr + to * channels + channel, total, mask=channel < channels)


@triton.jit
def fold_moments(
    parts_ptr, record_ptr, count, parts, channel, channels, PARTS: tl.constexpr, CHANNELS: tl.constexpr
):  # fmt: skip
    """The first seven rows of ``records.ACTIVATION``: parts brought to the mean of all ``count`` values."""
    valid = channel < channels
    count = tl.full((CHANNELS,), count, tl.float64)
    mean = tl.zeros((CHANNELS,), tl.float64)
    for first in range(0, parts, PARTS):
        counts = block(parts_ptr, 0, 8, first, parts, channel, channels, PARTS)
        means = block(parts_ptr, 1, 8, first, parts, channel, channels, PARTS)
        mean += tl.sum(counts * means, 0)
    mean /= count
    m2 = tl.zeros((CHANNELS,), tl.float64)
    m3 = tl.zeros((CHANNELS,), tl.float64)
    m4 = tl.zeros((CHANNELS,), tl.float64)
    least = tl.full((CHANNELS,), float("inf"), tl.float64)
    largest = tl.full((CHANNELS,), float("-inf"), tl.float64)
    for first in range(0, parts, PARTS):
        counts = block(parts_ptr, 0, 8, first, parts, channel, channels, PARTS)
        delta = tl.where(counts > 0, block(parts_ptr, 1, 8, first, parts, channel, channels, PARTS) - mean, 0.0)
        m2s = block(parts_ptr, 2, 8, first, parts, channel, channels, PARTS)
        m3s = block(parts_ptr, 3, 8, first, parts, channel, channels, PARTS)
        m4s = block(parts_ptr, 4, 8, first, parts, channel, channels, PARTS)
        m3s, m4s = about(counts, m2s, m3s, m4s, delta)
        m2 += tl.sum(tl.fma(delta * delta, counts, m2s), 0)
        m3 += tl.sum(m3s, 0)
        m4 += tl.sum(m4s, 0)
        leasts = block(parts_ptr, 5, 8, first, parts, channel, channels, PARTS)
        largests = block(parts_ptr, 6, 8, first, parts, channel, channels, PARTS)
        least = tl.minimum(least, tl.min(tl.where(counts > 0, leasts, float("inf")), 0))
        largest = tl.maximum(largest, tl.max(tl.where(counts > 0, largests, float("-inf")), 0))
    write_part(record_ptr, (count, mean, m2, m3, m4, least, largest), 0, 8, 0, channel, channels, valid)


@kernel
def activation_kernel(
    parts_ptr, record_ptr, parts, channels, count, PARTS: tl.constexpr, CHANNELS: tl.constexpr
):  # fmt: skip
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    if tl.program_id(1) == 0:
        fold_moments(parts_ptr, record_ptr, count, parts, channel, channels, PARTS, CHANNELS)
    else:
        fold_row(parts_ptr, 7, 8, record_ptr, 7, parts, channel, channels, PARTS, CHANNELS)


def fold_activation(parts: Tensor, record: Tensor, count: int) -> None:
    """``record`` [8, C] of its parts [K, 8, C], of ``count`` values per channel together."""
    grid = (triton.cdiv(parts.shape[2], CHANNELS), 2)
    launch(
        activation_kernel, grid, parts.device, parts, record, len(parts), parts.shape[2], count,
        PARTS=PARTS, CHANNELS=CHANNELS,
    )  # fmt: skip


@kernel
def gradient_kernel(
    parts_ptr, record_ptr, parts, channels, count, PARTS: tl.constexpr, CHANNELS: tl.constexpr
):  # fmt: skip
    """A row per program; that of the count is the same everywhere, and not in the parts."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    row, rows = tl.program_id(1), tl.num_programs(1)
    if row == 0:
        tl.store(record_ptr + channel, tl.full((CHANNELS,), count, tl.float64), mask=channel < channels)
    else:
        fold_row(parts_ptr, row - 1, rows - 1, record_ptr, row, parts, channel, channels, PARTS, CHANNELS)


def fold_gradient(parts: Tensor, record: Tensor, count: int) -> None:
    """``record`` [7, C] of ``count`` values per channel, from its parts [K, 6, C]: all rows but the count."""
    grid = (triton.cdiv(parts.shape[2], CHANNELS), len(GRADIENT))
    launch(
        gradient_kernel, grid, parts.device, parts, record, len(parts), parts.shape[2], count,
        PARTS=PARTS, CHANNELS=CHANNELS,
    )  # fmt: skip
