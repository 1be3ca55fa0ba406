"""What the kernels record beside their results: exact counts, sums to rounding, and not a bit changed elsewhere."""

import pytest
import torch

from bnkern import backends
from bnkern.backends import records, reference
from bnkern.backends.calls import BackwardCall, ForwardCall
from tests.support.cases import CASE, EPS, FEW, FP32, LAYOUTS, MIXED, SWEEP, Case, Precision, Problem, Target
from tests.support.record_cases import ACTS, MODES, Call, check_backward, check_forward, empty_record

ACT = pytest.mark.parametrize("act", ACTS)
MODE = pytest.mark.parametrize("mode", MODES)
# Lost channels, cancelling sums, tails, leftovers and copies: the cases for calls that are less common.
SOME = [
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
@pytest.mark.parametrize("case", SOME, ids=str)
@pytest.mark.parametrize("precision", MIXED, ids=lambda p: p.name)
def test_every_way_to_call(target: Target, precision: Precision, case: Case, mode: str, act: str | None) -> None:
    p, call = case.problem(precision, target.device), Call(mode, act)
    check_forward(kernels(target, p.x.dtype), p, call)
    check_backward(kernels(target, p.x.dtype), p, call)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("precision", MIXED, ids=lambda p: p.name)
def test_special_values(target: Target, precision: Precision, layout: str) -> None:
    """Each sign, both zeros, infinities and NaN, in whole vectors and in tails, where eval mode keeps them apart."""
    c = 5
    values = torch.tensor([0.0, -0.0, 1.5, -2.5, torch.inf, -torch.inf, torch.nan], dtype=precision.dtype)
    generator = torch.Generator().manual_seed(7)
    place = LAYOUTS[layout]

    def mixture() -> torch.Tensor:
        chosen = values[torch.randint(len(values), (3, c, 7, 9), generator=generator)]
        chosen[:, 1] = torch.nan  # a channel without any value that is not NaN
        chosen[:, 2] = 0.0
        return place(chosen).to(target.device)

    ones = torch.ones(c, dtype=precision.params, device=target.device)
    statistics = ones.to(reference.accumulator(precision.dtype))
    p = Problem(mixture(), ones, 0 * ones, mixture(), mixture(), 0 * statistics, statistics)
    for mode in ("eval", "identity"):
        for act in ACTS:
            check_forward(kernels(target, p.x.dtype), p, Call(mode, act))
            check_backward(kernels(target, p.x.dtype), p, Call(mode, act))


@pytest.mark.parametrize("precision", [MIXED[2], MIXED[3]], ids=lambda p: p.name)
def test_values_as_stored(target: Target, precision: Precision) -> None:
    """A dx and a y that round to zero are zero in the record."""
    tiny = torch.finfo(precision.dtype).smallest_normal * torch.finfo(precision.dtype).eps
    x = torch.ones(4, 3, 5, 5, dtype=precision.dtype, device=target.device)
    weight = torch.full((3,), 0.25, device=target.device)
    record, record_gradient = empty_record(records.ACTIVATION, x), empty_record(records.GRADIENT, x)
    module = kernels(target, x.dtype)
    settings = (None, None, None, None, None, False, 0.1, EPS, None, False)
    y = module.forward(ForwardCall(x * tiny, weight, *settings, record=record))[0]
    needs = (True, False, False, False)
    dx, *_ = module.backward(
        BackwardCall(x * tiny, x, weight, None, None, None, None, None, False, needs, record_gradient=record_gradient)
    )
    assert (y == 0).all() and (dx == 0).all(), "the values were to vanish when stored"
    assert record[records.ACTIVATION.index("active")].tolist() == [0.0] * 3
    assert record_gradient[records.GRADIENT.index("zero")].tolist() == [100.0] * 3


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4, 4), (2, 3, 0, 4)])
@MODE
def test_empty(target: Target, shape: tuple[int, ...], mode: str) -> None:
    x = torch.empty(shape, device=target.device)
    vector = torch.ones(3, device=target.device)
    p, call = Problem(x, vector, vector, x, x, vector, vector), Call(mode, "relu")
    record, gradient, affine = (empty_record(r, x) for r in (records.ACTIVATION, records.GRADIENT, records.AFFINE))
    _, *saved = call.forward(kernels(target, x.dtype), p, record)[:4]
    expected = torch.zeros(8, 3, dtype=torch.float64)
    expected[5], expected[6] = torch.inf, -torch.inf
    assert torch.equal(record.cpu(), expected)
    call.backward(kernels(target, x.dtype), p, saved, call.needs(p), record_gradient=gradient, record_affine=affine)
    assert not gradient.any()
    assert not affine.any() or mode == "identity"


@MODE
def test_frozen_parameters(target: Target, mode: str) -> None:
    """The affine record is there though no parameter needs a gradient, and though nothing at all does."""
    p, call = CASE["nhwc_c5_s49"].problem(FP32, target.device), Call(mode, "relu")
    module = kernels(target, p.x.dtype)
    _, *saved = call.forward(module, p)[:4]
    seen = []
    for needs in (call.needs(p), (True, False, False, False), (False,) * 4):
        affine, gradient = empty_record(records.AFFINE, p.x), empty_record(records.GRADIENT, p.x)
        dx, *_ = call.backward(module, p, saved, needs, record_affine=affine, record_gradient=gradient)
        untouched = torch.equal(gradient, empty_record(records.GRADIENT, p.x))
        assert untouched == (dx is None), "a record of dx wants a dx"
        seen.append(affine)
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2])
