"""A run in two or three processes (torchrun, gloo, DDP, SyncBatchNorm) against the same in one, on the joint batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bnkern.train.loop import train
from bnkern.train.runlog import rows
from tests import ROOT
from tests.train.training import TIMING, assert_same_run, images, tensors, tiny

RUNS = {
    "plain": {"norm": "none"},
    "again": {"norm": "none"},  # its last checkpoint and all that came after are lost, and it goes on
    "diverging": {"norm": "none", "lr": 16.0, "warmup": 7, "drops": []},
    "batch": {"norm": "batch", "batch": 12, "log_every": 2},  # shares of 6 and of 4
    "final": {"norm": "final", "batch": 12, "log_every": 2},
}
SCRIPT = """
import sys, torch, torch.distributed as dist
torch.set_num_threads(1)
from pathlib import Path
from bnkern.train.processes import process_group
from tests.train.test_distributed import one_run
with process_group("gloo"):
    for name in sys.argv[2:]:
        one_run(name, Path(sys.argv[1]))
        if name == "again":
            if dist.get_rank() == 0:
                (Path(sys.argv[1]) / "again/DONE").unlink()
                (Path(sys.argv[1]) / "again/checkpoint.pt").unlink()
            one_run(name, Path(sys.argv[1]))
"""


def one_run(name: str, folder: Path) -> None:
    """float64, where processes and one differ in the order of sums alone."""
    settings = {"precision": "fp64", "lr": 1 / 64, "checkpoint_every": 4, "deterministic": True}
    train(tiny(**settings | RUNS[name]), folder / name, images())


def torchrun(folder: Path, processes: int, *names: str) -> Path:
    """Does the runs in that many processes, all in one launch, since starting takes longer than training."""
    words = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--rdzv-backend=c10d"]
    (folder / "run.py").write_text(SCRIPT)
    words += ["--rdzv-endpoint=localhost:0", str(folder / "run.py"), str(folder), *names]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "FutureWarning" not in done.stderr, done.stderr
    return folder


@pytest.fixture(scope="module")
def unnormalised(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return torchrun(tmp_path_factory.mktemp("two"), 2, "plain", "again", "diverging")


@pytest.fixture(scope="module", params=[2, 3])
def normalised(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    return torchrun(tmp_path_factory.mktemp("some"), request.param, "batch", "final")


def assert_close_run(several: Path, one: Path) -> None:
    """Parameters, running statistics, velocities, metrics: 12 steps let a rounding of 1e-16 grow, not by a million."""
    ours, theirs = tensors(several), tensors(one)
    assert ours.keys() == theirs.keys() and len(ours) > 20
    for name, value in theirs.items():
        if not name.startswith("/rng"):
            torch.testing.assert_close(ours[name], value, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
    written = [rows(folder) for folder in (several, one)]
    assert len(written[0]) == len(written[1]) > 5
    for row, other in zip(*written, strict=True):
        assert row.keys() == other.keys()
        for key in row.keys() - {*TIMING, "event"}:
            assert row[key] == pytest.approx(other[key], rel=1e-10), key


def test_two_processes_are_one(unnormalised: Path, tmp_path: Path) -> None:
    one_run("plain", tmp_path)
    assert_close_run(unnormalised / "plain", tmp_path / "plain")


@pytest.mark.parametrize("name", ["batch", "final"])
def test_processes_are_one_with_batch_norm(normalised: Path, tmp_path: Path, name: str) -> None:
    one_run(name, tmp_path)
    assert_close_run(normalised / name, tmp_path / name)


def test_two_processes_stop_at_the_same_step(unnormalised: Path, tmp_path: Path) -> None:
    """Divergence is that of the joint batch; a process that went on alone would wait for the other for ever."""
    one_run("diverging", tmp_path)
    two, one = (rows(folder / "diverging")[-1] for folder in (unnormalised, tmp_path))
    assert one["event"] == two["event"] == "diverged" and one["step"] == two["step"] > 7
    assert float(two["loss"]) == pytest.approx(float(one["loss"]), rel=1e-8)


def test_two_processes_resume(unnormalised: Path) -> None:
    """From rank 0's checkpoint, to the bits of the uninterrupted run."""
    assert_same_run(unnormalised / "plain", unnormalised / "again")
