"""The two layouts in which kernels read a tensor. Sizes and strides alone decide between them.

A batch-norm tensor has N samples, C channels and S positions per channel (S = 1 for N x C input).

planes  (NCHW)           each (n, c) is a run of S elements of unit stride;
                         element (n, c, s) lies at n * outer + c * inner + s.
rows    (channels_last,  each of the M = N * S rows is a run of C elements of unit stride;
         N x C, S = 1)   element (m, c) lies at m * outer + c, and inner is 1.

Views with arbitrary outer strides (slices of the batch or of the channels, expanded batches) are read in place. A
tensor with any other stride pattern is copied once, by :func:`addressed`, to the dense form of its layout.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Layout(NamedTuple):
    """The layout of an input: ``rows`` or planes, and its sizes N, C, S."""

    rows: bool
    n: int
    c: int
    s: int

    @property
    def count(self) -> int:  # type: ignore[override]  # hides tuple.count, which no code uses
        """M = N * S, the number of values per channel."""
        return self.n * self.s

    @property
    def mask_shape(self) -> tuple[int, ...]:
        """Shape of the activation's mask, one bit per element, least significant bit first.

        rows: flat over M * C, so there are no unused bits between rows. planes: [N, C, ceil(S / 8)], so each plane
        begins at a new byte, and all bytes of a plane are written by the thread that writes the plane.
        """
        if self.rows:
            return ((self.count * self.c + 7) // 8,)
        return (self.n, self.c, (self.s + 7) // 8)


def layout(x: Tensor) -> Layout:
    """The layout of ``x`` [N, C, ...]: rows if the channel has unit stride or there is one position per channel."""
    n, c = x.shape[0], x.shape[1]
    s = 1
    for size in x.shape[2:]:
        s *= size
    return Layout(s == 1 or (c > 1 and x.stride(1) == 1), n, c, s)


def strides(x: Tensor, rows: bool) -> tuple[int, int] | None:
    """(outer, inner) element strides of ``x`` in the given layout, or None if two strides do not describe it."""
    if not rows and x.is_contiguous():  # the usual cases need no loop
        return x.stride(0), x.stride(1)
    if rows and x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return x.shape[1], 1
    return _folded(x.shape, x.stride(), rows)


def _folded(shape: tuple[int, ...], stride: tuple[int, ...], rows: bool) -> tuple[int, int] | None:
    """:func:`strides` of a tensor with these sizes and strides."""
    if rows and shape[1] > 1 and stride[1] != 1:
        return None
    # Fold the axes that must form one run with a constant stride: the positions of a plane, or all rows.
    axes: Sequence[int] = (0, *range(2, len(shape))) if rows else range(2, len(shape))
    step: int | None
    expected: int | None
    step = expected = None if rows else 1
    for axis in reversed(axes):
        size = shape[axis]
        if size == 1:
            continue
        if expected is None:
            step = expected = stride[axis]
        elif stride[axis] != expected:
            return None
        expected *= size
    if rows:
        return (shape[1] if step is None else step), 1
    return stride[0], stride[1]


def dense_strides(x: Tensor, rows: bool) -> tuple[int, ...]:
    """The strides of a tensor of x's shape that is dense in the given layout."""
    order: Sequence[int] = (1, *range(x.dim() - 1, 1, -1), 0) if rows else range(x.dim() - 1, -1, -1)
    result, step = [0] * x.dim(), 1
    for axis in order:
        result[axis] = step
        step *= max(x.shape[axis], 1)
    return tuple(result)


def output_strides(x: Tensor, rows: bool) -> tuple[int, ...]:
    """The strides of outputs and gradients for x: its own if it is dense, so that results keep its memory format."""
    if x.is_contiguous() or (rows and x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)):
        return x.stride()
    like = torch.empty_like(x, device="meta")
    return like.stride() if strides(like, rows) is not None else dense_strides(x, rows)


def dense(x: Tensor, rows: bool) -> Tensor:
    """A new uninitialised tensor of the shape, dtype and device of ``x``, dense in the given layout."""
    return torch.empty_strided(x.shape, dense_strides(x, rows), dtype=x.dtype, device=x.device)


def empty_like(x: Tensor, rows: bool) -> Tensor:
    """A new uninitialised tensor in the memory format of ``x``: an output or a gradient."""
    return torch.empty_strided(x.shape, output_strides(x, rows), dtype=x.dtype, device=x.device)


def addressed(t: Tensor, rows: bool) -> Tensor:
    """``t`` itself if the kernels can read it in this layout, otherwise a dense copy. There are no other copies."""
    return t if strides(t, rows) is not None else dense(t, rows).copy_(t)


def formats_conflict(x: Tensor, other: Tensor) -> bool:
    """Whether ``other`` has the other memory format: two strides describe it in the other layout, but not in that of x.

    It reads only sizes and strides, so it works for tensors of vmap, which do not report their memory format.
    """
    rows = layout(x).rows
    if layout(other).rows == rows or other.numel() == 0:
        return False
    shape, stride = other.shape, other.stride()
    return _folded(shape, stride, rows) is None and _folded(shape, stride, not rows) is not None


def relaid(t: Tensor, rows: bool) -> Tensor:
    """``t``, or a dense copy in the given layout if ``t`` is not dense in it. Differentiable, in plain torch."""
    return t.movedim(1, -1).contiguous().movedim(-1, 1) if rows else t.contiguous()
