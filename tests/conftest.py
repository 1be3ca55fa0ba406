"""Fixtures of all tests: the backends and precisions, deterministic settings, processes for ranks, and ``--sample``."""

import zlib
from collections.abc import Iterator

import hypothesis
import pytest
import torch

import bnkern
from tests.support.cases import PRECISIONS, TARGETS, Precision, Target
from tests.support.ranks import WORLD, Ranks

hypothesis.settings.register_profile("same-every-run", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("same-every-run")

# Tests run in parallel, one process per core. The number of threads is the subject of test_threads.py.
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--sample", type=int, default=1, metavar="N", help="about one test in N, by its name: the same ones every time"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = [item for item in items if zlib.crc32(item.nodeid.encode()) % config.getoption("sample")]
    if left_out:
        items[:] = [item for item in items if item not in set(left_out)]
        config.hook.pytest_deselected(items=left_out)


@pytest.fixture(
    params=[
        pytest.param(target, id=str(target), marks=[pytest.mark.gpu] if target.device == "cuda" else [])
        for target in TARGETS
    ]
)
def target(request: pytest.FixtureRequest) -> Iterator[Target]:
    """Each backend that works on this machine, with its device. The backend is forced for the duration of the test."""
    with bnkern.use_backend(request.param.backend):
        yield request.param


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> object:
    """Skips a test in which the CUDA backend refuses its dtype, float64, with the message of the error."""
    try:
        return (yield)
    except RuntimeError as error:
        target = pyfuncitem.funcargs.get("target")
        if getattr(target, "backend", "") == "cuda" and str(error).startswith("backend 'cuda' "):
            pytest.skip(str(error))
        raise


@pytest.fixture(params=PRECISIONS, ids=lambda precision: precision.name)
def precision(request: pytest.FixtureRequest) -> Precision:
    """Each dtype of activations, with float32 vectors and with vectors of the same dtype."""
    return request.param


@pytest.fixture
def threads() -> Iterator[None]:
    """Restores torch's number of threads after a test that sets it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def pool() -> Iterator[list[Ranks]]:
    running: list[Ranks] = []
    yield running
    for ranks in running:
        ranks.end()


@pytest.fixture
def ranks(pool: list[Ranks]) -> Ranks:
    """Three processes, started at the first use, and again after a test that ended one of them."""
    if not pool or not pool[-1].alive:
        pool.append(Ranks(WORLD))
    return pool[-1]
