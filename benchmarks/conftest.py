"""Options, the fixture ``compare`` that every benchmark uses, the summary at the end, and the results file."""

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
    group.addoption("--quick", action="store_true", help="a smoke test: tiny shapes, two rounds, no torch.compile")
    group.addoption(
        "--bnkern-json",
        metavar="PATH",
        type=Path,
        default=os.environ.get("BNKERN_BENCH_JSON"),  # pytest converts it to a Path too
        help="write environment, measurements and targets here, after every case (also BNKERN_BENCH_JSON)",
    )
    group.addoption(
        "--no-compile", action="store_true", help="leave out torch.compile, which takes seconds for each case"
    )
    group.addoption("--budget", type=float, default=1.0, help="a factor on the time that is spent on each case")
    group.addoption(
        "--shapes",
        metavar="NAMES",
        help="comma-separated shapes or sets of benchmarks/cases/shapes.py, or 'all'; for benchmarks of any shape",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrizes ``case`` by the module's cases(device), or by --shapes if the module sets ANY_SHAPE.

    ``mode`` is a call at a time, and on a GPU also the replay of a graph.
    """
    if "case" in metafunc.fixturenames:
        requested = metafunc.config.getoption("shapes")
        if metafunc.config.getoption("quick"):
            cases = shapes.QUICK
        elif requested and getattr(metafunc.module, "ANY_SHAPE", False):
            cases = shapes.cases(requested.split(","), DEVICE)
        else:
            cases = metafunc.module.cases(DEVICE)
        metafunc.parametrize(
            "case", cases, ids=str, scope="module"
        )  # all tests of a module run on one case before the next
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
    """The option that leaves out torch.compile, or None."""
    options = (
        option for option in ("--quick", "--no-compile") if request.config.getoption(option[2:].replace("-", "_"))
    )
    return next(options, None)


@pytest.fixture(scope="module")
def inputs(case: Case, device: torch.device) -> Inputs:
    if (needed := shapes.TENSORS_AT_ONCE * case.nbytes) > (free := shapes.memory(device)):
        pytest.skip(f"{case} needs about {needed / 1e9:.0f} GB of memory; {free / 1e9:.0f} GB are free")
    torch.manual_seed(0)
    return Inputs.random(case, device)


@pytest.fixture
def compare(benchmark, request: pytest.FixtureRequest, quick: bool) -> Iterator[Callable]:
    """``compare(op, case, providers, make_data, ...)`` times the providers in turn and adds a measurement for each.

    The first provider is bnkern. The peers run in what pytest-benchmark calls set-up. Its own columns show the whole
    samples of bnkern, which include an untimed call or all sets of buffers (see timing.py). The times per call are in
    extra_info, in the summary and in the results file.

    ``missing`` names the peers that are not available, with the reason. ``moved(name)`` returns the "bytes" that a call
    of a provider moves. ``check(output)`` returns further entries for the measurement, computed from the output of its
    provider. ``nbytes`` is the size of what a call works on, if that is not a tensor of the case.
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
        gc.disable()  # a collection would add to the time of one sample
        try:
            if benchmark.stats is None:
                benchmark.pedantic(comparison.sample_first, setup=comparison.sample_peers, rounds=rounds)
            else:  # pytest-benchmark takes one comparison per test; the others are only in the summary and the file
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
        measurements = [
            label | {"provider": name} | measured(comparison, name, moved) | check(providers[name](data))
            for name in comparison.samplers
        ]
        unavailable = comparison.missing | dict(missing or {})
        measurements += [label | {"provider": name, "missing": reason} for name, reason in unavailable.items()]
        benchmark.group = bench
        benchmark.extra_info.update({f"{m['provider']} ms": m.get("median_ms", "missing") for m in measurements})
        _add(request.config, measurements)

    yield run
    gc.collect()


@pytest.fixture
def add_measurements(request: pytest.FixtureRequest) -> Callable[[list[dict]], None]:
    """Adds measurements other than times."""
    return lambda measurements: _add(request.config, measurements)


def _add(config: pytest.Config, measurements: list[dict]) -> None:
    if RESULTS not in config.stash:
        quick = config.getoption("quick")
        config.stash[RESULTS] = {"format": FORMAT, "quick": quick, "environment": environment(DEVICE), "rows": []}
    results = config.stash[RESULTS]
    results["rows"] += measurements
    results["environment"]["load average at end"] = os.getloadavg()[0]
    if path := config.getoption("bnkern_json"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dump(with_targets(results)))


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    if RESULTS in config.stash:
        terminalreporter.section("bnkern")
        terminalreporter.write_line(tables.markdown(with_targets(config.stash[RESULTS])))
