"""The runner: it plans the runs, finds the finished ones, and executes the others one after the other.

A run has the folder ``<out>/<experiment>/<scale>-<label>-seed<k>/`` with ``config.json`` (its configuration),
``env.json`` (machine and versions), ``probes/<file>.npz`` (the measurements), other files of its procedure, and
``DONE``, which is written last. A folder without DONE belongs to a run that was interrupted or has failed. After a
failure ``error.txt`` has the error. The next command repeats the run, from the state that its procedure has saved.
"""

import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from bnkern.train import cifar10
from bnkern.train.runlog import differing, environment, finished, put_aside, write_json

from . import spec
from .pace import REFERENCE, Kind, Pace, shares, step_seconds
from .procedures import PROCEDURES
from .results import configuration

INTERRUPTED = 130  # exit status after Ctrl-C


@dataclass(frozen=True)
class Planned:
    """One planned run: its folder and its whole configuration."""

    folder: Path
    config: dict
    seconds: float  # the expected time on the machine of the specs' minutes
    kept: Path | None = None  # a second folder in which the run may be finished

    @property
    def name(self) -> str:
        return f"{self.folder.parent.name}/{self.folder.name}"

    @property
    def kind(self) -> Kind:
        """The properties that determine its pace."""
        return Kind(self.config["procedure"], self.config["experiment"])

    def finished(self) -> bool:
        """Whether it is finished with its present configuration."""
        return any(finished(place, self.config) for place in (self.folder, self.kept) if place)


def plan(
    experiments: list[str], scale: str, data: str, seeds: int | None, out: Path, kept: Path | None = None
) -> list[Planned]:
    """All runs of the experiments: every configuration of their specs at that scale, for seeds 0, 1, ..."""
    planned_runs = []
    for experiment in experiments:
        about = spec(experiment)
        own_scale = about.scale(scale)
        runs = about.at(own_scale)
        share = shares(runs)
        for run in runs:
            for seed in range(seeds or run.seeds):
                config = configuration(experiment, about, run, own_scale, data, seed)
                name = f"{own_scale}-{run.label}-seed{seed}" + "-synthetic" * (config["data"] == "synthetic")
                kept_folder = kept / experiment / name if kept else None
                seconds = 60 * about.minutes.get(own_scale, 1) * share[run.label]
                planned_runs.append(Planned(out / experiment / name, config, seconds, kept_folder))
    return planned_runs


def run(
    experiments: list[str],
    scale: str = "reduced",
    data: str | None = None,
    device: str | None = None,
    seeds: int | None = None,
    out: Path = Path("results"),
    resume: bool = True,
    kept: Path | None = None,
    finished: Callable[[str], None] | None = None,
) -> int:
    """Executes the runs that are not finished. A run that fails is recorded and does not stop the others.

    Args:
        experiments: names of experiments.
        scale: one of specs.SCALES.
        data: as for bnkern.train.cifar10.load. The default at scale "smoke" is "synthetic".
        device: torch's name. The default is "cuda" if there is a GPU, and else "cpu".
        seeds: the number of seeds, instead of the number in each configuration.
        out: the folder of the results.
        resume: keep finished runs. Otherwise they are repeated.
        kept: another folder with a subfolder for each experiment, whose finished runs are not repeated.
        finished: called with an experiment's name after its last run.

    Returns:
        the exit status: 0; 1 if a run failed, data are missing or the disk is full; 130 after Ctrl-C.
    """
    data = data or os.environ.get("BNKERN_DATA") or ("synthetic" if scale == "smoke" else None)
    kind = "synthetic" if data == "synthetic" else "cifar10"
    all_runs = plan(experiments, scale, kind, seeds, out, kept)
    todo = [planned for planned in all_runs if not (resume and planned.finished())]
    on = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    pace = Pace(step_seconds(on) / REFERENCE if todo and scale != "smoke" else 1.0)
    expected = sum(planned.seconds * pace.of(planned.kind) for planned in todo)
    about = f", about {duration(expected)} on this machine" if todo and scale != "smoke" else ""
    print(f"{len(all_runs)} runs: {len(all_runs) - len(todo)} finished before, {len(todo)} to do{about}", flush=True)
    if not todo:
        return 0
    try:
        images = cifar10.load(data) if any(planned.config["data"] != "none" for planned in todo) else None
        failed = _run_all(todo, images, on, pace, finished)
    except cifar10.DataError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        done = sum(planned.finished() for planned in all_runs)
        print(f"\nStopped: {done} of {len(all_runs)} runs are finished. The same command continues.", file=sys.stderr)
        return INTERRUPTED
    except OSError as error:  # a full disk, a folder that cannot be written
        print(f"Stopped: {error.strerror or error} ({out}). The same command continues.", file=sys.stderr)
        return 1
    if failed:
        print(f"{failed} of {len(todo)} runs failed. error.txt in their folders has the errors.", file=sys.stderr)
    return 1 if failed else 0


def _run_all(
    todo: list[Planned],
    images: cifar10.Cifar10 | None,
    device: torch.device,
    pace: Pace,
    finished: Callable[[str], None] | None,
) -> int:
    """Returns the number of runs that failed."""
    failed = 0
    with Progress(todo, pace) as progress:
        for planned, following in zip(todo, [*todo[1:], None], strict=True):
            progress.start(planned)
            try:
                _run_one(planned, images, device, progress.tick)
            except OSError:
                raise
            except Exception as error:
                failed += 1
                (planned.folder / "error.txt").write_text(traceback.format_exc())
                progress.end(f"FAILED: {type(error).__name__}: {error}")
            else:
                progress.end("done")
            if finished and (following is None or following.kind != planned.kind):
                finished(planned.config["experiment"])
    return failed


def _run_one(planned: Planned, images: cifar10.Cifar10 | None, device: torch.device, tick) -> None:
    folder, config = planned.folder, planned.config
    if (folder / "DONE").exists():
        put_aside(folder)
    elif differing(folder, config):
        shutil.rmtree(folder)
    (folder / "probes").mkdir(parents=True, exist_ok=True)
    (folder / "error.txt").unlink(missing_ok=True)
    write_json(folder / "config.json", config)
    started, clock = datetime.now(UTC), time.perf_counter()
    for name, arrays in PROCEDURES[config["procedure"]](config, images, device, folder, tick).items():
        np.savez(folder / "probes" / f"{name}.npz", **arrays)  # type: ignore[arg-type]  # no name is allow_pickle
    seconds = round(time.perf_counter() - clock, 4)  # the shortest runs take a few milliseconds
    when = {"started": started.isoformat(timespec="seconds"), "seconds": seconds}
    write_json(folder / "env.json", when | environment(device, config["kernels"]))
    (folder / "DONE").touch()


# ------------------------------------------------------------------------------------------------ progress


class Progress:
    """The progress of all runs and of the present one: bars on a terminal, and else a line for each run.

    Both state the expected time that is left. It is estimated from the pace of the finished runs.
    """

    def __init__(self, todo: list[Planned], pace: Pace) -> None:
        self.todo, self.pace, self.done, self.share = todo, pace, 0, 0.0
        self.clock = self.started = time.perf_counter()
        terminal = sys.stderr.isatty()
        form = "{desc} {percentage:3.0f}%|{bar}| {elapsed}{postfix}"
        self.runs = tqdm(total=1, bar_format=form, disable=not terminal)
        self.run = tqdm(total=1, bar_format=form, disable=not terminal, leave=False)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.run.close()
        self.runs.close()

    def start(self, planned: Planned) -> None:
        self.share, self.started = 0.0, time.perf_counter()
        self.run.set_postfix_str("", refresh=False)
        self.run.set_description(planned.name, refresh=False)
        self.run.reset()
        self._show()

    def tick(self, share: float, what: str) -> None:
        """Shows that ``share`` of the run is done, and that ``what`` is next."""
        self.share = share
        self.run.set_postfix_str(what, refresh=False)
        self.run.update(share - self.run.n)
        self._show()

    def end(self, outcome: str) -> None:
        planned, took = self.todo[self.done], time.perf_counter() - self.started
        if outcome == "done":  # a failed run may have ended early
            self.pace.add(planned.kind, planned.seconds, took)
        self.done, self.share = self.done + 1, 0.0
        self.started = time.perf_counter()
        self._show()
        total = len(self.todo)
        if self.runs.disable:
            line = f"[{self.done:>{len(str(total))}}/{total}] {planned.name}: {outcome}, {duration(took, exact=True)}"
            print(line + (f", about {duration(self.left())} left" if self.done < total else ""), flush=True)
        elif outcome != "done":
            self.runs.write(f"{planned.name}: {outcome}", file=sys.stderr)

    def left(self) -> float:
        """The expected time that is left, in seconds."""
        expected = [planned.seconds * self.pace.of(planned.kind) for planned in self.todo[self.done :]]
        if not expected:
            return 0.0
        # As the share of the present run grows, its measured time replaces its expected time.
        present = (1 - self.share) * expected[0] + (time.perf_counter() - self.started)
        return (1 - self.share) * present + sum(expected[1:])

    def _show(self) -> None:
        left, past = self.left(), time.perf_counter() - self.clock
        self.runs.set_description(f"run {min(self.done + 1, len(self.todo))} of {len(self.todo)}", refresh=False)
        self.runs.set_postfix_str(f"about {duration(left)} left", refresh=False)
        self.runs.update((past / (past + left) if past + left else 0.0) - self.runs.n)


def duration(seconds: float, exact: bool = False) -> str:
    """The duration as text: 40 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{seconds:.1f} s" if exact else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
