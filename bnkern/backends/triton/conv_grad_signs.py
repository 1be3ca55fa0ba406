"""``conv_grad_signs``: a convolution's weight gradient, and the absolute, sign and nonzero sums of its summands.

It is an implicit matrix product of columns (one per weight of an output channel) and output channels, summed over
positions (images and output positions). A program computes BLOCK_N columns of BLOCK_M outputs for a run of ``share``
blocks of positions. Each block of x and dy is loaded once and is used for every requested sum. ``fold_kernel`` adds the
runs' partial results in order. The order of summation does not depend on which sums are requested, so the gradient has
the same bits alone and with the others.

Sums have the accumulator's dtype. For float16 and bfloat16 tensor cores compute the products. For float32 and float64
they are in full precision (fused multiply-adds, or float64 on tensor cores if the compiler supports it). Signs and
counts are int8 products with int32 accumulators, which are exact.

docs/design.md says which kernels have run on hardware.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import addressed, layout, strides
from ..reference import accumulator
from .common import INT32_OFFSETS, PROGRAMS, kernel, launch

PARTS, ELEMENTS = 64, 32  # the block that a program of fold_kernel adds at a time


@kernel
def conv_grad_signs_kernel(
    x_ptr, dy_ptr, sum_ptr, abs_sum_ptr, sign_sum_ptr, nonzero_ptr,
    x_outer, x_inner, dy_outer, dy_inner, inputs, height, width, outputs, out_height, out_width, positions,
    kernel_height, kernel_width, stride_height, stride_width, padding_height, padding_width,
    step_n, step_h, step_w, share,
    ROWS: tl.constexpr, X_VECTOR: tl.constexpr, DY_VECTOR: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One row of partial sums [outputs, columns] for each split. A sum whose pointer is None is not computed.

    Blocks are loaded with their contiguous axis last: [K, channels] in rows, [channels, K] in planes.
    """
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    offsets = kernel_height * kernel_width
    columns = inputs * offsets
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    output = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    if ROWS:
        i, offset = column % inputs, column // inputs
    else:
        i, offset = column // offsets, column % offsets
    p, q = offset // kernel_width, offset % kernel_width
    # Idle columns get a row below the image, so that one comparison masks both the padding and idle columns.
    below = tl.where(column < columns, p, height + padding_height)
    first = tl.program_id(2)
    if WIDE:
        first, output, i, p = first.to(tl.int64), output.to(tl.int64), i.to(tl.int64), p.to(tl.int64)
    first *= share * BLOCK_K
    last = tl.minimum(first + share * BLOCK_K, positions)
    # A position (n, h, w) is a number with three digits, and each step adds BLOCK_K. So the loop needs no division.
    coord = first + tl.arange(0, BLOCK_K)
    n = coord // (out_height * out_width)
    h = (coord // out_width % out_height).to(tl.int32)
    w = (coord % out_width).to(tl.int32)
    total = tl.zeros((BLOCK_N, BLOCK_M), ACC)
    abs_total = tl.zeros((BLOCK_N, BLOCK_M), ACC)
    sign_total = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
    nonzero_total = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
    for _ in range(first, last, BLOCK_K):
        top, left = h * stride_height - padding_height, w * stride_width - padding_width
        corner = (n * height + top) * width + left if ROWS else n * x_outer + top * width + left
        top = tl.where(coord < last, top, height)
        if ROWS:
            dy_offsets = (coord * dy_outer)[:, None] + output[None, :]
            in_run, in_outputs = (coord < last)[:, None], (output < outputs)[None, :]
            x_offsets = (corner * x_outer)[:, None] + ((p * width + q) * x_outer + i)[None, :]
            row, col = top[:, None] + below[None, :], left[:, None] + q[None, :]
        else:
            dy_offsets = (n * dy_outer + h * out_width + w)[None, :] + (output * dy_inner)[:, None]
            in_run, in_outputs = (coord < last)[None, :], (output < outputs)[:, None]
            x_offsets = corner[None, :] + (i * x_inner + p * width + q)[:, None]
            row, col = top[None, :] + below[:, None], left[None, :] + q[:, None]
        # As unsigned numbers, negative coordinates are larger than any size.
        in_height, in_width = row.to(tl.uint32) < height.to(tl.uint32), col.to(tl.uint32) < width.to(tl.uint32)
        x = load(x_ptr, x_offsets, in_height, in_width, X_VECTOR)
        dy = load(dy_ptr, dy_offsets, in_run, in_outputs, DY_VECTOR)
        if ROWS:
            x = tl.trans(x)
        else:
            dy = tl.trans(dy)
        # Counts come first, because registers do not spill in this order.
        if sign_sum_ptr is not None:
            sign_total = tl.dot(sign(x), sign(dy), sign_total, out_dtype=tl.int32)
        if nonzero_ptr is not None:
            nonzero_total = tl.dot(nonzero(x), nonzero(dy), nonzero_total, out_dtype=tl.int32)
        if sum_ptr is not None:
            total = tl.dot(x, dy, total, input_precision="ieee", out_dtype=ACC)
        if abs_sum_ptr is not None:
            abs_total = tl.dot(magnitude(x), magnitude(dy), abs_total, input_precision="ieee", out_dtype=ACC)
        coord += BLOCK_K
        w += step_w
        h += step_h + (w >= out_width).to(tl.int32)
        w = tl.where(w >= out_width, w - out_width, w)
        n += step_n + (h >= out_height).to(tl.int32)
        h = tl.where(h >= out_height, h - out_height, h)
    result_offsets = (tl.program_id(2) * outputs + output)[None, :].to(tl.int64) * columns + column[:, None]
    valid = (output < outputs)[None, :] & (column < columns)[:, None]
    if sum_ptr is not None:
        tl.store(sum_ptr + result_offsets, total, mask=valid)
    if abs_sum_ptr is not None:
        tl.store(abs_sum_ptr + result_offsets, abs_total, mask=valid)
    if sign_sum_ptr is not None:
        tl.store(sign_sum_ptr + result_offsets, sign_total, mask=valid)
    if nonzero_ptr is not None:
        tl.store(nonzero_ptr + result_offsets, nonzero_total, mask=valid)


@triton.jit
def load(ptr, offsets, valid, in_bounds, VECTOR: tl.constexpr):
    """The values at these offsets, or zero where not ``valid & in_bounds``. VECTOR adjacent elements of the last axis
    are contiguous, aligned to 16 bytes, and all valid or all invalid. (Hints apply only to values computed here.)"""
    pointers, valid = ptr + offsets, valid & in_bounds
    if VECTOR > 1:
        pointers = tl.multiple_of(tl.max_contiguous(pointers, (1, VECTOR)), (1, 16))
        valid = tl.max_constancy(valid, (1, VECTOR))
    return tl.load(pointers, mask=valid, other=0.0)


@triton.jit
def widened(v):
    """float16 and bfloat16 as float32. The interpreter has no bfloat16 arithmetic, and on a GPU both cost the same."""
    return v if v.dtype == tl.float64 else v.to(tl.float32)


@triton.jit
def magnitude(v):
    return tl.abs(widened(v)).to(v.dtype)


@triton.jit
def sign(v):
    """-1, 0 or 1 as int8. It is 0 for NaN."""
    wide = widened(v)
    return tl.where(wide > 0, 1, tl.where(wide < 0, -1, 0)).to(tl.int8)


@triton.jit
def nonzero(v):
    """0 or 1 as int8. It is 1 for NaN."""
    return (widened(v) != 0).to(tl.int8)


@kernel
def fold_kernel(
    sums_ptr, abs_sums_ptr, sign_sums_ptr, nonzeros_ptr, sum_ptr, abs_sum_ptr, sign_sum_ptr, nonzero_ptr,
    parts, size, PARTS: tl.constexpr, ELEMENTS: tl.constexpr,
):  # fmt: skip
    """Adds the parts [parts, size] of each sum in order: a tree within a block, and the blocks one by one."""
    if sums_ptr is not None:
        fold(0, sums_ptr, sum_ptr, parts, size, PARTS, ELEMENTS)
    if abs_sums_ptr is not None:
        fold(1, abs_sums_ptr, abs_sum_ptr, parts, size, PARTS, ELEMENTS)
    if sign_sums_ptr is not None:
        fold(2, sign_sums_ptr, sign_sum_ptr, parts, size, PARTS, ELEMENTS)
    if nonzeros_ptr is not None:
        fold(3, nonzeros_ptr, nonzero_ptr, parts, size, PARTS, ELEMENTS)


@triton.jit
def fold(which, parts_ptr, total_ptr, parts, size, PARTS: tl.constexpr, ELEMENTS: tl.constexpr):
    """Adds the parts of sum number ``which``, in the programs with this number."""
    if tl.program_id(1) == which:
        element = tl.program_id(0) * ELEMENTS + tl.arange(0, ELEMENTS)
        total = tl.zeros((ELEMENTS,), total_ptr.dtype.element_ty)
        for first in range(0, parts, PARTS):
            part = (first + tl.arange(0, PARTS))[:, None]
            valid = (part < parts) & (element < size)[None, :]
            total += tl.sum(tl.load(parts_ptr + part.to(tl.int64) * size + element[None, :], mask=valid, other=0), 0)
        tl.store(total_ptr + element, total, mask=element < size)


class Blocks(NamedTuple):
    """The numbers of outputs, columns and positions that a program computes at a time."""

    m: int
    n: int
    k: int


def blocks(by_channels: bool, itemsize: int, outputs: int) -> Blocks:
    """The largest blocks whose operands, addresses and four accumulators fit into the registers of every GPU.

    x needs few addresses if it is read ``by_channels``, eight channels at once. float16 and bfloat16 use 32 positions
    at a time and not 64. With 64 positions, abs_sum computed together with sum was wrong by a fifth, and differed
    between runs, on an H200 with triton 3.6.0. Either of the two alone was right. The cause is not known.
    """
    if itemsize > 2:
        return Blocks(16, (64 if by_channels else 32) * 4 // itemsize, 32)
    return Blocks(16 if outputs <= 16 else 32, 64, 32)


@lru_cache(maxsize=4096)
def partition(block: Blocks, outputs: int, columns: int, positions: int, programs: int) -> tuple[tuple[int, ...], int]:
    """The grid (blocks of columns, blocks of outputs, splits) and the number of blocks of positions in a split."""
    units = triton.cdiv(columns, block.n), triton.cdiv(outputs, block.m)
    run = triton.cdiv(positions, block.k)
    share = triton.cdiv(run, max(1, min(programs // (units[0] * units[1]), run)))
    return (*units, triton.cdiv(run, share)), share


def conv_grad_signs(
    x: Tensor,
    dy: Tensor,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    wanted: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """sum, abs_sum, sign_sum and nonzero, each [O, I, *kernel_size], as ``reference.conv_grad_signs``, in two launches.

    Results have the memory format of x. A dy in the other format, and tensors that are dense in neither format, are
    copied first. In planes (NCHW) the elements of x are loaded one by one, because a kernel's offset breaks the
    alignment to 16 bytes. 1 x 1 kernels have no offset.
    """
    like, acc = layout(x), accumulator(x.dtype)
    (_, inputs, height, width), (outputs, *out_size) = x.shape, dy.shape[1:]
    plane, offsets = out_size[0] * out_size[1], kernel_size[0] * kernel_size[1]
    positions, columns = dy.shape[0] * plane, inputs * offsets
    shape = (outputs, *kernel_size, inputs) if like.rows else (outputs, inputs, *kernel_size)
    dtypes = [dtype if want else None for dtype, want in zip((acc, acc, torch.int32, torch.int32), wanted, strict=True)]

    def results(make, *leading: int) -> list[Tensor | None]:
        return [make(*leading, *shape, dtype=dtype, device=x.device) if dtype else None for dtype in dtypes]

    def in_format(results: list[Tensor | None]) -> tuple[Tensor | None, ...]:
        return tuple(t.permute(0, 3, 1, 2) if like.rows and t is not None else t for t in results)

    if x.numel() == 0 or dy.numel() == 0:
        return in_format(results(torch.zeros))
    if not any(wanted):
        return (None,) * 4
    x, dy = addressed(x, like.rows), addressed(dy, like.rows)
    same_positions = kernel_size == (1, 1) and stride == (1, 1) and padding == (0, 0)
    # In planes registers would spill for types of more than 2 bytes.
    x_vector = vector(x, like.rows) if like.rows or (same_positions and x.element_size() == 2) else 1
    block = blocks(like.rows and x_vector > 1, x.element_size(), outputs)
    grid, share = partition(block, outputs, columns, positions, PROGRAMS)
    wide = max(reach(x, like.rows), reach(dy, like.rows), positions + share * block.k) > INT32_OFFSETS
    parts = results(torch.empty, grid[2])
    launch(
        conv_grad_signs_kernel, grid, x.device, x, dy, *parts, *strides(x, like.rows), *strides(dy, like.rows),
        inputs, height, width, outputs, *out_size, positions, *kernel_size, *stride, *padding,
        block.k // plane, block.k // out_size[1] % out_size[0], block.k % out_size[1], share,
        ROWS=like.rows, X_VECTOR=x_vector, DY_VECTOR=vector(dy, like.rows),
        WIDE=wide, BLOCK_M=block.m, BLOCK_N=block.n, BLOCK_K=block.k,
    )  # fmt: skip
    if grid[2] == 1:
        return in_format([part[0] if part is not None else None for part in parts])
    totals = results(torch.empty)
    size = outputs * columns
    launch(
        fold_kernel, (triton.cdiv(size, ELEMENTS), 4), x.device, *parts, *totals, grid[2], size,
        PARTS=PARTS, ELEMENTS=ELEMENTS,
    )  # fmt: skip
    return in_format(totals)


def vector(t: Tensor, rows: bool) -> int:
    """8 if every group of eight elements is aligned to 16 bytes, otherwise 1."""
    outer, inner = strides(t, rows)
    step = outer | t.shape[1] if rows else outer | inner | t.shape[2] * t.shape[3]
    return 8 if step % 8 == 0 and t.data_ptr() % 16 == 0 else 1


def reach(t: Tensor, rows: bool) -> int:
    """The largest offset of an element of ``t``, plus one."""
    n, c, height, width = t.shape
    outer, inner = strides(t, rows)
    if rows:
        return (n * height * width - 1) * outer + c
    return (n - 1) * outer + (c - 1) * inner + height * width
