"""The parts of records that the programs of kernels write, and how they are joined into a record.

Parts are float64 tensors [K, rows, C]. They are added in the order of their numbers, in a tree within a block and then
block by block. So the result does not depend on which program ended first. Only the count of values above zero is
added with atomics, on integers.

If possible, additional programs of a kernel that is launched anyway join the parts. In two cases there is no such
kernel, and one of the two small kernels of this file is launched: for ``record`` without batch statistics, and for
``record_gradient``.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..records import GRADIENT
from .common import kernel, launch

PARTS, CHANNELS = 32, 16  # the block that a program adds at a time
# A tally of a channel has the number of values above zero and, from this bit on, the number of parts that were added.
PARTS_BIT = tl.constexpr(40)


# -------------------------------------------------------------------------------- one program's part of a record


@triton.jit
def owned(channels, WIDTH: tl.constexpr, FLAT: tl.constexpr):
    """A program's columns [WIDTH]: their parts, their channels, and whether they exist.

    FLAT: a line is eight rows, so it has eight parts of each channel.
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
    """Adds the lanes [GROUP, 8] of each of a program's columns [WIDTH]."""
    return tl.sum(tl.reshape(values, (values.numel // WIDTH, WIDTH)), 0)


@triton.jit
def tell(tally_ptr, record_ptr, counted, parts, channel, valid):
    """Adds a part to the tallies of its channels, which begin at 0. The program that adds the last part replaces the
    tally with the count.

    The sum of integers does not depend on the order, and a tally shows whether it is complete, so no program waits.
    ``tally_ptr`` and ``record_ptr`` are one row of the record, as int64 and as float64.
    """
    one = tl.full(counted.shape, 1, tl.int64) << PARTS_BIT
    summand = one + counted.to(tl.int64)
    total = tl.atomic_add(tally_ptr + channel, summand, mask=valid, sem="relaxed") + summand
    count = total & (one - 1)
    tl.store(record_ptr + channel, count.to(tl.float64), mask=valid & ((total >> PARTS_BIT) == parts))


# ------------------------------------------------------------------------------------------- all parts of a record


@triton.jit
def about(count, m2, m3, m4, delta):
    """sum d^3 and sum d^4, where d are the distances from a centre that is ``delta`` below the mean.

    m2, m3 and m4 are the sums about the mean. This is the binomial theorem, with sum (d - delta) = 0. The sums of parts
    about the same centre can be added. Source: Pebay, "Formulas for robust, one-pass parallel computation of
    covariances and arbitrary-order statistical moments", 2008.
    """
    squares = delta * delta * count
    third = tl.fma(delta, tl.fma(m2, 3.0, squares), m3)
    return third, tl.fma(delta, tl.fma(delta, tl.fma(m2, 6.0, squares), 4.0 * m3), m4)


@triton.jit
def block(parts_ptr, row, rows, first, parts, channel, channels, PARTS: tl.constexpr):
    """A row of the parts from ``first`` on, [PARTS, CHANNELS]. It is 0 for parts and channels that do not exist."""
    part = (first + tl.arange(0, PARTS))[:, None]
    valid = (part < parts) & (channel < channels)[None, :]
    offsets = (part.to(tl.int64) * rows + row) * channels + channel[None, :]
    return tl.load(parts_ptr + offsets, mask=valid, other=0.0)


@triton.jit
def fold_row(
    parts_ptr, row, rows, record_ptr, to, parts, channel, channels, PARTS: tl.constexpr, CHANNELS: tl.constexpr
):  # fmt: skip
    """Writes row ``to`` of a record, which is the sum of row ``row`` of all parts."""
    total = tl.zeros((CHANNELS,), tl.float64)
    for first in range(0, parts, PARTS):
        total += tl.sum(block(parts_ptr, row, rows, first, parts, channel, channels, PARTS), 0)
    tl.store(record_ptr + to * channels + channel, total, mask=channel < channels)


@triton.jit
def fold_moments(
    parts_ptr, record_ptr, count, parts, channel, channels, PARTS: tl.constexpr, CHANNELS: tl.constexpr
):  # fmt: skip
    """Writes the first eight rows of ``records.ACTIVATION``, about the mean of all ``count`` values."""
    valid = channel < channels
    count = tl.full((CHANNELS,), count, tl.float64)
    mean = tl.zeros((CHANNELS,), tl.float64)
    for first in range(0, parts, PARTS):
        counts = block(parts_ptr, 0, 9, first, parts, channel, channels, PARTS)
        means = block(parts_ptr, 1, 9, first, parts, channel, channels, PARTS)
        mean += tl.sum(counts * means, 0)
    mean /= count
    m2 = tl.zeros((CHANNELS,), tl.float64)
    m3 = tl.zeros((CHANNELS,), tl.float64)
    m4 = tl.zeros((CHANNELS,), tl.float64)
    least = tl.full((CHANNELS,), float("inf"), tl.float64)
    largest = tl.full((CHANNELS,), float("-inf"), tl.float64)
    for first in range(0, parts, PARTS):
        counts = block(parts_ptr, 0, 9, first, parts, channel, channels, PARTS)
        delta = tl.where(counts > 0, block(parts_ptr, 1, 9, first, parts, channel, channels, PARTS) - mean, 0.0)
        m2s = block(parts_ptr, 2, 9, first, parts, channel, channels, PARTS)
        m3s = block(parts_ptr, 3, 9, first, parts, channel, channels, PARTS)
        m4s = block(parts_ptr, 4, 9, first, parts, channel, channels, PARTS)
        m3s, m4s = about(counts, m2s, m3s, m4s, delta)
        m2 += tl.sum(tl.fma(delta * delta, counts, m2s), 0)
        m3 += tl.sum(m3s, 0)
        m4 += tl.sum(m4s, 0)
        leasts = block(parts_ptr, 5, 9, first, parts, channel, channels, PARTS)
        largests = block(parts_ptr, 6, 9, first, parts, channel, channels, PARTS)
        least = tl.minimum(least, tl.min(tl.where(counts > 0, leasts, float("inf")), 0))
        largest = tl.maximum(largest, tl.max(tl.where(counts > 0, largests, float("-inf")), 0))
    write_part(record_ptr, (count, mean, m2, m3, m4, least, largest), 0, 9, 0, channel, channels, valid)
    fold_row(parts_ptr, 7, 9, record_ptr, 7, parts, channel, channels, PARTS, CHANNELS)


@kernel
def activation_kernel(
    parts_ptr, record_ptr, parts, channels, count, PARTS: tl.constexpr, CHANNELS: tl.constexpr
):  # fmt: skip
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    if tl.program_id(1) == 0:
        fold_moments(parts_ptr, record_ptr, count, parts, channel, channels, PARTS, CHANNELS)
    else:
        fold_row(parts_ptr, 8, 9, record_ptr, 8, parts, channel, channels, PARTS, CHANNELS)


def fold_activation(parts: Tensor, record: Tensor, count: int) -> None:
    """Fills ``record`` [9, C] from its parts [K, 9, C], which have ``count`` values per channel together."""
    grid = (triton.cdiv(parts.shape[2], CHANNELS), 2)
    launch(
        activation_kernel, grid, parts.device, parts, record, len(parts), parts.shape[2], count,
        PARTS=PARTS, CHANNELS=CHANNELS,
    )  # fmt: skip


@kernel
def gradient_kernel(
    parts_ptr, record_ptr, parts, channels, count, PARTS: tl.constexpr, CHANNELS: tl.constexpr
):  # fmt: skip
    """Each program writes one row. The count is the same for all channels, and parts do not have it."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    row, rows = tl.program_id(1), tl.num_programs(1)
    if row == 0:
        tl.store(record_ptr + channel, tl.full((CHANNELS,), count, tl.float64), mask=channel < channels)
    else:
        fold_row(parts_ptr, row - 1, rows - 1, record_ptr, row, parts, channel, channels, PARTS, CHANNELS)


def fold_gradient(parts: Tensor, record: Tensor, count: int) -> None:
    """Fills ``record`` [8, C] for ``count`` values per channel, from its parts [K, 7, C], which lack the count."""
    grid = (triton.cdiv(parts.shape[2], CHANNELS), len(GRADIENT))
    launch(
        gradient_kernel, grid, parts.device, parts, record, len(parts), parts.shape[2], count,
        PARTS=PARTS, CHANNELS=CHANNELS,
    )  # fmt: skip
