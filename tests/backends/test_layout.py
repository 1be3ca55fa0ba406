"""Layouts of tensors: ``backends/layout.py``, and the memory formats of the results of a call."""

import pytest
import torch
from torch import Tensor

import bnkern
from bnkern.backends import layout as layouts
from bnkern.backends import reference
from tests.support.cases import BF16, CASE, CASES, FEW, FP32, LAYOUTS, Case, Target

SHAPES = [(3, 5), (3, 1), (1, 5), (3, 5, 4), (3, 5, 1), (2, 1, 4), (3, 5, 4, 6), (3, 16, 1, 6), (2, 3, 2, 4, 3)]


def read_through(t: Tensor, rows: bool) -> Tensor:
    """t [N, C, ...] as a kernel reads it: from its address, with the two strides of its layout."""
    n, c, s = layouts.layout(t)[1:]
    outer, inner = layouts.strides(t, rows)
    if rows:
        flat = torch.as_strided(t, (n * s, c), (outer, inner))
        return flat.reshape(n, *t.shape[2:], c).movedim(-1, 1)
    return torch.as_strided(t, (n, c, s), (outer, inner, 1)).reshape(t.shape)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", LAYOUTS)
def test_strides_address_every_element(name: str, shape: tuple[int, ...]) -> None:
    """For every view the two strides address each element of the tensor, or of its copy."""
    x = LAYOUTS[name](torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    rows, n, c, s = x_layout = layouts.layout(x)
    assert (n, c, n * s) == (shape[0], shape[1], x_layout.count) and n * c * s == x.numel()
    addressable = layouts.addressed(x, rows)
    assert torch.equal(addressable, x)
    assert torch.equal(read_through(addressable, rows), x)
    for other in (True, False):
        if layouts.strides(x, other) is not None:
            assert torch.equal(read_through(x, other), x)
        dense = layouts.dense(x, other)
        assert dense.shape == x.shape and dense.dtype == x.dtype
        assert torch.equal(read_through(dense.copy_(x), other), x)


@pytest.mark.parametrize(
    "name", ["contiguous", "channels_last", "sliced_batch", "sliced_channels", "misaligned", "expanded_batch"]
)
def test_common_views_are_not_copied(name: str) -> None:
    for shape in [(4, 6), (4, 6, 5), (4, 6, 5, 3), (4, 6, 5, 3, 2)]:
        x = LAYOUTS[name](torch.zeros(shape))
        assert layouts.addressed(x, layouts.layout(x).rows) is x
    x = LAYOUTS["sliced_channels_last"](torch.zeros(4, 6, 5, 3))
    assert layouts.layout(x).rows and layouts.addressed(x, True) is x


@pytest.mark.parametrize(
    ("shape", "name", "mask_shape"),
    [
        ((3, 5, 7, 7), "contiguous", (3, 5, 7)),
        ((3, 5, 2, 4), "contiguous", (3, 5, 1)),
        ((3, 5, 7, 7), "channels_last", (92,)),
        ((3, 5), "contiguous", (2,)),
        ((3, 17, 1, 1), "contiguous", (7,)),
        ((0, 5, 7), "contiguous", (0, 5, 1)),
        ((0, 5), "contiguous", (0,)),
    ],
)
def test_mask_shape(shape: tuple[int, ...], name: str, mask_shape: tuple[int, ...]) -> None:
    """In planes each plane begins with a new byte. In rows the bits are flat over all elements."""
    assert layouts.layout(LAYOUTS[name](torch.zeros(shape))).mask_shape == mask_shape


@pytest.mark.parametrize("case", CASES, ids=str)
def test_mask_packs_and_unpacks(case: Case) -> None:
    x = case.problem(FP32).x
    x_layout, mask = layouts.layout(x), case.problem(FP32).residual > 0
    packed = reference.pack_mask(mask, x_layout)
    assert tuple(packed.shape) == x_layout.mask_shape and packed.dtype == torch.uint8
    assert torch.equal(reference.unpack_mask(packed, x), mask)
    assert sum(int(byte).bit_count() for byte in packed.flatten()) == int(mask.sum()), "padding bits must be zero"


def test_mask_bits_by_hand() -> None:
    """The least significant bit comes first. Planes are [N, C, S]; rows are in memory order."""
    mask = torch.tensor([[[1, 0, 0, 0, 0, 0, 0, 0, 1], [0, 1, 1, 0, 0, 0, 0, 1, 0]]], dtype=torch.bool)
    planes = layouts.Layout(False, 1, 2, 9)
    assert reference.pack_mask(mask, planes).tolist() == [[[0x01, 0x01], [0x86, 0x00]]]
    rows = layouts.Layout(True, 1, 2, 9)  # bits in memory order: s0c0 s0c1 s1c0 s1c1 ...
    assert reference.pack_mask(mask, rows).tolist() == [0b00101001, 0b10000000, 0b00000001]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "add_relu"])
def test_outputs_keep_the_memory_format(target: Target, case: Case, fused: bool) -> None:
    """The output and every gradient have the strides that torch gives to a new tensor in the input's format.

    This also holds for a contiguous dy, with which torch's own backward loses the format.
    """
    p = case.problem(BF16, target.device)
    x, residual = p.x.detach().requires_grad_(), p.residual.detach().requires_grad_()
    leaves = [x, residual] if fused else [x]
    y = bnkern.batch_norm(
        x, None, None, training=True, residual=residual if fused else None, act="relu" if fused else None
    )
    for t in (y, *torch.autograd.grad(y, leaves, p.dy.contiguous())):
        assert torch.ops.aten.is_non_overlapping_and_dense(t), "an output has gaps or overlaps itself"
        assert layouts.addressed(t, layouts.layout(x).rows) is t
        if torch.ops.aten.is_non_overlapping_and_dense(x) and case.layout != "reversed_axes":
            assert t.stride() == x.stride()


@pytest.mark.parametrize("case", [CASE["nhwc"], CASE["ndhwc"], CASE["nhwc_c3"], CASE["c1_channels_last"]], ids=str)
def test_channels_last_stays_channels_last(target: Target, case: Case) -> None:
    fmt = torch.channels_last if len(case.shape) == 4 else torch.channels_last_3d
    x = case.problem(FP32, target.device).x.requires_grad_()
    y = bnkern.batch_norm(x, None, None, training=True, act="relu")
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert y.is_contiguous(memory_format=fmt) and dx.is_contiguous(memory_format=fmt)


@pytest.mark.parametrize("case", FEW, ids=str)
@pytest.mark.parametrize("residual_layout", LAYOUTS)
def test_residual_as_a_view(target: Target, case: Case, residual_layout: str) -> None:
    """A residual of any strides gives the results of a residual with the strides of the input."""
    p = case.problem(FP32, target.device)
    residual = LAYOUTS[residual_layout](p.residual.contiguous())
    same = LAYOUTS[case.layout](residual.contiguous())
    assert torch.equal(bnkern.add_act(p.x, residual), bnkern.add_act(p.x, same))
