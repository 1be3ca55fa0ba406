"""The phase ``moments``: count, mean and M2 of each channel."""

import pytest
import torch

import bnkern
from bnkern import backends
from bnkern.backends import reference
from tests.support.cases import (
    CASE,
    CASES,
    EPS,
    FP32,
    MIXED,
    Case,
    Precision,
    Target,
    assert_close,
    exact,
    invstd_bound,
    mean_bound,
    var_bound,
)
from tests.support.phases import check_empty_moments, check_moments


def kernels(target: Target, dtype: torch.dtype):
    return backends.choose(target.backend, target.device, dtype)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("precision", MIXED, ids=lambda p: p.name)
def test_against_float64(target: Target, precision: Precision, case: Case) -> None:
    check_moments(target, precision, case)


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4, 4), (2, 3, 0, 4)])
def test_empty(target: Target, shape: tuple[int, ...]) -> None:
    check_empty_moments(target, shape)


@pytest.mark.parametrize("value", [0.0, 1.0, 3.3, -1e4, 1e-30])
@pytest.mark.parametrize("layout", ["constant", "constant_rows"])
def test_constant_input(target: Target, layout: str, value: float) -> None:
    """The variance is negligible compared with eps, so invstd is 1/sqrt(eps)."""
    x = torch.full_like(CASE[layout].problem(FP32, target.device).x, value)
    count, mean, m2 = kernels(target, x.dtype).moments(x)
    true_mean = torch.full_like(mean, value, dtype=torch.float64).cpu()
    zeros = torch.zeros_like(true_mean)
    assert_close(mean, true_mean, mean_bound(true_mean, zeros, x.dtype), "mean")
    assert_close(m2 / count, zeros, var_bound(true_mean, zeros, x.dtype), "variance")
    if abs(value) < 100:
        invstd = torch.rsqrt(m2 / count + EPS)
        expected = torch.full_like(true_mean, EPS**-0.5)
        assert_close(invstd, expected, invstd_bound(zeros, zeros, x.dtype), "invstd")


def test_channel_moments(target: Target) -> None:
    """The public function returns the biased variance, without a graph even if the input requires grad."""
    x = CASE["nchw_tail"].problem(FP32, target.device).x.requires_grad_()
    count, mean, var = bnkern.channel_moments(x)
    (wide,) = exact(x)
    assert count == 4 * 63
    assert not mean.requires_grad and not var.requires_grad
    true_var, true_mean = torch.var_mean(wide, dim=(0, 2, 3), correction=0)
    assert_close(mean, true_mean, mean_bound(true_mean, true_var, x.dtype), "mean")
    assert_close(var, true_var, var_bound(true_mean, true_var, x.dtype), "variance")


# Channels, layout, the length of a run of positions, and the number of runs of which one has other values. The CPU
# samples one row of 4, 8 or 16. With 16 channels such a row is 8 positions long. In planes it samples 32 values of 512.
PATTERNS = [
    (256, torch.channels_last, 1, 4),
    (64, torch.channels_last, 2, 8),
    (16, torch.channels_last, 8, 8),
    (256, torch.channels_last, 1, 16),
    (4, torch.contiguous_format, 32, 16),
    (4, torch.contiguous_format, 16, 4),
]


@pytest.mark.parametrize("distance", [3.0, 1e3, 1e6])
@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("channels, layout, run, period", PATTERNS, ids=lambda v: str(v).replace("torch.", ""))
def test_values_with_a_pattern(
    target: Target, channels: int, layout: torch.memory_format, run: int, period: int, first: int, distance: float
) -> None:
    """The moments are as exact if the sample of a kernel holds only the other values, or none of them."""
    x = torch.randn(8, channels, 64, 64, generator=torch.Generator().manual_seed(3))
    position = torch.arange(64 * 64) // run % period
    x += distance * (position == first).view(64, 64)
    x = x.contiguous(memory_format=layout).to(target.device)
    count, mean, m2 = kernels(target, x.dtype).moments(x)
    _, true_mean, true_m2 = reference.moments(*exact(x))
    true_var = true_m2 / count
    assert_close(mean.cpu(), true_mean, mean_bound(true_mean, true_var, x.dtype), "mean")
    assert_close(m2.cpu() / count, true_var, var_bound(true_mean, true_var, x.dtype), "variance")
