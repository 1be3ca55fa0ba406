"""The ReLU of the backward equals that of the forward in every bit, also for values within a rounding of zero."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import bnkern
from tests.support.cases import BF16, EPS, FP16, FP32, Precision, Target, assert_close, by_channel, exact, leaf, passed


def steps_around(center: Tensor, dtype: torch.dtype, steps: int) -> Tensor:
    """[steps, C]: the ``steps`` neighbours in ``dtype`` of each value of center [C], in units of the last place."""
    integer = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    offsets = torch.arange(steps, dtype=integer) - steps // 2
    return (center.to(dtype).view(integer) + offsets[:, None]).view(dtype)


PLANES = pytest.mark.parametrize("planes", [True, False], ids=["planes", "rows"])
HALVES_AND_FP32 = pytest.mark.parametrize("precision", [FP32, BF16, FP16], ids=lambda p: p.name)


def arranged(v: Tensor, planes: bool) -> Tensor:
    """[64, C] as [8, C, 8] in planes, or unchanged in rows."""
    return v.view(8, 8, -1).movedim(1, 2).contiguous() if planes else v


@HALVES_AND_FP32
@PLANES
def test_recomputed_mask_next_to_zero_in_eval(target: Target, precision: Precision, planes: bool) -> None:
    """A million values whose pre-activation is within a few roundings of zero: backward and forward have the same mask.

    In half of the channels weight and bias are so small that z underflows. There the rounded value decides.
    """
    generator, channels = torch.Generator().manual_seed(1), 16384
    mean, weight, bias = torch.randn(3, channels, generator=generator, dtype=torch.float64)
    var = torch.rand(channels, generator=generator, dtype=torch.float64) + 0.1
    weight = weight.sign() * (0.5 + weight.abs())
    small = torch.ones(channels, dtype=torch.float64)
    small[::2] = 1e-4 if precision is FP16 else 1e-37
    weight, bias, mean, var = (
        t.to(precision.params).to(target.device) for t in (weight * small, bias * small, mean, var)
    )
    wide_weight, wide_bias, wide_mean, wide_var = exact(weight, bias, mean, var)
    zero = wide_mean - wide_bias / wide_weight * (wide_var + EPS).sqrt()
    x = leaf(arranged(steps_around(zero, precision.dtype, 64), planes).to(target.device))
    y = bnkern.batch_norm(x, mean, var, weight, bias, act="relu")
    dy = torch.ones_like(x) * by_channel((1 / small).clamp(max=1e30), x).to(x)
    (dx,) = torch.autograd.grad(y, x, dy)
    assert torch.equal(dx != 0, passed(y))
    # The values are suitable: about half pass the ReLU, and some positive z underflow to zero.
    assert 0.3 < passed(y).double().mean() < 0.7
    z = F.batch_norm(*exact(x), wide_mean, wide_var, wide_weight, wide_bias)
    assert ((z > 0) & (y.cpu() == 0)).sum() > 100


@HALVES_AND_FP32
@PLANES
def test_recomputed_mask_next_to_zero_in_training(target: Target, precision: Precision, planes: bool) -> None:
    """The same with statistics of the batch: four values of 64 determine the variance, the others are close to the
    mean.
    """
    generator, channels = torch.Generator().manual_seed(2), 16384
    mean = torch.randn(channels, generator=generator, dtype=torch.float64).to(precision.dtype)
    values = steps_around(mean, precision.dtype, 64)
    values[:2], values[-2:] = mean + 1, mean - 1
    x = leaf(arranged(values, planes).to(target.device))
    weight = torch.ones(channels, dtype=precision.params, device=target.device)
    bias = leaf(torch.zeros_like(weight))
    y = bnkern.batch_norm(x, None, None, weight, bias, True, act="relu")
    dx, dbias = torch.autograd.grad(y, (x, bias), torch.ones_like(x))
    g = passed(y).cpu().double()
    assert torch.equal(dbias.cpu().double(), g.sum([0, *range(2, g.dim())]))
    # A wrong bit would change dx by weight * invstd, which is more than 1.
    wide = exact(x)[0].requires_grad_()
    z = F.batch_norm(wide, None, None, *exact(weight, bias), True)
    (true_dx,) = torch.autograd.grad(z, wide, g)
    assert_close(dx, true_dx, torch.full_like(true_dx, 0.05), "dx")
    assert (true_dx.abs() > 0.5).double().mean() > 0.5
    assert 0.3 < g.mean() < 0.7


@PLANES
def test_recomputed_mask_of_the_identity(target: Target, planes: bool) -> None:
    """Without normalisation z is x. All float16 values are tested."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    x = leaf(arranged(x.view(64, -1), planes).to(target.device))
    y = bnkern.add_act(x)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(x))
    assert torch.equal(dx != 0, ~(x <= 0))
    assert torch.equal(y.nan_to_num(7.0), x.relu().nan_to_num(7.0))
