"""The phase ``grad_sums``: sum g and sum g * xhat of each channel, the gradients of bias and weight."""

import pytest
import torch

from bnkern import backends
from bnkern.backends import records
from bnkern.backends.calls import BackwardCall
from tests.support.cases import (
    FEW,
    LAYOUTS,
    MIXED,
    SWEEP,
    Case,
    Precision,
    Target,
)
from tests.support.phases import check_grad_sums, check_grad_sums_without
from tests.support.record_cases import empty_record

ACTS = pytest.mark.parametrize("act", [None, "relu", "saved mask"])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("precision", MIXED[:2], ids=lambda p: p.name)
def test_lanes_without_a_value_add_nothing(target: Target, precision: Precision, layout: str) -> None:
    """In tails, lanes without a value hold x = 0.

    There xhat = -mean * invstd may overflow, and g = 0 times it is NaN.
    """
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
        assert dweight.tolist() == [0.0] * 5 and dbias.tolist() == [75.0] * 5, "xhat is 0 for every value"
    assert record.tolist() == [[75.0] * 5] * 4 + [[0.0] * 5] * 4


@ACTS
@SWEEP
def test_against_float64(target: Target, precision: Precision, case: Case, act: str | None) -> None:
    check_grad_sums(target, precision, case, act)


@ACTS
@pytest.mark.parametrize("without", ["weight", "bias", "affine", "identity"])
@pytest.mark.parametrize("case", FEW, ids=str)
def test_parts_left_out(target: Target, precision: Precision, case: Case, without: str, act: str | None) -> None:
    check_grad_sums_without(target, precision, case, without, act)
