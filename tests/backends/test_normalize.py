"""The phase ``normalize``: y and, with residual and ReLU, the mask of one bit per element."""

import pytest
import torch

from bnkern import backends
from bnkern.backends import reference
from bnkern.backends.calls import ForwardCall
from bnkern.backends.layout import layout
from tests.support.cases import (
    FEW,
    FP32,
    SWEEP,
    Case,
    Precision,
    Target,
    assert_close,
    assert_mask_agrees,
    by_channel,
    exact,
    passed,
    y_bound,
)

ACTS = pytest.mark.parametrize("act", [None, "relu"])
WITH_RESIDUAL = pytest.mark.parametrize("with_residual", [False, True], ids=["", "residual"])


def check(target: Target, x, mean, invstd, weight, bias, residual, act) -> None:
    kernels = backends.choose(target.backend, target.device, x.dtype)
    y, mask = kernels.normalize(ForwardCall(x, weight, bias, residual, act=act, save_mask=True), mean, invstd)
    wide = exact(x, weight, bias, residual)
    z, _ = reference.normalize(ForwardCall(*wide), *exact(mean, invstd))
    scale = 1.0 if weight is None else by_channel(exact(weight)[0], z)
    bound = y_bound(z, x.dtype, scale)
    assert y.dtype == x.dtype
    assert_close(y, z.relu() if act else z, bound, "y")
    if act and residual is not None:
        assert_mask_agrees(y, z, bound)
        expected = reference.pack_mask(passed(y), layout(x))
        assert torch.equal(mask, expected), "the mask is not the sign of y, bit for bit, with zeros for padding"
    else:
        assert mask is None


@ACTS
@WITH_RESIDUAL
@SWEEP
def test_against_float64(target: Target, precision: Precision, case: Case, with_residual: bool, act) -> None:
    p = case.problem(precision, target.device)
    check(target, p.x, p.mean, p.invstd, p.weight, p.bias, p.residual if with_residual else None, act)


@ACTS
@WITH_RESIDUAL
@pytest.mark.parametrize("without", ["weight", "bias", "affine", "identity"])
@pytest.mark.parametrize("case", FEW, ids=str)
def test_parts_left_out(target: Target, precision: Precision, case: Case, without: str, with_residual, act) -> None:
    p = case.problem(precision, target.device)
    weight = None if without in ("weight", "affine", "identity") else p.weight
    bias = None if without in ("bias", "affine", "identity") else p.bias
    mean, invstd = (None, None) if without == "identity" else (p.mean, p.invstd)
    check(target, p.x, mean, invstd, weight, bias, p.residual if with_residual else None, act)


@pytest.mark.parametrize("case", FEW, ids=str)
def test_nan_and_zero_in_the_mask(target: Target, case: Case) -> None:
    """A NaN passes the gradient, as in torch; +0, -0 and negative values do not; the smallest positive does."""
    x = case.problem(FP32, target.device).x
    values = torch.tensor([torch.nan, 0.0, -0.0, torch.inf, -torch.inf, 1e-45, -1e-45], device=target.device)
    x = x.copy_(values.repeat(x.numel() // 7 + 1)[: x.numel()].view(x.shape))
    kernels = backends.choose(target.backend, target.device, x.dtype)
    y, mask = kernels.normalize(ForwardCall(x, residual=torch.zeros_like(x), act="relu", save_mask=True), None, None)
    bits = reference.unpack_mask(mask, x)
    assert torch.equal(bits, x.isnan() | (x > 0))
    assert torch.equal(y.nan_to_num(7.0), x.relu().nan_to_num(7.0))
