"""The records of the kernels: exact counts, sums to rounding, and unchanged results."""

import pytest
import torch

from bnkern import backends
from tests.support.cases import CASE, FEW, MIXED, SWEEP, Case, Precision, Target
from tests.support.record_cases import (
    ACTS,
    MODES,
    Call,
    check_backward,
    check_empty,
    check_forward,
    check_frozen_parameters,
    check_special_values,
    check_values_as_stored,
)

ACT = pytest.mark.parametrize("act", ACTS)
MODE = pytest.mark.parametrize("mode", MODES)
# Cases for less common calls: channels with Inf or NaN, sums that cancel, tails, and copies.
UNCOMMON = [
    *FEW,
    *(CASE[name] for name in ("c1", "two_values", "tall_rows", "expanded_batch", "constant_rows", "inf", "nan_rows")),
]


def kernels(target: Target, dtype: torch.dtype):
    return backends.choose(target.backend, target.device, dtype)


@SWEEP
def test_training(target: Target, precision: Precision, case: Case) -> None:
    p, call = case.problem(precision, target.device), Call("training", "relu")
    check_forward(kernels(target, p.x.dtype), p, call)
    check_backward(kernels(target, p.x.dtype), p, call)


@ACT
@MODE
@pytest.mark.parametrize("case", UNCOMMON, ids=str)
@pytest.mark.parametrize("precision", MIXED, ids=lambda p: p.name)
def test_every_mode_and_activation(
    target: Target, precision: Precision, case: Case, mode: str, act: str | None
) -> None:
    p, call = case.problem(precision, target.device), Call(mode, act)
    check_forward(kernels(target, p.x.dtype), p, call)
    check_backward(kernels(target, p.x.dtype), p, call)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("precision", MIXED, ids=lambda p: p.name)
def test_special_values(target: Target, precision: Precision, layout: str) -> None:
    check_special_values(target, precision, layout)


@pytest.mark.parametrize("precision", [MIXED[2], MIXED[3]], ids=lambda p: p.name)
def test_values_as_stored(target: Target, precision: Precision) -> None:
    check_values_as_stored(target, precision)


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4, 4), (2, 3, 0, 4)])
@MODE
def test_empty(target: Target, shape: tuple[int, ...], mode: str) -> None:
    check_empty(target, shape, mode)


@MODE
def test_frozen_parameters(target: Target, mode: str) -> None:
    check_frozen_parameters(target, mode)
