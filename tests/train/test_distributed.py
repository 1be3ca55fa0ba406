"""A run in two or three processes (torchrun, gloo, DDP, SyncBatchNorm) and the same run in one with the joint batch."""

from pathlib import Path

import pytest
import torch

from bnkern.train.runlog import rows
from tests.train.launches import one_run, torchrun
from tests.train.training import TIMING, assert_same_run, tensors


@pytest.fixture(scope="module")
def unnormalised(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return torchrun(tmp_path_factory.mktemp("two"), 2, "plain", "again", "diverging")


@pytest.fixture(scope="module", params=[2, 3])
def normalised(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    return torchrun(tmp_path_factory.mktemp("some"), request.param, "batch", "final")


def assert_close_run(several: Path, single: Path) -> None:
    """Parameters, running statistics, velocities and metrics: in 12 steps a rounding of 1e-16 grows by less than a
    million.
    """
    ours, theirs = tensors(several), tensors(single)
    assert ours.keys() == theirs.keys() and len(ours) > 20
    for name, value in theirs.items():
        if not name.startswith("/rng"):
            torch.testing.assert_close(ours[name], value, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
    written = [rows(folder) for folder in (several, single)]
    assert len(written[0]) == len(written[1]) > 5
    for row, expected in zip(*written, strict=True):
        assert row.keys() == expected.keys()
        for key in row.keys() - {*TIMING, "event"}:
            assert row[key] == pytest.approx(expected[key], rel=1e-10), key


def test_two_processes_are_one(unnormalised: Path, tmp_path: Path) -> None:
    one_run("plain", tmp_path)
    assert_close_run(unnormalised / "plain", tmp_path / "plain")


@pytest.mark.parametrize("name", ["batch", "final"])
def test_processes_are_one_with_batch_norm(normalised: Path, tmp_path: Path, name: str) -> None:
    one_run(name, tmp_path)
    assert_close_run(normalised / name, tmp_path / name)


def test_two_processes_stop_at_the_same_step(unnormalised: Path, tmp_path: Path) -> None:
    """Divergence is decided from the joint batch. Otherwise one process would wait forever for the other."""
    one_run("diverging", tmp_path)
    two, single = (rows(folder / "diverging")[-1] for folder in (unnormalised, tmp_path))
    assert single["event"] == two["event"] == "diverged" and single["step"] == two["step"] > 7
    assert float(two["loss"]) == pytest.approx(float(single["loss"]), rel=1e-8)


def test_two_processes_resume(unnormalised: Path) -> None:
    """Resuming from rank 0's checkpoint gives the bits of the uninterrupted run."""
    assert_same_run(unnormalised / "plain", unnormalised / "again")
