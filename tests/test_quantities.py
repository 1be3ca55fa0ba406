"""The quantities against slow oracles that spell their definitions out."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bnkern.probes.quantities import GradSigns, log_moments, weight_gradient_signs


def oracle(x: Tensor, dy: Tensor, kernel_size: tuple[int, int], stride: int, padding: int) -> GradSigns:
    """Every summand d by itself, [N, O, I * kh * kw, H' * W'], and then summed."""
    columns = F.unfold(x, kernel_size, stride=stride, padding=padding)
    d = torch.einsum("nol,nkl->nokl", dy.flatten(2), columns)
    sums = (d, d.abs(), d.sign(), (d != 0).to(d.dtype))
    return GradSigns(*(t.sum((0, 3)).view(dy.shape[1], x.shape[1], *kernel_size) for t in sums))


@pytest.mark.parametrize("kernel_size", [(1, 1), (3, 3), (3, 2)])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("padding", [0, 1])
def test_weight_gradient_signs(kernel_size: tuple[int, int], stride: int, padding: int) -> None:
    torch.manual_seed(0)
    # What convolutions see behind a ReLU: half of the input exactly zero. A dead channel on either side gives 0/0.
    x = torch.randn(3, 4, 9, 8, dtype=torch.float64).relu()
    x[:, 1] = 0
    weight = torch.randn(5, 4, *kernel_size, dtype=torch.float64, requires_grad=True)
    y = F.conv2d(x, weight, stride=stride, padding=padding)
    dy = torch.randn_like(y) * (torch.rand_like(y) > 0.3)
    dy[:, 2] = 0
    ours, truth = (
        weight_gradient_signs(x, dy, kernel_size, stride, padding),
        oracle(x, dy, kernel_size, stride, padding),
    )
    # up to 216 products of order one each: their rounding in float64
    torch.testing.assert_close(ours.sum, truth.sum, rtol=0, atol=1e-12)
    torch.testing.assert_close(ours.abs_sum, truth.abs_sum, rtol=0, atol=1e-12)
    assert torch.equal(ours.sign_sum, truth.sign_sum) and torch.equal(ours.nonzero, truth.nonzero)
    y.backward(dy)
    torch.testing.assert_close(ours.sum, weight.grad, rtol=0, atol=1e-12)
    assert not ours.abs_sum[2].any() and not ours.nonzero[:, 1].any()


@pytest.mark.parametrize("shape", [(8, 5, 6, 7), (16, 5)])
def test_log_moments(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64) * torch.arange(1, 6).view(5, *[1] * (len(shape) - 2)) + 0.5
    channels = x.transpose(0, 1).flatten(1)
    ours = log_moments(x)
    torch.testing.assert_close(ours.ln_abs_mean, channels.mean(1).abs().log())
    torch.testing.assert_close(ours.ln_std, channels.std(1, correction=0).log())


def test_log_moments_of_a_dead_channel_are_minus_infinity() -> None:
    x = torch.randn(4, 2, 3, 3)
    x[:, 1] = 0
    ours = log_moments(x)
    assert ours.ln_abs_mean[1] == ours.ln_std[1] == -torch.inf
    assert ours.ln_std[0].isfinite()
