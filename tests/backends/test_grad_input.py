"""The phase ``grad_input``: dx and the residual's gradient."""

import pytest
import torch

from bnkern import backends
from bnkern.backends import reference
from bnkern.backends.calls import BackwardCall, ForwardCall
from tests.support.cases import FEW, SWEEP, Case, Precision, Target, assert_close, by_channel, dx_bound, exact, passed

ACTS = pytest.mark.parametrize("act", [None, "relu", "saved mask"])
TRAINING = pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])


def check(target: Target, dy, x, mean, invstd, weight, bias, residual, act, training) -> None:
    kernels = backends.choose(target.backend, target.device, x.dtype)
    y, mask = kernels.normalize(ForwardCall(x, weight, bias, residual, act=act, save_mask=True), mean, invstd)
    wide_dy, wide_x, wide_mean, wide_invstd, wide_weight = exact(dy, x, mean, invstd, weight)
    g = wide_dy.where(passed(y).cpu(), 0.0) if act else wide_dy
    sums = wide_sums = None
    if training:
        # Both get the same sums, rounded to the dtype in which sums are kept.
        pair = reference.grad_sums(BackwardCall(g, wide_x, mean=wide_mean, invstd=wide_invstd))
        count = x.numel() // x.shape[1]
        sums = (*(s.to(mean.dtype).to(target.device) for s in pair), count)
        wide_sums = (*exact(*sums[:2]), count)
    dx, dresidual = kernels.grad_input(BackwardCall(dy, x, weight, bias, mean, invstd, mask, act), sums)
    true_dx, _ = reference.grad_input(BackwardCall(g, wide_x, wide_weight, None, wide_mean, wide_invstd), wide_sums)

    one = torch.ones(x.shape[1], dtype=torch.float64)
    scale = by_channel((one if weight is None else wide_weight) * (one if invstd is None else wide_invstd), x)
    xhat = wide_x if mean is None else (wide_x - by_channel(wide_mean, x)) * by_channel(wide_invstd, x)
    assert dx.dtype == dresidual.dtype == x.dtype
    assert_close(dx, true_dx, dx_bound(true_dx, g, xhat, scale, x.dtype, training), "dx")
    assert_close(dresidual, g, 0.0, "the residual's gradient, which is dy or 0")


@TRAINING
@ACTS
@SWEEP
def test_against_float64(target: Target, precision: Precision, case: Case, act: str | None, training: bool) -> None:
    p = case.problem(precision, target.device)
    residual = p.residual if act == "saved mask" else None
    check(target, p.dy, p.x, p.mean, p.invstd, p.weight, p.bias, residual, act and "relu", training)


@ACTS
@pytest.mark.parametrize("without", ["weight", "bias", "affine", "identity"])
@pytest.mark.parametrize("case", FEW, ids=str)
def test_parts_left_out(target: Target, precision: Precision, case: Case, without: str, act: str | None) -> None:
    p = case.problem(precision, target.device)
    weight = None if without in ("weight", "affine", "identity") else p.weight
    bias = None if without in ("bias", "affine", "identity") else p.bias
    mean, invstd = (None, None) if without == "identity" else (p.mean, p.invstd)
    residual = p.residual if act == "saved mask" else None
    training = without != "identity"  # identity normalisation has no batch statistics to differentiate
    check(target, p.dy, p.x, mean, invstd, weight, bias, residual, act and "relu", training)
