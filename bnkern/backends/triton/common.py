"""What the kernels share: how a tensor is cut into tiles, how a tile is addressed, the arithmetic, the launch.

Both layouts are lines of contiguous elements: in ``rows`` a line is one row and holds the C channels, in planes it
is one sample's plane of one channel and holds the S positions. Eight neighbours of a line form an octet: one byte
of the mask, and whole 16-byte vectors. A group is one such vector per thread: GROUP octets, arranged as lines
of OCTETS octets each. A tile is UNROLL groups, one below the other or, where lines are few and long, ``beside``
each other; their loads are all in flight before the first value is used. Tiles are two-dimensional, [GROUP, 8],
because the compiler then has one choice of layout only: whole vectors to neighbouring threads.

A program owns one channel (planes) or OCTETS * 8 channels (rows) and ``share`` consecutive tiles of them, so that
a few channels still fill a large GPU. Kernels that work element by element have a third way to see rows where they
cannot be read by vectors: ``FLAT``, all of memory as one line, so that any number of channels packs its mask bytes.
Where they record sums of each channel as well, a line is eight rows (``ROWS`` and ``FLAT``): whole mask bytes again,
and a lane stays with its channel.
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
# One stage, since loops without dot products gain nothing from more; contraction off: only tl.fma rounds once.
OPTIONS = {"num_warps": WARPS, "num_stages": 1, "enable_fp_fusion": False}
# Programs wanted: 4 on each of 132 multiprocessors. A constant, since the partition fixes the order of summation.
PROGRAMS = 4 * 132
# Offsets beyond this take 64 bits; the margin is for the idle lanes of the last tile.
INT32_OFFSETS = 2**31 - 2**20

# ------------------------------------------------------------------------------------------------ on the host


def kernel(fn):
    """``triton.jit``, specialised on dtypes and constants alone: ALIGN says all that is worth knowing of integers.

    Flags are integers, since the interpreter takes no booleans.
    """
    names = [name for name, p in inspect.signature(fn).parameters.items() if p.annotation is not tl.constexpr]
    return triton.jit(fn, do_not_specialize=names, do_not_specialize_on_alignment=names)


def launch(kernel, grid: tuple[int, ...], device: torch.device, *args, **constants) -> None:
    """Launch on the current stream of ``device``."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return launch(kernel, grid, device, *args, **constants)
    kernel[grid](*args, **constants, **OPTIONS)


def channel_vectors(
    x: Tensor, mean: Tensor | None, invstd: Tensor | None, weight: Tensor | None, bias: Tensor | None
) -> tuple[list[Tensor], tuple[int, int, int]]:
    """mean, invstd, weight and bias as the kernels take them, and whether statistics, weight and bias are given.

    One that is not given is never read; another stands in for it, so that no kernel is compiled for its absence.
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
    """How a kernel walks its tensors: its grid, and the integers and constants it takes."""

    grid: tuple[int, int]
    strides: list[int]  # outer, inner of each tensor
    sizes: tuple[int, ...]  # lines (single rows, where one is eight), length, channels, tiles, share, spans, beside
    constants: dict[str, int | bool]

    @property
    def parts(self) -> int:
        """Into how many parts the values of a channel are cut."""
        return self.grid[1] * (8 if self.constants["ROWS"] and self.constants["FLAT"] else 1)


def plan(
    like: Layout, tensors: list[Tensor], vectors: list[Tensor], pointwise: bool = False, recording: bool = False
) -> Plan:
    """The plan for ``tensors`` of one shape and dtype in one layout, with per-channel ``vectors``.

    ``pointwise``: no channel is reduced, unless for a record if ``recording``.

    ALIGN is 8 or 4 where every address, stride and line is a multiple of so many elements, else 1. ``length`` and
    the strides are passed in units of it, which is how the compiler knows, and so vectorises.
    """
    lines, length = (like.count, like.c) if like.rows else (like.n, like.s)
    itemsize = tensors[0].element_size()
    pairs = [strides(t, like.rows) for t in tensors]
    step = length  # its lowest set bit is that of the least aligned number or'ed into it
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
    # One element at a time, a thread has eight loads in flight in one group already.
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
    """(units, splits) of the grid, (tiles, share, spans, beside), GROUP and OCTETS: a fixed rule from these sizes.

    Planes are read 512 or, where that leaves fewer lanes idle, 64 elements at a time, tiny ones 16; rows are read
    by 64 channels, or as many as there are, so that no sector is read twice.
    """
    group = GROUP_BYTES // itemsize // 8
    if flat:
        shapes = [(group, 1)]
    elif rows:
        shapes = [(2 if length <= 16 else 4 if length <= 32 else 8, 0)]
    else:
        shapes = [(octets, beside) for octets in ((64, 8) if length > 16 else (2,)) for beside in (0, 1)]

    def tiles_of(octets: int, beside: int) -> tuple[int, int, int]:
        """Tiles down the lines, spans along them, and the lanes that all these tiles have."""
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
    """Place in the line, [GROUP, 8], of each element of the octets."""
    return octet * 8 + tl.arange(0, 8)[None, :]


@triton.jit
def inside(line, octet, lines, length, channels, ROWS: tl.constexpr, FLAT: tl.constexpr, ALIGN: tl.constexpr):
    """Which elements of the octets, [GROUP, 8], are the tensor's."""
    if ROWS and FLAT:
        line = line * 8 + position(octet) // channels
    return (line < lines) & (position(octet) < length * ALIGN)


@triton.jit
def channel_of(octet, length, channels, ROWS: tl.constexpr, FLAT: tl.constexpr, ALIGN: tl.constexpr):
    """The channel of each element, [GROUP, 8], and whether there is one; in planes one channel for them all."""
    if ROWS or FLAT:
        coord = position(octet)
        return coord % channels if FLAT else coord, coord < length * ALIGN
    else:
        return tl.program_id(0), True


@triton.jit
def addresses(
    ptr, outer, inner, line, octet, channels, ROWS: tl.constexpr, FLAT: tl.constexpr, ALIGN: tl.constexpr
):  # fmt: skip
    """Where the elements [GROUP, 8] lie. Strides are in units of ALIGN."""
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
def mask_addresses(
    mask_ptr, line, octet, lines, length, channels, ROWS: tl.constexpr, FLAT: tl.constexpr, ALIGN: tl.constexpr
):  # fmt: skip
    """Where the mask bytes [GROUP, 1] of the octets lie, and which their line has. Single rows: ALIGN must be 8."""
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
    """A per-channel vector's values at ``channel``, or ``default`` where the vector is not ``present``."""
    pointers = ptr + channel
    if ROWS and ALIGN == 8:
        pointers = tl.multiple_of(pointers, (1, 16))
    return tl.load(pointers, mask=valid & (present != 0), other=default)


@triton.jit
def affine(vectors, present, channel, valid, ROWS: tl.constexpr, ALIGN: tl.constexpr):
    """mean, invstd, weight and bias at ``channel``; 0, 1, 1 and 0 where they are not given."""
    mean = per_channel(vectors[0], present[0], 0.0, channel, valid, ROWS, ALIGN)
    invstd = per_channel(vectors[1], present[0], 1.0, channel, valid, ROWS, ALIGN)
    weight = per_channel(vectors[2], present[1], 1.0, channel, valid, ROWS, ALIGN).to(mean.dtype)
    bias = per_channel(vectors[3], present[2], 0.0, channel, valid, ROWS, ALIGN).to(mean.dtype)
    return mean, invstd, weight, bias


@triton.jit
def activate(value, positive, act):
    """A value z, or a gradient at z, after activation number ``act`` (activations.code); ``positive``: not (z <= 0)."""
    below = 0.0  # relu, the only activation
    return tl.where(positive | (act == 0), value, below)


@triton.jit
def gated(
    dy, xhat, weight, bias, mask_ptr, act, line, octet, lines, length, channels, valid, STORED: tl.constexpr,
    ROWS: tl.constexpr, FLAT: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """g, the gradient before the activation: by the saved mask, or by z as the forward computed it."""
    if mask_ptr is None:
        positive = (tl.fma(xhat, weight, bias).to(STORED).to(xhat.dtype) <= 0) == 0
    elif ROWS and not FLAT and ALIGN < 8:  # octets of the mask begin anywhere in a row
        bit = line * channels + position(octet)
        byte = tl.load(mask_ptr + bit // 8, mask=valid, other=0)
        positive = ((byte >> (bit % 8).to(tl.uint8)) & 1) != 0
    else:
        pointers, in_bounds = mask_addresses(mask_ptr, line, octet, lines, length, channels, ROWS, FLAT, ALIGN)
        byte = tl.load(pointers, mask=(line < lines) & in_bounds, other=0)
        positive = ((byte >> tl.arange(0, 8)[None, :].to(tl.uint8)) & 1) != 0
    return activate(dy, positive, act)
