"""The phase ``grad_input``: dx and the residual's gradient."""

import pytest

from tests.support.cases import FEW, SWEEP, Case, Precision, Target
from tests.support.phases import check_grad_input, check_grad_input_without

ACTS = pytest.mark.parametrize("act", [None, "relu", "saved mask"])
TRAINING = pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])


@TRAINING
@ACTS
@SWEEP
def test_against_float64(target: Target, precision: Precision, case: Case, act: str | None, training: bool) -> None:
    check_grad_input(target, precision, case, act, training)


@ACTS
@pytest.mark.parametrize("without", ["weight", "bias", "affine", "identity"])
@pytest.mark.parametrize("case", FEW, ids=str)
def test_parts_left_out(target: Target, precision: Precision, case: Case, without: str, act: str | None) -> None:
    check_grad_input_without(target, precision, case, without, act)
