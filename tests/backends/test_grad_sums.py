"""The phase ``grad_sums``: sum g and sum g * xhat of each channel, the gradients of bias and weight."""

import pytest
import torch

from bnkern import backends
from bnkern.backends import records, reference
from bnkern.backends.calls import BackwardCall, ForwardCall
from bnkern.backends.reference import accumulator
from tests.support.cases import (
    FEW,
    LAYOUTS,
    MIXED,
    SWEEP,
    Case,
    Precision,
    Target,
    assert_close,
    by_channel,
    exact,
    passed,
    sums_bound,
)
from tests.support.record_cases import empty_record

ACTS = pytest.mark.parametrize("act", [None, "relu", "saved mask"])


def check(target: Target, dy, x, mean, invstd, weight, bias, residual, act) -> None:
    kernels = backends.choose(target.backend, target.device, x.dtype)
    y, mask = kernels.normalize(ForwardCall(x, weight, bias, residual, act=act, save_mask=True), mean, invstd)
    sum_dy, sum_dy_xhat = kernels.grad_sums(BackwardCall(dy, x, weight, bias, mean, invstd, mask, act))
    wide_dy, wide_x, wide_mean, wide_invstd = exact(dy, x, mean, invstd)
    # The truth sums where the forward's own output says that the ReLU passed.
    g = wide_dy.where(passed(y).cpu(), 0.0) if act else wide_dy
    xhat = wide_x if mean is None else (wide_x - by_channel(wide_mean, x)) * by_channel(wide_invstd, x)
    true_dy, true_dy_xhat = reference.grad_sums(BackwardCall(g, wide_x, mean=wide_mean, invstd=wide_invstd))
    dy_bound, dy_xhat_bound = sums_bound(g, xhat, x.dtype)
    assert sum_dy.dtype == sum_dy_xhat.dtype == accumulator(x.dtype)
    assert_close(sum_dy, true_dy, dy_bound, "sum dy")
    assert_close(sum_dy_xhat, true_dy_xhat, dy_xhat_bound, "sum dy * xhat")


@ACTS
@SWEEP
def test_against_float64(target: Target, precision: Precision, case: Case, act: str | None) -> None:
    p = case.problem(precision, target.device)
    residual = p.residual if act == "saved mask" else None
    check(target, p.dy, p.x, p.mean, p.invstd, p.weight, p.bias, residual, act and "relu")


@ACTS
@pytest.mark.parametrize("without", ["weight", "bias", "affine", "identity"])
@pytest.mark.parametrize("case", FEW, ids=str)
def test_parts_left_out(target: Target, precision: Precision, case: Case, without: str, act: str | None) -> None:
    p = case.problem(precision, target.device)
    weight = None if without in ("weight", "affine", "identity") else p.weight
    bias = None if without in ("bias", "affine", "identity") else p.bias
    mean, invstd = (None, None) if without == "identity" else (p.mean, p.invstd)
    residual = p.residual if act == "saved mask" else None
    check(target, p.dy, p.x, mean, invstd, weight, bias, residual, act and "relu")


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("precision", MIXED[:2], ids=lambda p: p.name)
def test_lanes_without_a_value_add_nothing(target: Target, precision: Precision, layout: str) -> None:
    """In tails, lanes without a value stand at x = 0, where xhat = -mean * invstd may overflow: times g = 0 NaN."""
    largest = torch.finfo(precision.dtype).max ** 0.5
    x = LAYOUTS[layout](torch.full((3, 5, 5, 5), 16 * largest, dtype=precision.dtype)).to(target.device)
    dy = torch.ones_like(x)
    mean, invstd = (
        torch.full((5,), value, dtype=precision.dtype, device=target.device) for value in (16 * largest, largest)
    )
    record = empty_record(records.AFFINE, x)
    kernels = backends.choose(target.backend, target.device, x.dtype)
    needs = (False, True, True, False)
    for recorded in ({}, {"record_affine": record}):
        _, dweight, dbias, _ = kernels.backward(
            BackwardCall(
                dy, x, torch.ones_like(mean), torch.zeros_like(mean), mean, invstd, None, None, False, needs, **recorded
            )
        )
        assert dweight.tolist() == [0.0] * 5 and dbias.tolist() == [75.0] * 5, "xhat is 0 wherever there is a value"
    assert record.tolist() == [[75.0] * 5] * 4 + [[0.0] * 5] * 4
