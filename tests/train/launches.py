"""Training runs in several processes, started by torchrun."""

import os
import subprocess
import sys
from pathlib import Path

from bnkern.train.loop import train
from tests import ROOT
from tests.train.training import images, tiny

RUNS = {
    "plain": {"norm": "none"},
    "again": {"norm": "none"},  # the run is repeated after its last checkpoint and all later files are lost
    "diverging": {"norm": "none", "lr": 16.0, "warmup": 7, "drops": []},
    "batch": {"norm": "batch", "batch": 12, "log_every": 2},  # the ranks have 6 or 4 images
    "final": {"norm": "final", "batch": 12, "log_every": 2},
}
SCRIPT = """
import sys, torch, torch.distributed as dist
torch.set_num_threads(1)
from pathlib import Path
from bnkern.train.processes import process_group
from tests.train.launches import one_run
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
    """Runs in float64, so that several processes and one differ only in the order of sums."""
    settings = {"precision": "fp64", "lr": 1 / 64, "checkpoint_every": 4, "deterministic": True}
    train(tiny(**settings | RUNS[name]), folder / name, images())


def torchrun(folder: Path, processes: int, *names: str) -> Path:
    """Executes the runs in that many processes, all in one launch, because starting takes longer than training."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--rdzv-backend=c10d"]
    (folder / "run.py").write_text(SCRIPT)
    command += ["--rdzv-endpoint=localhost:0", str(folder / "run.py"), str(folder), *names]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    assert "FutureWarning" not in process.stderr, process.stderr
    return folder
