"""``update`` in Triton, through the interpreter, with the checks of every backend."""

import pytest
import torch

from tests.backends.triton.interpreter import interpreted
from tests.support.cases import Target
from tests.support.updates import CASES, FP64, Case, check_update

pytest.importorskip("triton")

TRITON = Target("triton", "cpu")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_the_formula(case: Case) -> None:
    interpreted(check_update, TRITON, case)


@pytest.mark.parametrize("case", FP64, ids=str)
def test_float64(case: Case) -> None:
    interpreted(check_update, TRITON, case, torch.float64)
