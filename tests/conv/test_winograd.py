"""The CPU's 3 x 3 convolution by F(2 x 2, 3 x 3), both its gradients, and the absolute sums of the weight gradient."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bnkern.backends import cpu
from tests.support.threads import for_any_number_of_threads
from tests.support.winograd import SIZES, gradient_of, operands

B = torch.tensor([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]], dtype=torch.float64).T
G = torch.tensor([[2, 0, 0], [1, 1, 1], [1, -1, 1], [0, 0, 2]], dtype=torch.float64) / 2
A = torch.tensor([[1, 1, 1, 0], [0, 1, -1, -1]], dtype=torch.float64).T
CHAIN = 32  # the maximum of tiles in a band, with the sizes above


def tiles(t: Tensor, size: int, margin: int) -> Tensor:
    """[N, C, down, across, size, size]: a tile for each 2 x 2 positions, with zeros around the image."""
    h, w = t.shape[2:]
    padded = F.pad(t.double(), (margin, margin + w % 2, margin, margin + h % 2))
    return padded.unfold(2, size, 2).unfold(3, size, 2)


def both_sides(m: Tensor, t: Tensor) -> Tensor:
    return m @ t @ m.mT


def largest_output(x: Tensor, weight: Tensor) -> Tensor:
    """The sum of the magnitudes in the computation of each output, which scales its rounding error."""
    spread = both_sides(B.T.abs(), tiles(x.abs(), 4, 1))
    products = torch.einsum("nihwab,oiab->nohwab", spread, both_sides(G.abs(), weight.double().abs()))
    y = both_sides(A.T.abs(), products).permute(0, 1, 2, 4, 3, 5).flatten(4).flatten(2, 3)
    return y[:, :, : x.shape[2], : x.shape[3]]


def largest_gradient(x: Tensor, dy: Tensor) -> Tensor:
    spread = both_sides(B.T.abs(), tiles(x.abs(), 4, 1)), both_sides(A.abs(), tiles(dy.abs(), 2, 0))
    return both_sides(G.T.abs(), torch.einsum("nihwab,nohwab->oiab", *spread))


@pytest.mark.parametrize("last", [True, False], ids=["channels_last_weight", "plain_weight"])
@pytest.mark.parametrize("flipped", [False, True], ids=["forward", "input_gradient"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_convolution(sizes: tuple[int, ...], flipped: bool, last: bool) -> None:
    x, weight, _ = operands(*sizes)
    bound = largest_output(x, weight.flip(2, 3) if flipped else weight)
    if flipped:  # the weight of the convolution whose output's gradient is x
        weight = weight.transpose(0, 1)
    truth = (F.conv_transpose2d if flipped else F.conv2d)(x.double(), weight.double(), padding=1)
    weight = weight.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    y = for_any_number_of_threads(lambda: cpu.conv3x3(x, weight, flipped))
    assert y.is_contiguous(memory_format=torch.channels_last) and y.shape == truth.shape
    # A chain of I fused multiply-adds, after two additions for x and four for the weight, and before four for y.
    assert ((y - truth).abs() <= (sizes[1] + 10) * 2.0**-24 * bound).all()
    assert (y - truth).norm() <= 4e-7 * truth.norm()


@pytest.mark.parametrize("absolute", [False, True], ids=["sum", "abs_sum"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_gradient(sizes: tuple[int, ...], absolute: bool) -> None:
    n, inputs, outputs, h, w = sizes
    x, _, dy = operands(*sizes)
    x = x - 0.25  # not only values that a ReLU passes
    terms = (x.abs(), dy.abs()) if absolute else (x, dy)
    truth = torch.nn.grad.conv2d_weight(terms[0].double(), (outputs, inputs, 3, 3), terms[1].double(), padding=1)
    result = for_any_number_of_threads(lambda: gradient_of(x, dy, absolute))
    # A chain over the tiles of a band, one over the bands of a chunk, two additions each for x and dy, four for the
    # result.
    bands = -(-n * -(-h // 2) * -(-w // 2) // 16)
    assert ((result - truth).abs() <= (CHAIN + bands + 9) * 2.0**-24 * largest_gradient(x, dy)).all()
    assert (result - truth).norm() <= 4e-7 * truth.norm()


def test_dead_channels_have_no_gradient() -> None:
    """Exact zeros stay exact."""
    x, _, dy = operands(4, 16, 32, 6, 6)
    x[:, 3], dy[:, 5] = 0, 0
    for absolute in (False, True):
        result = gradient_of(x, dy, absolute)
        assert not result[:, 3].any() and not result[5].any() and result[4, 4].all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite_are_not_lost(value: float) -> None:
    """A value that is not finite may spread within a tile, and every result that depends on it is not finite."""
    x, weight, dy = operands(2, 16, 16, 6, 6)
    x[1, 3, 2, 5] = value
    entered = ~F.conv2d(x.double(), weight.double(), padding=1).isfinite()
    y, gradient = cpu.conv3x3(x, weight), gradient_of(x, dy)
    assert entered.any() and not y[entered].isfinite().any()
    assert y[0].isfinite().all() and y[1, :, :, :2].isfinite().all(), "it spreads only within its tiles"
    entered = ~torch.nn.grad.conv2d_weight(x.double(), weight.shape, dy.double(), padding=1).isfinite()
    assert entered.any() and not gradient[entered].isfinite().any()
    assert gradient[:, [i for i in range(16) if i != 3]].isfinite().all(), "other channels are not affected"


@pytest.mark.parametrize("channels", [(24, 16), (16, 8)], ids=str)
def test_other_channels_are_refused(channels: tuple[int, int]) -> None:
    x, weight, dy = operands(2, *channels, 4, 4)
    for kernel in (lambda: cpu.conv3x3(x, weight), lambda: gradient_of(x, dy)):
        with pytest.raises(ValueError, match="multiples of 16"):
            kernel()


def test_other_convolutions_are_refused() -> None:
    x, _, dy = operands(2, 16, 16, 4, 4)
    wanted, ones, twos = (True, False, False, False), (1, 1), (2, 2)
    for call, message in (
        ((x, dy[:, :, ::2, ::2], (3, 3), twos, ones), "stride"),
        ((x, dy, (1, 1), ones, (0, 0)), "3 x 3"),
        ((x.contiguous(), dy, (3, 3), ones, ones), "channels_last"),
        ((x.bfloat16(), dy.bfloat16(), (3, 3), ones, ones), "float32"),
    ):
        with pytest.raises(ValueError, match=message):
            cpu.conv_grad_signs(*call, wanted, winograd=True)


@pytest.mark.parametrize("sizes", [(20, 16, 16, 16, 32), (12, 64, 16, 16, 16), (3, 32, 32, 5, 16)], ids=str)
def test_results_together_have_the_bits_of_each_alone(sizes: tuple[int, ...]) -> None:
    """Results that share a pass over x and dy have the bits that they have alone. There are 1 to 10 tasks of each."""
    x, _, dy = operands(*sizes)
    every = for_any_number_of_threads(lambda: torch.stack(grad_signs(x, dy, (True,) * 4)))
    for k, result in enumerate(every):
        wanted = tuple(i == k for i in range(4))
        assert torch.equal(result, grad_signs(x, dy, wanted)[k].double())
    direct = cpu.conv_grad_signs(x, dy, (3, 3), (1, 1), (1, 1), (False, False, True, True))
    assert torch.equal(every[2], direct[2].double()) and torch.equal(every[3], direct[3].double())


def grad_signs(x: Tensor, dy: Tensor, wanted: tuple[bool, ...]) -> list[Tensor | None]:
    result = cpu.conv_grad_signs(x, dy, (3, 3), (1, 1), (1, 1), wanted, winograd=True)
    return [None if t is None else t.double() for t in result]
