"""Each phase, forward and backward, with a copy in the same rounds.

The copy is y.copy_(x) of 256 MiB into allocated memory, on as many threads as the phases. It counts as one read and one
write. The hardware may move more, because a store may first read the line that it writes. The same holds for a phase.
A shape that stays in the caches may be faster than the copy. The cost of records is measured against the same call
without records.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from benchmarks.cases import shapes, traffic
from benchmarks.cases.shapes import Case, Inputs
from bnkern import backends
from bnkern.backends.calls import BackwardCall, ForwardCall
from bnkern.backends.records import ACTIVATION, AFFINE, GRADIENT

ANY_SHAPE = True


def cases(device: torch.device) -> list[Case]:
    """A shape that fits the caches, and one of 103 MB in every dtype, which does not."""
    large = {"fp32": "large", "bf16": "large64", "fp16": "large64"}
    cached = shapes.cases(("stage1",), device)
    return cached + [case._replace(shape=large[case.dtype]) for case in cached]


def bound(call: str, op: str, inputs: Inputs, recorded: bool = False) -> partial:
    """The backend's function bound to its arguments, if ``recorded`` with all records of a whole call."""
    x, residual, dy = inputs
    residual, act = (residual, "relu") if op == "bn_add_relu" else (None, None)
    backend = backends.choose(backends.forced(), x.device, x.dtype)
    count, mean, m2 = backend.moments(x)
    invstd = torch.rsqrt(m2 / count + 1e-5)
    weight, bias = torch.rand_like(mean) + 0.5, torch.randn_like(mean)
    running = torch.zeros_like(mean), torch.ones_like(mean), torch.zeros((), dtype=torch.int64, device=x.device)
    record, *records = (_empty_record(fields, x) if recorded else None for fields in (ACTIVATION, GRADIENT, AFFINE))
    forward = ForwardCall(x, weight, bias, residual, *running, True, 0.1, 1e-5, act, act is not None, record)
    _, mask = backend.normalize(forward, mean, invstd)
    needs = True, True, True, residual is not None
    backward = BackwardCall(dy, x, weight, bias, mean, invstd, mask, act, True, needs, *records)
    arguments = {
        "moments": lambda: (x,),
        "normalize": lambda: (forward, mean, invstd),
        "grad_sums": lambda: (backward,),
        "grad_input": lambda: (backward, (*backend.grad_sums(backward), count)),
        "forward": lambda: (forward,),
        "backward": lambda: (backward,),
    }[call]
    return partial(getattr(backend, call), *arguments())


def _empty_record(fields: tuple[str, ...], x: Tensor) -> Tensor:
    return torch.empty(len(fields), x.shape[1], dtype=torch.float64, device=x.device)


@pytest.fixture(scope="module")
def copy(device: torch.device) -> Callable:
    x = torch.randn(traffic.COPY_BYTES // 4, device=device)
    return partial(torch.empty_like(x).copy_, x)


@pytest.fixture
def measure(case: Case, mode: str, inputs: Inputs, copy: Callable, compare: Callable) -> Callable:
    def run(call: str, op: str) -> None:
        moved = {
            "bnkern": traffic.moved((call,), op, case.elements, case.itemsize),
            "copy": {"bytes": 2 * traffic.COPY_BYTES},
        }
        compare(
            op,
            case,
            {"bnkern": lambda function: function(), "copy": lambda _: copy()},
            make_data=lambda: bound(call, op, inputs.clone()),
            mode=mode,
            moved=moved.__getitem__,
            budget_s=1.0,
        )

    return run


def test_moments(measure: Callable) -> None:
    measure("moments", "bn")


@pytest.mark.parametrize("op", traffic.OPS)
def test_normalize(op: str, measure: Callable) -> None:
    measure("normalize", op)


@pytest.mark.parametrize("op", traffic.OPS)
def test_grad_sums(op: str, measure: Callable) -> None:
    measure("grad_sums", op)


@pytest.mark.parametrize("op", traffic.OPS)
def test_grad_input(op: str, measure: Callable) -> None:
    measure("grad_input", op)


@pytest.mark.parametrize("op", traffic.OPS)
def test_forward(op: str, measure: Callable) -> None:
    measure("forward", op)


@pytest.mark.parametrize("op", traffic.OPS)
def test_backward(op: str, measure: Callable) -> None:
    measure("backward", op)


@pytest.mark.parametrize("call", traffic.PHASED)
@pytest.mark.parametrize("op", traffic.OPS)
def test_records(op: str, call: str, case: Case, mode: str, inputs: Inputs, compare: Callable) -> None:
    """A call with all its records, and the same call without."""
    compare(
        f"{op} {call}",
        case,
        {"bnkern": lambda functions: functions[1](), "without records": lambda functions: functions[0]()},
        make_data=lambda: [bound(call, op, inputs.clone(), recorded) for recorded in (False, True)],
        mode=mode,
        moved=lambda _: traffic.moved((call,), op, case.elements, case.itemsize),
        budget_s=1.0,
    )
