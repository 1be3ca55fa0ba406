"""``update``: one step of SGD for all parameters of a network, by every backend."""

import pytest
import torch

from bnkern.backends import cpu
from tests.support.cases import Target
from tests.support.updates import CASES, FP64, Call, Case, call_of, check_update, update

CPU = Target("cpu", "cpu")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_the_formula(target: Target, case: Case) -> None:
    check_update(target, case)


@pytest.mark.parametrize("case", FP64, ids=str)
def test_float64(target: Target, case: Case) -> None:
    check_update(target, case, torch.float64)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_gradient_that_is_not_finite_changes_only_its_own_value(target: Target, value: float) -> None:
    call = call_of(CASES[0], device=target.device)
    call.gradients[3][5, 2, 1, 1] = value
    update(target, call)
    bad = [(~p.isfinite()).nonzero().tolist() for p in call.parameters]
    assert bad == [[], [], [], [[5, 2, 1, 1]], [], [], [], []]


def test_any_number_of_threads(threads: None) -> None:
    case = next(case for case in CASES if case.name == "several_threads")
    results = []
    for count in (1, 2, 3, 8):
        torch.set_num_threads(count)
        results.append(update(CPU, call_of(case)).results())
    for result in results:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("weight_decay", [0.0, 5e-4])
def test_same_bits_as_torchs_kernel(weight_decay: float) -> None:
    """For sizes that are multiples of 16. Torch rounds the end of other sizes differently: at most 1 ulp."""
    case = CASES[0]._replace(weight_decay=weight_decay)
    call, other = call_of(case), call_of(case)
    for _ in range(3):
        update(CPU, call)
        torch._fused_sgd_(
            other.parameters, other.gradients, other.parts(other.velocity), lr=other.lr, momentum=0.9,
            weight_decay=weight_decay, dampening=0.0, nesterov=False, maximize=False, is_first_step=False,
        )  # fmt: skip
    compared = 0
    velocities = zip(call.parts(call.velocity), other.parts(other.velocity), strict=True)
    for t, expected in (*zip(call.parameters, other.parameters, strict=True), *velocities):
        if t.numel() % 16 == 0:
            assert torch.equal(t, expected)
            compared += 1
        torch.testing.assert_close(t, expected, rtol=1e-6, atol=1e-6)
    assert compared == 12


def call_with(**changes: object) -> Call:
    return call_of(CASES[1])._replace(**changes)


def replaced(values: list, i: int, value: object) -> list:
    return [*values[:i], value, *values[i + 1 :]]


def with_gradient(i: int, gradient: torch.Tensor | None) -> Call:
    return call_with(gradients=replaced(call_with().gradients, i, gradient))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (call_with(parameters=[], gradients=[]), "parameters and gradients must be lists of the same length"),
        (call_with(gradients=call_with().gradients[1:]), "parameters and gradients must be lists of the same length"),
        (call_with(values=torch.zeros(64, dtype=torch.float16)), "values must be a float32 or float64 vector"),
        (call_with(values=call_with().values[:-1]), "values must be .* a multiple of 64"),
        (call_with(before=torch.zeros(64)), "before must be like values"),
        (call_with(velocity=call_with().values.double()), "velocity must be like values"),
        (call_with(shadow=call_with().values), "shadow must be a bfloat16 vector"),
        (call_with(lr=torch.zeros(1)), "lr must be a float32 scalar"),
        (call_with(stop=torch.tensor(1)), "stop must be a float32 scalar"),
        (with_gradient(2, None), "gradient 2 must be bfloat16, with the shape"),
        (with_gradient(1, torch.zeros(32, 16, 3, 3).bfloat16()), "gradient 1 must be .* strides of the parameter"),
        (with_gradient(5, torch.zeros(16).bfloat16()), "gradient 5 must be of the dtype"),
        (with_gradient(5, torch.zeros(8)), "gradient 5 must be .* the shape"),
    ],
)
def test_wrong_arguments(call: Call, message: str) -> None:
    values = call.values.clone()
    with pytest.raises(ValueError, match=f"update: {message}"):
        cpu.update(call)
    torch.testing.assert_close(call.values, values, rtol=0, atol=0, equal_nan=True)


def test_parameters_that_are_not_parts_of_the_values() -> None:
    for i, other in ((0, torch.zeros(16, 3, 3, 3)), (1, None), (5, call_with().parameters[5])):
        call = call_with()
        parameters = replaced(call.parameters, i, other)
        with pytest.raises(ValueError, match=f"parameter {i} must be"):
            cpu.update(call._replace(parameters=parameters))
    call = call_with()
    order = [1, 0, *range(2, 8)]
    with pytest.raises(ValueError, match="parameter 1 must be a view of values behind the one before it"):
        cpu.update(call._replace(**{n: [getattr(call, n)[i] for i in order] for n in ("parameters", "gradients")}))
