"""Shared parts of the kernels: the partition of a tensor into tiles, the addresses, the arithmetic and the launch.

Both layouts consist of lines of contiguous elements. In ``rows`` a line is one row with the C channels. In planes it is
the plane of one channel of one sample, with the S positions. Eight neighbours of a line form an octet, which is one
byte of the mask and a whole number of 16-byte vectors. A group is one such vector per thread: GROUP octets, arranged as
lines of OCTETS octets each. A tile has UNROLL groups. They are below each other or, if lines are few and long,
``beside`` each other. All loads of a tile are in flight before the first value is used. Tiles are two-dimensional,
[GROUP, 8], because the compiler then has only one choice of layout: whole vectors for neighbouring threads.

A program computes one channel (planes) or OCTETS * 8 channels (rows) of ``share`` consecutive tiles, so that a few
channels also fill a large GPU. Pointwise kernels have a third layout, for rows that cannot be read as vectors: ``FLAT``
makes all of memory one line, so that mask bytes are whole for any number of channels. If such a kernel also records
sums of each channel, a line is eight rows (``ROWS`` and ``FLAT``). Mask bytes are then whole too, and a lane has the
same channel in all tiles.
"""

import inspect
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import Layout, strides
from ..reference import accumulator

WARPS = 4
GROUP_BYTES = WARPS * 32 * 16
UNROLL = 4
# One stage, because loops without dot products gain nothing from more. Contraction is off: only tl.fma rounds once.
OPTIONS = {"num_warps": WARPS, "num_stages": 1, "enable_fp_fusion": False}
# The desired number of programs: 4 on each of 132 multiprocessors. It is a constant because the partition determines
# the order of summation.
PROGRAMS = 4 * 132
# Larger offsets require 64 bits. The margin is for the idle lanes of the last tile.
INT32_OFFSETS = 2**31 - 2**20

# ------------------------------------------------------------------------------------------------ on the host


def kernel(fn):
    """``triton.jit``, specialised only on dtypes and constants. The constant ALIGN replaces specialisation on integers.

    Flags are integers, because the interpreter does not accept booleans.
    """
    names = [name for name, p in inspect.signature(fn).parameters.items() if p.annotation is not tl.constexpr]
    return triton.jit(fn, do_not_specialize=names, do_not_specialize_on_alignment=names)


def launch(kernel, grid: tuple[int, ...], device: torch.device, *args, **constants) -> None:
    """Launches on the current stream of ``device``."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return launch(kernel, grid, device, *args, **constants)
    kernel[grid](*args, **constants, **OPTIONS)


def channel_vectors(
    x: Tensor, mean: Tensor | None, invstd: Tensor | None, weight: Tensor | None, bias: Tensor | None
) -> tuple[list[Tensor], tuple[int, int, int]]:
    """The arguments mean, invstd, weight and bias of the kernels, and whether statistics, weight and bias are given.

    A vector that is not given is replaced by another one, which is not read. So its absence needs no other kernel.
    """
    present = (int(mean is not None), int(weight is not None), int(bias is not None))
    if mean is None:
        mean = invstd = torch.empty(0, dtype=accumulator(x.dtype), device=x.device)
    if present[1] and present[2] and weight.dtype != bias.dtype:
        weight, bias = weight.float(), bias.float()
    if weight is None:
        weight = mean if bias is None else bias
    vectors = (mean, invstd, weight, weight if bias is None else bias)
    return [vector.contiguous() for vector in vectors], present


class Plan(NamedTuple):
    """The partition of the tensors of a kernel: its grid, and its integer and constant arguments."""

    grid: tuple[int, int]
    strides: list[int]  # outer, inner of each tensor
    sizes: tuple[int, ...]  # lines (rows, if a line is eight rows), length, channels, tiles, share, spans, beside
    constants: dict[str, int | bool]

    @property
    def parts(self) -> int:
        """The number of parts into which the values of a channel are divided."""
        return self.grid[1] * (8 if self.constants["ROWS"] and self.constants["FLAT"] else 1)


def plan(
    like: Layout, tensors: list[Tensor], vectors: list[Tensor], pointwise: bool = False, recording: bool = False
) -> Plan:
    """The plan for ``tensors`` of one shape and dtype in one layout, with per-channel ``vectors``.

    ``pointwise``: the kernel reduces no channel, except for a record if ``recording``.

    ALIGN is 8 or 4 if every address, stride and line length is a multiple of that many elements, else 1. ``length``
    and the strides are passed in units of ALIGN, from which the compiler infers that it can vectorise.
    """
    lines, length = (like.count, like.c) if like.rows else (like.n, like.s)
    itemsize = tensors[0].element_size()
    pairs = [strides(t, like.rows) for t in tensors]
    step = length  # the bitwise or of length and strides, whose lowest set bit is the least of theirs
    for outer, inner in pairs:
        step |= outer if like.rows else outer | inner
    pointer = 0
    for t in tensors + vectors if like.rows else tensors:
        pointer |= t.data_ptr()
    align = 1
    for candidate in (8,) if like.rows else (4, 8):
        if step % candidate == 0 and pointer % min(16, candidate * itemsize) == 0:
            align = candidate
    flat = pointwise and like.rows and align == 1
    reach = max((lines - 1) * outer + (like.c - 1) * inner + length for outer, inner in pairs)
    wide = max(reach, lines * length) > INT32_OFFSETS
    octuple = flat and recording  # a line is eight rows
    rows = like.rows and (octuple or not flat)
    if flat:
        lines, length = (-(-lines // 8), length * 8) if octuple else (1, lines * length)
    # If elements are loaded one by one (ALIGN 1), a thread has eight loads in flight with a single group.
    unroll = UNROLL if align > 1 else UNROLL // 2 if octuple or not flat else 1
    if pointwise and recording:
        unroll = max(unroll // 2, 1)  # a record takes registers, and results do not depend on the tiles
    if itemsize == 8:
        unroll = max(unroll // 2, 1)  # float64 would spill on sm_100 with four groups in flight
    grid, tiling, group, octets = partition(rows, flat and not octuple, lines, length, like.c, itemsize, unroll)
    scaled = [stride // align for pair in pairs for stride in pair]
    constants = dict(ROWS=rows, FLAT=flat, ALIGN=align, WIDE=wide, GROUP=group, OCTETS=octets, UNROLL=unroll)
    return Plan(grid, scaled, (like.count if octuple else lines, length // align, like.c, *tiling), constants)


@lru_cache(maxsize=4096)
def partition(
    rows: bool, flat: bool, lines: int, length: int, channels: int, itemsize: int, unroll: int
) -> tuple[tuple[int, int], tuple[int, int, int, int], int, int]:
    """(units, splits) of the grid, (tiles, share, spans, beside), GROUP and OCTETS. They depend on these sizes only.

    In planes a line of a tile has 512 elements, or 64 if this leaves fewer lanes idle, or 16 if planes are tiny. In
    rows it has 64 channels, or 32 or 16 if there are no more, so that no sector is read twice.
    """
    group = GROUP_BYTES // itemsize // 8
    if flat:
        shapes = [(group, 1)]
    elif rows:
        shapes = [(2 if length <= 16 else 4 if length <= 32 else 8, 0)]
    else:
        shapes = [(octets, beside) for octets in ((64, 8) if length > 16 else (2,)) for beside in (0, 1)]

    def tiles_of(octets: int, beside: int) -> tuple[int, int, int]:
        """The number of tiles down the lines, of spans along the lines, and of lanes in all these tiles."""
        below, across = (1, unroll) if beside else (unroll, 1)
        tall, broad = below * group // octets, across * octets * 8
        down, spans = -(-lines // tall), -(-length // broad)
        return down, spans, down * tall * spans * broad

    octets, beside = min(((min(o, group), b) for o, b in shapes), key=lambda shape: tiles_of(*shape)[2])
    down, spans, _ = tiles_of(octets, beside)
    units, tiles, spans = (spans, down, 1) if rows else (1 if flat else channels, down * spans, spans)
    share = -(-tiles // max(1, min(PROGRAMS // units, tiles)))
    return (units, -(-tiles // share)), (tiles, share, spans, beside), group, octets


# ---------------------------------------------------------------------------------------------- on the device


@triton.jit
def locate(
    t, u, spans, beside,
    ROWS: tl.constexpr, WIDE: tl.constexpr, GROUP: tl.constexpr, OCTETS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Line and octet, each [GROUP, 1], of the octets of group ``u`` in tile ``t``."""
    if WIDE:
        spans = spans.to(tl.int64)
    below = (t // spans) * (UNROLL - beside * (UNROLL - 1)) + u * (1 - beside)
    across = (t % spans) * (1 + beside * (UNROLL - 1)) + u * beside
    if ROWS:
        across = tl.program_id(0)
    octets = tl.arange(0, GROUP)[:, None]
    return below * (GROUP // OCTETS) + octets // OCTETS, across * OCTETS + octets % OCTETS


@triton.jit
def position(octet):
    """The position in its line, [GROUP, 8], of each element of the octets."""
    return octet * 8 + tl.arange(0, 8)[None, :]


@triton.jit
def inside(line, octet, lines, length, channels, ROWS: tl.constexpr, FLAT: tl.constexpr, ALIGN: tl.constexpr):
    """Whether each element of the octets, [GROUP, 8], belongs to the tensor."""
    if ROWS and FLAT:
        line = line * 8 + position(octet) // channels
    return (line < lines) & (position(octet) < length * ALIGN)


@triton.jit
def channel_of(octet, length, channels, ROWS: tl.constexpr, FLAT: tl.constexpr, ALIGN: tl.constexpr):
    """The channel of each element, [GROUP, 8], and whether it exists. In planes all elements have one channel."""
    if ROWS or FLAT:
        coord = position(octet)
        return coord % channels if FLAT else coord, coord < length * ALIGN
    else:
        return tl.program_id(0), True


@triton.jit
def addresses(
    ptr, outer, inner, line, octet, channels, ROWS: tl.constexpr, FLAT: tl.constexpr, ALIGN: tl.constexpr
):  # fmt: skip
    """The addresses of the elements [GROUP, 8]. Strides are in units of ALIGN."""
    coord = position(octet)
    if ROWS and FLAT:
        offsets = (line * 8 + coord // channels) * outer + coord % channels
    elif FLAT:
        offsets = coord // channels * outer + coord % channels
    elif ROWS:
        offsets = line * outer * ALIGN + coord
    else:
        offsets = line * outer * ALIGN + tl.program_id(0).to(line.dtype) * inner * ALIGN + coord
    BYTES: tl.constexpr = ALIGN * ptr.dtype.element_ty.primitive_bitwidth // 8
    return tl.multiple_of(ptr + offsets, (1, 16 if BYTES > 16 else BYTES))


@triton.jit
def load_weights(
    weights_ptr, line, octet, valid, length, channels, ROWS: tl.constexpr, FLAT: tl.constexpr, ALIGN: tl.constexpr
):  # fmt: skip
    """The weights (``sample_weight``, [N * S]) of the elements, or 0 where not ``valid``.

    They have the shape of ``valid``: [GROUP, 1] if a line is a single row, otherwise [GROUP, 8].
    """
    coord = position(octet)
    if ROWS and FLAT:
        index = line * 8 + coord // channels
    elif FLAT:
        index = coord // channels
    elif ROWS:
        index = line
    else:
        index = line * (length * ALIGN) + coord
    return tl.load(weights_ptr + index, mask=valid, other=0.0)


@triton.jit
def mask_addresses(
    mask_ptr, line, octet, lines, length, channels, ROWS: tl.constexpr, FLAT: tl.constexpr, ALIGN: tl.constexpr
):  # fmt: skip
    """The addresses of the mask bytes [GROUP, 1] of the octets, and whether they are in bounds.

    If a line is a single row, ALIGN must be 8.
    """
    octets = (length * ALIGN + 7) // 8
    if ROWS and FLAT:
        in_bounds = (octet < octets) & (line * 8 + octet * 8 // channels < lines)
        return mask_ptr + (line * octets + octet), in_bounds
    else:
        if not (ROWS or FLAT):
            line = line * channels + tl.program_id(0)
        return mask_ptr + (line * octets + octet), octet < octets


@triton.jit
def per_channel(ptr, present, default, channel, valid, ROWS: tl.constexpr, ALIGN: tl.constexpr):
    """The values of a per-channel vector at ``channel``, or ``default`` if the vector is not ``present``."""
    pointers = ptr + channel
    if ROWS and ALIGN == 8:
        pointers = tl.multiple_of(pointers, (1, 16))
    return tl.load(pointers, mask=valid & (present != 0), other=default)


@triton.jit
def affine(vectors, present, channel, valid, ROWS: tl.constexpr, ALIGN: tl.constexpr):
    """mean, invstd, weight and bias at ``channel``, or 0, 1, 1 and 0 if they are not given."""
    mean = per_channel(vectors[0], present[0], 0.0, channel, valid, ROWS, ALIGN)
    invstd = per_channel(vectors[1], present[0], 1.0, channel, valid, ROWS, ALIGN)
    weight = per_channel(vectors[2], present[1], 1.0, channel, valid, ROWS, ALIGN).to(mean.dtype)
    bias = per_channel(vectors[3], present[2], 0.0, channel, valid, ROWS, ALIGN).to(mean.dtype)
    return mean, invstd, weight, bias


@triton.jit
def activate(value, below, act):
    """z, or a gradient at z, after the activation with the code ``act``. ``below``: act is not 0, and z <= 0."""
    return tl.where(below, 0.0, value)  # ReLU, the only activation


@triton.jit
def gated(
    dy, xhat, weight, bias, mask_ptr, act, line, octet, lines, length, channels, valid, STORED: tl.constexpr,
    ROWS: tl.constexpr, FLAT: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """g, the gradient before the activation, from the saved mask, or from z, recomputed as in the forward."""
    if mask_ptr is None:
        below = (act != 0) & (tl.fma(xhat, weight, bias).to(STORED).to(xhat.dtype) <= 0)
    elif ROWS and not FLAT and ALIGN < 8:  # an octet of the mask may begin anywhere in a row
        bit = line * channels + position(octet)
        byte = tl.load(mask_ptr + bit // 8, mask=valid, other=0)
        below = ((byte >> (bit % 8).to(tl.uint8)) & 1) == 0
    else:
        pointers, in_bounds = mask_addresses(mask_ptr, line, octet, lines, length, channels, ROWS, FLAT, ALIGN)
        byte = tl.load(pointers, mask=(line < lines) & in_bounds, other=0)
        below = ((byte >> tl.arange(0, 8)[None, :].to(tl.uint8)) & 1) == 0
    return activate(dy, below, act)
