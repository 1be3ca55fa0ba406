"""The results have the same bits in every run, for every number of threads, and in recycled memory."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

import bnkern
from bnkern import backends
from tests.backends.cpu.results import LARGE, all_results
from tests.support.cases import CASE, CASES, FEW, MIXED, Case, Precision, Target

MEGABYTES = Case("megabytes", (8, 16, 128, 130), "8.5 MB of fp32: the results have their own huge pages")
# More than 24 MB of fp32, which the caches do not hold. Rows are processed batch by batch, and non-temporal stores
# write the results.
HUGE = [
    Case("huge_rows", (50, 600, 15, 15), "rows larger than the caches", "channels_last"),
    Case("huge_planes", (16, 6, 256, 260), "planes larger than the caches"),
]


def assert_same(runs: list[list[Tensor]]) -> None:
    for run in runs[1:]:
        for k, (first, other) in enumerate(zip(runs[0], run, strict=True)):
            same = torch.equal(first.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))
            assert same, f"result {k} differs"


@pytest.fixture
def with_threads(threads: None) -> Callable:
    def run(count: int, *args: object) -> list[Tensor]:
        torch.set_num_threads(count)
        return all_results(*args)

    return run


@pytest.mark.parametrize("case", [*LARGE, *FEW], ids=str)
@pytest.mark.parametrize("precision", MIXED, ids=lambda p: p.name)
def test_number_of_threads(with_threads: Callable, precision: Precision, case: Case) -> None:
    target = Target("cpu", "cpu")
    assert_same([with_threads(count, target, case, precision) for count in (1, 2, 3, 8)])


@pytest.mark.parametrize("case", HUGE, ids=str)
def test_number_of_threads_beyond_the_caches(with_threads: Callable, case: Case) -> None:
    target = Target("cpu", "cpu")
    assert_same([with_threads(count, target, case, MIXED[0]) for count in (1, 2)])


@pytest.mark.parametrize("case", [*LARGE, CASE["inf_rows"], CASE["ratio_1e4"]], ids=str)
def test_repeated_runs(target: Target, case: Case) -> None:
    for precision in MIXED:
        if backends.unavailable(target.backend, target.device, precision.dtype) is None:
            assert_same([all_results(target, case, precision) for _ in range(3)])


@pytest.mark.parametrize("case", [*LARGE, MEGABYTES], ids=str)
def test_recycled_memory(target: Target, case: Case) -> None:
    """The memory of earlier results is reused. It is filled with NaN before it is freed."""
    runs = []
    for _ in range(3):
        results = all_results(target, case, MIXED[0])
        runs.append([t.clone() for t in results])
        for t in results:
            t.fill_(torch.nan if t.is_floating_point() else 255)
        del t, results
    assert_same(runs)


def test_results_outlive_later_calls(target: Target) -> None:
    """A view of a result keeps the memory from later calls, even after the result itself is gone."""
    p = MEGABYTES.problem(MIXED[0], target.device)
    with bnkern.use_backend(target.backend):
        views = [bnkern.add_act(p.x + k)[1:, 2:] for k in range(3)]
        for _ in range(3):
            bnkern.add_act(p.x * 0)
    for k, view in enumerate(views):
        assert torch.equal(view, (p.x + k).relu()[1:, 2:])


def test_calls_from_several_threads(target: Target) -> None:
    """Calls in several Python threads at the same time, in kernels that release the GIL, are independent."""
    cases = [MEGABYTES, *LARGE[:6], MEGABYTES]
    expected = [all_results(target, case, MIXED[0]) for case in cases]
    with ThreadPoolExecutor(len(cases)) as pool:
        for _ in range(3):
            concurrent = pool.map(lambda case: all_results(target, case, MIXED[0]), cases)
            for first, second in zip(expected, concurrent, strict=True):
                assert_same([first, second])


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("precision", MIXED, ids=lambda p: p.name)
def test_number_of_threads_over_all_cases(with_threads: Callable, precision: Precision, case: Case) -> None:
    target = Target("cpu", "cpu")
    assert_same([with_threads(count, target, case, precision) for count in (1, 2, 5)])
