"""The files of a run: ``config.json``, ``env.json``, ``metrics.jsonl``, ``checkpoint.pt`` and, written last, ``DONE``.

Each line of ``metrics.jsonl`` is a JSON object with ``event`` and ``step``, the number of updates so far:

    train     every ``log_every`` steps, over the steps since the previous line: mean ``loss``, ``accuracy``,
              ``lr`` of the last step, ``images_per_second``, and ``diverged``, which is false here
    epoch     at the end of an epoch: ``train_loss`` and ``train_accuracy`` of its augmented batches, if evaluated
              ``test_loss`` and ``test_accuracy`` (and those of the validation images), and ``seconds``
    diverged  at the end of a run that diverged: the ``loss`` that was too large, ``diverged``: true

``epoch`` counts from 0. A number that is not finite is written as "nan", "inf" or "-inf", which ``float`` reads.
Only ``seconds`` and ``images_per_second`` differ between two runs of one config on one machine.
"""

import contextlib
import json
import math
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import bnkern
from bnkern import backends

from .checkpoint import replace


class Outcome(NamedTuple):
    """How a run ended. ``diverged`` is the step whose loss was above the limit, or None if there was none.

    Accuracies are shares from 0 to 1: those of the last epoch, and the best test accuracy of all epochs, which is
    optimistic. They are None if nothing was evaluated.
    """

    steps: int
    diverged: int | None
    train_accuracy: float | None
    test_accuracy: float | None
    best_test_accuracy: float | None


def outcome(folder: Path) -> Outcome:
    """Returns the outcome of a run according to its metrics."""
    written = rows(folder)
    last = written[-1] if written else {"step": 0}
    epochs = [row for row in written if row["event"] == "epoch"]
    tests = [row["test_accuracy"] for row in epochs if "test_accuracy" in row]
    return Outcome(
        last["step"],
        last["step"] if last.get("diverged") else None,
        epochs[-1]["train_accuracy"] if epochs else None,
        tests[-1] if tests else None,
        max(tests, default=None),
    )


def rows(folder: Path) -> list[dict]:
    """Returns the complete lines of a run's ``metrics.jsonl``, without a last line that a crash has cut short."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


class Metrics:
    """Writes ``metrics.jsonl`` and, if ``tensorboard`` is True, the same numbers for TensorBoard in ``tensorboard/``.

    Lines after ``step``, the step of the checkpoint from which a run continues, are removed, and so is a line of its
    divergence.

    Raises:
        RuntimeError: ``tensorboard`` is True and TensorBoard is not installed.
    """

    def __init__(self, folder: Path, step: int, tensorboard: bool = False) -> None:
        self._mirror = _summary_writer(folder / "tensorboard", step) if tensorboard else None
        kept = [row for row in rows(folder) if row["step"] <= step and row["event"] != "diverged"]
        path = folder / "metrics.jsonl"
        replace(path, "".join(map(_line, kept)).encode())
        self._file = path.open("a")

    def append(self, event: str, step: int, **values: object) -> None:
        self._file.write(_line({"event": event, "step": step, **values}))
        self._file.flush()
        if self._mirror:
            for name, value in values.items():
                if name != "epoch" and type(value) in (int, float):
                    self._mirror.add_scalar(f"{event}/{name}", value, step)

    def sync(self) -> None:
        """Waits until everything is on the disk."""
        os.fsync(self._file.fileno())
        if self._mirror:
            self._mirror.flush()

    def close(self) -> None:
        self._file.close()
        if self._mirror:
            self._mirror.close()


def _line(row: dict) -> str:
    finite = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    return json.dumps(finite, allow_nan=False) + "\n"


def _summary_writer(folder: Path, step: int):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise RuntimeError("the metrics for TensorBoard need tensorboard: pip install tensorboard") from error
    return SummaryWriter(str(folder), purge_step=step + 1)


# ------------------------------------------------------------------------------------------------ the folder


def write_json(path: Path, content: dict) -> None:
    replace(path, (json.dumps(content, indent=1) + "\n").encode())


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())


def finished(folder: Path, config: dict) -> bool:
    """Whether the run in ``folder`` is finished and has this config."""
    return (folder / "DONE").exists() and read_json(folder / "config.json") == config


def differing(folder: Path, config: dict) -> list[str]:
    """Returns the names of the settings that differ from those of the run in ``folder``, if there is a run."""
    if not (folder / "config.json").exists():
        return []
    existing = read_json(folder / "config.json")
    return [name for name in config | existing if config.get(name) != existing.get(name)]


def put_aside(folder: Path) -> None:
    """Moves a run that is to be done again into the folder ``.old`` beside it, from which no results are read."""
    old = folder.parent / ".old"
    old.mkdir(exist_ok=True)
    count = sum(other.name.startswith(f"{folder.name}~") for other in old.iterdir())
    folder.rename(old / f"{folder.name}~{count + 1}")


# ------------------------------------------------------------------------------------------------ environment


def environment(device: torch.device, kernels: str = "bnkern") -> dict:
    """Returns the environment of a run: code, versions, machine, and the backend that computes its batch norm."""
    served = kernels
    if kernels == "bnkern":
        module = backends.choose(backends.forced(), device, torch.float32)
        served = module.__name__.rpartition(".")[2]
    versions = {"python": platform.python_version(), "bnkern": bnkern.__version__, "torch": torch.__version__}
    with contextlib.suppress(PackageNotFoundError):
        versions["triton"] = version("triton")
    ours = bool(_git("ls-files", Path(__file__).name))  # False if installed inside the tree of another project
    return {
        "commit": (ours and _git("rev-parse", "--short=12", "HEAD")) or "none",
        "dirty": ours and bool(_git("status", "--porcelain")),
        "versions": versions | {"numpy": np.__version__},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cpu": _cpu(),
        "system": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "backend": served,
    }


def _git(*words: str) -> str:
    try:
        done = subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"
