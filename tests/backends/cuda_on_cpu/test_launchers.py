"""Calls of the backend "cuda" over the kernels on the host: how csrc/call reads, allocates and passes on arguments."""

import pytest

from bnkern.backends import cuda
from bnkern.backends.calls import BackwardCall, ForwardCall
from bnkern.backends.layout import layout
from bnkern.backends.records import ACTIVATION, AFFINE, GRADIENT
from tests.backends.cuda_on_cpu.host import NothingLaunched, on_the_host
from tests.backends.cuda_on_cpu.sandbox import sandboxed
from tests.support import record_cases
from tests.support.batch_norm import check_add_act, check_batch_norm, check_counter, check_running_statistics
from tests.support.cases import BF16, CASE, FP32, PURE, Case, Precision, Target, exact
from tests.support.phases import (
    check_grad_input_without,
    check_grad_sums_without,
    check_moments,
    check_normalize_without,
)
from tests.support.record_cases import (
    ACTS,
    MODES,
    Call,
    assert_activation,
    assert_affine,
    assert_gradient,
    check_backward,
    check_forward,
    empty_record,
)

TARGET = Target("cuda", "cpu")
CASES = [CASE[name] for name in ("nchw_tail", "sliced_space", "nhwc", "nhwc_c5_s49", "nc", "expanded_channels")]


@pytest.mark.parametrize("case", CASES, ids=str)
@sandboxed
def test_every_mode(case: Case) -> None:
    for mode in ("training", "untracked", "eval"):
        on_the_host(_fused, case, FP32, mode)
    for precision in (BF16, PURE[0]):
        on_the_host(_fused, case, precision, "training", single_read_from=1 << 40)


def _fused(case: Case, precision: Precision, mode: str) -> None:
    for act, residual in (("relu", False), ("relu", True), (None, False)):
        check_batch_norm(TARGET, case, precision, mode, act, residual)


@pytest.mark.parametrize("case", CASES, ids=str)
@sandboxed
def test_phases_and_identity(case: Case) -> None:
    on_the_host(check_moments, TARGET, FP32, case)
    for without in ("weight", "identity"):
        on_the_host(check_normalize_without, TARGET, FP32, case, without, True, "relu")
        on_the_host(check_grad_sums_without, TARGET, FP32, case, without, "relu")
        on_the_host(check_grad_input_without, TARGET, FP32, case, without, "saved mask")
    on_the_host(check_add_act, TARGET, BF16, case, "relu", True)


@pytest.mark.parametrize("case", CASES, ids=str)
@sandboxed
def test_records(case: Case) -> None:
    on_the_host(_recorded, case, FP32, "training")
    on_the_host(_recorded, case, PURE[0], "training", single_read_from=1 << 40)
    on_the_host(_recorded_by_phases, case)


def _recorded(case: Case, precision: Precision, mode: str) -> None:
    p = case.problem(precision)
    for act in ACTS:
        check_forward(cuda, p, Call(mode, act))
        check_backward(cuda, p, Call(mode, act), samples=False)


def _recorded_by_phases(case: Case) -> None:
    """As SyncBatchNorm calls them: statistics and sums are those of more values than these tensors hold."""
    p = case.problem(FP32)
    mean, invstd, count = p.mean + 0.5 / p.invstd, 0.8 * p.invstd, 2 * layout(p.x).count
    activation, gradient, affine = (empty_record(r, p.x) for r in (ACTIVATION, GRADIENT, AFFINE))
    y, mask = cuda.normalize(
        ForwardCall(p.x, p.weight, p.bias, p.residual, act="relu", save_mask=True, record=activation), mean, invstd
    )
    call = BackwardCall(
        p.dy, p.x, p.weight, p.bias, mean, invstd, mask, "relu", record_gradient=gradient, record_affine=affine
    )
    assert_activation(activation, *exact(p.x, y), p.x.dtype)
    sums = cuda.grad_sums(call)
    assert_affine(affine, p, mean, invstd, y, "relu")
    dx, _ = cuda.grad_input(call, (*sums, count))
    assert_gradient(gradient, dx)


@sandboxed
def test_records_of_the_shared_tests() -> None:
    """Every sign, infinities and NaN, parameters without gradients, values that round to zero, and empty tensors."""
    for layout_of in ("contiguous", "channels_last"):
        for precision in (FP32, BF16):
            on_the_host(record_cases.check_special_values, TARGET, precision, layout_of, False)
    for mode in MODES:
        on_the_host(record_cases.check_frozen_parameters, TARGET, mode)
        with pytest.raises(NothingLaunched):
            on_the_host(record_cases.check_empty, TARGET, (0, 3, 4, 4), mode)
    on_the_host(record_cases.check_values_as_stored, TARGET, BF16)


@sandboxed
def test_running_statistics() -> None:
    for momentum in (0.1, None):
        on_the_host(check_running_statistics, TARGET, PURE[0], momentum)
    on_the_host(check_counter, TARGET)
