"""The kernel of ``update`` on the host, in random orders of threads and blocks."""

import pytest
import torch

from tests.backends.cuda_on_cpu.host import on_the_host
from tests.backends.cuda_on_cpu.sandbox import sandboxed
from tests.support.cases import Target
from tests.support.updates import CASES, Case, call_of, check_update, update

TARGET = Target("cuda", "cpu")


@pytest.mark.parametrize("case", CASES, ids=str)
@sandboxed
def test_against_the_formula(case: Case) -> None:
    on_the_host(check_update, TARGET, case)


@sandboxed
def test_same_bits_as_the_cpu() -> None:
    for case in CASES:
        on_the_host(_same_bits, case, update(Target("cpu", "cpu"), call_of(case)).results())


def _same_bits(case: Case, expected: list[torch.Tensor]) -> None:
    for t, expected_result in zip(update(TARGET, call_of(case)).results(), expected, strict=True):
        torch.testing.assert_close(t, expected_result, rtol=0, atol=0, equal_nan=True)
