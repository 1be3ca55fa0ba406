"""The phase ``normalize``: y and, with residual and ReLU, the mask of one bit per element."""

import pytest

from tests.support.cases import (
    FEW,
    SWEEP,
    Case,
    Precision,
    Target,
)
from tests.support.phases import check_mask, check_normalize, check_normalize_without

ACTS = pytest.mark.parametrize("act", [None, "relu"])
WITH_RESIDUAL = pytest.mark.parametrize("with_residual", [False, True], ids=["", "residual"])


@ACTS
@WITH_RESIDUAL
@SWEEP
def test_against_float64(
    target: Target, precision: Precision, case: Case, with_residual: bool, act: str | None
) -> None:
    check_normalize(target, precision, case, with_residual, act)


@ACTS
@WITH_RESIDUAL
@pytest.mark.parametrize("without", ["weight", "bias", "affine", "identity"])
@pytest.mark.parametrize("case", FEW, ids=str)
def test_parts_left_out(
    target: Target, precision: Precision, case: Case, without: str, with_residual: bool, act: str | None
) -> None:
    check_normalize_without(target, precision, case, without, with_residual, act)


@pytest.mark.parametrize("case", FEW, ids=str)
def test_nan_and_zero_in_the_mask(target: Target, case: Case) -> None:
    check_mask(target, case)
