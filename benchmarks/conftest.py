"""The shell: options, the ``compare`` fixture that every benchmark uses, the summary at the end and its JSON file."""

import gc
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch

from benchmarks.cases import shapes
from benchmarks.cases.shapes import Case, Inputs
from benchmarks.report import tables
from benchmarks.tools import timing
from benchmarks.tools.environment import environment
from benchmarks.tools.measurements import FORMAT, dump, measured, with_targets

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
RESULTS = pytest.StashKey[dict]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bnkern")
    group.addoption("--quick", action="store_true", help="tiny shapes, two rounds, nothing compiled: a smoke check")
    group.addoption(
        "--bnkern-json",
        metavar="PATH",
        type=Path,
        default=os.environ.get("BNKERN_BENCH_JSON"),  # pytest turns it into a Path too
        help="write environment, rows and targets here, after every case (also BNKERN_BENCH_JSON)",
    )
    group.addoption("--no-compile", action="store_true", help="leave torch.compile out: it takes seconds for each case")
    group.addoption("--budget", type=float, default=1.0, help="how many times each case's usual seconds to spend on it")
    group.addoption(
        "--shapes",
        metavar="NAMES",
        help="comma-separated shapes or sets of benchmarks/cases/shapes.py, or 'all'; for benchmarks of any shape",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``case``: the module's cases(device), which --shapes replaces where a module says that it takes ANY_SHAPE.

    ``mode``: one call after the other, and on a GPU graph replay.
    """
    if "case" in metafunc.fixturenames:
        asked = metafunc.config.getoption("shapes")
        if metafunc.config.getoption("quick"):
            cases = shapes.QUICK
        elif asked and getattr(metafunc.module, "ANY_SHAPE", False):
            cases = shapes.cases(asked.split(","), DEVICE)
        else:
            cases = metafunc.module.cases(DEVICE)
        metafunc.parametrize("case", cases, ids=str, scope="module")  # a module's tests go case by case
    if "mode" in metafunc.fixturenames:
        metafunc.parametrize("mode", timing.modes(DEVICE))


@pytest.fixture(scope="session")
def device() -> torch.device:
    return DEVICE


@pytest.fixture
def quick(request: pytest.FixtureRequest) -> bool:
    return request.config.getoption("quick")


@pytest.fixture
def without_compile(request: pytest.FixtureRequest) -> str | None:
    """Which option leaves torch.compile out, or None."""
    options = (
        option for option in ("--quick", "--no-compile") if request.config.getoption(option[2:].replace("-", "_"))
    )
    return next(options, None)


@pytest.fixture(scope="module")
def inputs(case: Case, device: torch.device) -> Inputs:
    if (needed := shapes.TENSORS_AT_ONCE * case.nbytes) > (there := shapes.memory(device)):
        pytest.skip(f"{case} needs some {needed / 1e9:.0f} GB of memory, {there / 1e9:.0f} are there")
    torch.manual_seed(0)
    return Inputs.random(case, device)


@pytest.fixture
def compare(benchmark, request: pytest.FixtureRequest, quick: bool) -> Iterator[Callable]:
    """``compare(op, case, providers, make_data, ...)`` times the providers in turn and adds a row for each.

    The first provider is ours; the peers have their turn in what pytest-benchmark calls set-up. Its own columns are
    of our whole samples, with an untimed call or with all sets of buffers in them (see timing.py); the times per
    call are in extra_info, in the summary and in our JSON.

    ``missing``: peers that could not be had, and why. ``moved(name)``: the "bytes" that a provider's call moves.
    ``check(output)``: what to add to a row after looking at what its provider computed. ``nbytes``: the size of what
    a call works on, where that is not a tensor of the case.
    """

    def run(
        op: str,
        case: Case,
        providers: Mapping[str, Callable],
        make_data: Callable[[], object],
        mode: str = "call",
        missing: Mapping[str, str] | None = None,
        moved: Callable[[str], dict] = lambda name: {},
        check: Callable[[object], dict] = lambda output: {},
        nbytes: float | None = None,
        budget_s: float = 1.5,
    ) -> None:
        comparison = timing.Comparison(timing.samplers(providers, make_data, nbytes or case.nbytes, DEVICE, mode))
        round_s = comparison.warm_up()
        rounds = 2 if quick else timing.rounds_within(budget_s * request.config.getoption("budget"), round_s)
        gc.collect()
        gc.disable()  # a collection would fall into somebody's sample
        try:
            if benchmark.stats is None:
                benchmark.pedantic(comparison.sample_first, setup=comparison.sample_peers, rounds=rounds)
            else:  # it takes one comparison of a test; the next ones are in our summary and file alone
                for _ in range(rounds):
                    comparison.sample_peers()
                    comparison.sample_first()
        finally:
            gc.enable()

        bench = request.function.__name__.removeprefix("test_")
        label = {
            "bench": bench,
            "op": op,
            **case._asdict(),
            "size": case.size,
            "tensor_bytes": case.nbytes,
            "mode": mode,
        }
        data = make_data()
        rows = [
            label | {"provider": name} | measured(comparison, name, moved) | check(providers[name](data))
            for name in comparison.samplers
        ]
        absent = comparison.missing | dict(missing or {})
        rows += [label | {"provider": name, "missing": why} for name, why in absent.items()]
        benchmark.group = bench
        benchmark.extra_info.update({f"{row['provider']} ms": row.get("median_ms", "missing") for row in rows})
        _add(request.config, rows)

    yield run
    gc.collect()


@pytest.fixture
def add_rows(request: pytest.FixtureRequest) -> Callable[[list[dict]], None]:
    """Adds rows that no clock has to do with."""
    return lambda rows: _add(request.config, rows)


def _add(config: pytest.Config, rows: list[dict]) -> None:
    if RESULTS not in config.stash:
        quick = config.getoption("quick")
        config.stash[RESULTS] = {"format": FORMAT, "quick": quick, "environment": environment(DEVICE), "rows": []}
    results = config.stash[RESULTS]
    results["rows"] += rows
    results["environment"]["load average at end"] = os.getloadavg()[0]
    if path := config.getoption("bnkern_json"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dump(with_targets(results)))


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    if RESULTS in config.stash:
        terminalreporter.section("bnkern")
        terminalreporter.write_line(tables.markdown(with_targets(config.stash[RESULTS])))
