"""The runner: it plans the runs, finds the finished ones, and executes the others one after the other.

A run has the folder ``<out>/<experiment>/<scale>-<label>-seed<k>/`` with ``config.json`` (its configuration),
``env.json`` (machine and versions), ``probes/<file>.npz`` (the measurements), other files of its procedure, and
``DONE``, which is written last. A folder without DONE belongs to a run that was interrupted or has failed. After a
failure ``error.txt`` has the error. The next command repeats the run, from the state that its procedure has saved.
"""

import math
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from bnkern.train import cifar10
from bnkern.train.loop import Stopped
from bnkern.train.runlog import differing, environment, finished, put_aside, read_json, write_json

from . import spec
from .pace import REFERENCE, Kind, Pace, shares, step_seconds
from .procedures import PROCEDURES, Tick
from .results import configuration, folder_name, serves, trained
from .specs import LAYOUTS, PRECISIONS, TRAINING

INTERRUPTED = 130  # exit status after Ctrl-C
UNFINISHED = 75  # exit status if the time of the command was over before its runs were finished


@dataclass(frozen=True)
class Planned:
    """One planned run: its folder and its whole configuration."""

    folder: Path
    config: dict
    seconds: float  # the expected time on the machine of the specs' minutes
    published: Path | None = None  # a second folder in which the run may be finished

    @property
    def name(self) -> str:
        return f"{self.folder.parent.name}/{self.folder.name}"

    @property
    def labels(self) -> set[str]:
        """The names by which a command selects it: its label, and the same with its seed."""
        return {self.config["label"], f"{self.config['label']}-seed{self.config['seed']}"}

    @property
    def kind(self) -> Kind:
        """The properties that determine its pace."""
        return Kind(self.config["procedure"], self.config["experiment"])

    def finished(self) -> bool:
        """Whether it is finished with its present configuration."""
        return any(finished(place, self.config) for place in (self.folder, self.published) if place)


def plan(
    experiments: list[str],
    scale: str,
    data: str,
    seeds: int | None,
    out: Path,
    published_runs: Path | None = None,
    precision: str = PRECISIONS[0],
    only: Collection[str] = (),
) -> list[Planned]:
    """The runs of the experiments: every configuration of their specs at that scale, for seeds 0, 1, ...

    ``only`` selects some of them by :attr:`Planned.labels`.
    """
    planned_runs = []
    for experiment in experiments:
        experiment_spec = spec(experiment)
        run_scale = experiment_spec.scale(scale)
        runs = experiment_spec.at(run_scale)
        share = shares(runs)
        for run in runs:
            for seed in range(seeds or run.seeds):
                config = configuration(experiment, experiment_spec, run, run_scale, data, seed, precision)
                name = folder_name(config)
                published_folder = published_runs / experiment / name if published_runs else None
                seconds = 60 * experiment_spec.minutes.get(run_scale, 1) * share[run.label]
                planned_runs.append(Planned(out / experiment / name, config, seconds, published_folder))
    return [planned for planned in planned_runs if not only or planned.labels & set(only)]


def unfinished(planned_runs: list[Planned], out: Path, published_runs: Path | None) -> list[Planned]:
    """The runs that are not finished, and for which no finished run of another experiment serves."""
    others = [config for place in (out, published_runs) if place for _, config in trained(place)]
    return [
        planned
        for planned in planned_runs
        if not planned.finished() and not any(serves(config, planned.config) for config in others)
    ]


def distinct(planned_runs: list[Planned]) -> list[Planned]:
    """The runs without those for which another one of them serves."""
    kept: list[Planned] = []
    for planned in planned_runs:
        if not any(serves(other.config, planned.config) for other in kept):
            kept = [other for other in kept if not serves(planned.config, other.config)] + [planned]
    return kept


def run(
    experiments: list[str],
    scale: str = "reduced",
    data: str | None = None,
    device: str | None = None,
    seeds: int | None = None,
    out: Path = Path("results"),
    resume: bool = True,
    published_runs: Path | None = None,
    finished: Callable[[str], None] | None = None,
    precision: str = PRECISIONS[0],
    layout: str = LAYOUTS[0],
    only: Collection[str] = (),
    minutes: float = math.inf,
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
        published_runs: another folder with a subfolder for each experiment, whose finished runs are not repeated.
        finished: called with an experiment's name after its last run.
        precision: of training, one of specs.PRECISIONS.
        layout: of training, one of specs.LAYOUTS. It is no part of a run's configuration.
        only: names of the runs to execute, see Planned.labels. The default is all.
        minutes: the time after which the command stops. The next command continues.

    Returns:
        the exit status: 0; 1 if a run failed, data are missing or the disk is full; 2 if ``only`` names no run; 75 if
        the time was over before the runs were finished; 130 after Ctrl-C.
    """
    deadline = Deadline(60 * minutes)
    data = data or os.environ.get("BNKERN_DATA") or ("synthetic" if scale == "smoke" else None)
    kind = "synthetic" if data == "synthetic" else "cifar10"
    all_runs = plan(experiments, scale, kind, seeds, out, published_runs, precision, only)
    if unknown := set(only).difference(*(planned.labels for planned in all_runs)):
        print(f"There is no run {', '.join(sorted(unknown))} of {', '.join(experiments)}.", file=sys.stderr)
        return 2
    missing = unfinished(all_runs, out, published_runs) if resume else all_runs
    todo = distinct(missing) if resume else all_runs
    torch_device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    pace = Pace(step_seconds(torch_device) / REFERENCE if todo and scale != "smoke" else 1.0)
    expected = sum(planned.seconds * pace.of(planned.kind) for planned in todo)
    estimate = f", about {duration(expected)} on this machine" if todo and scale != "smoke" else ""
    shared = f", {len(missing) - len(todo)} the same as another" if len(missing) > len(todo) else ""
    before = len(all_runs) - len(missing)
    print(f"{len(all_runs)} runs: {before} finished before{shared}, {len(todo)} to do{estimate}", flush=True)
    if not todo:
        return 0
    try:
        images = cifar10.load(data) if any(planned.config["data"] != "none" for planned in todo) else None
        failed = _run_all(todo, images, torch_device, layout, pace, deadline, finished)
    except cifar10.DataError as error:
        print(error, file=sys.stderr)
        return 1
    except (KeyboardInterrupt, Stopped) as stop:
        finished_count = len(all_runs) - len(unfinished(all_runs, out, published_runs))
        print(
            f"\nStopped: {finished_count} of {len(all_runs)} runs are finished. The same command continues.",
            file=sys.stderr,
        )
        return UNFINISHED if isinstance(stop, Stopped) else INTERRUPTED
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
    layout: str,
    pace: Pace,
    deadline: "Deadline",
    finished: Callable[[str], None] | None,
) -> int:
    """Returns the number of runs that failed."""
    failed = 0
    with Progress(todo, pace) as progress:

        def tick(share: float, next_step: str) -> None:
            progress.tick(share, next_step)
            deadline.check()

        for planned, following in zip(todo, [*todo[1:], None], strict=True):
            deadline.check()
            progress.start(planned)
            try:
                _run_one(planned, images, device, layout, tick)
            except (OSError, Stopped):
                raise
            except Exception as error:
                failed += 1
                (planned.folder / "error.txt").write_text(traceback.format_exc())
                progress.end(f"FAILED: {type(error).__name__}: {error}")
            else:
                progress.end("done")
            if finished and (following is None or following.kind.experiment != planned.kind.experiment):
                finished(planned.config["experiment"])
    return failed


def _run_one(planned: Planned, images: cifar10.Cifar10 | None, device: torch.device, layout: str, tick: Tick) -> None:
    folder, config = planned.folder, planned.config
    if (folder / "DONE").exists():
        put_aside(folder)
    elif differing(folder, config):
        shutil.rmtree(folder)
    (folder / "probes").mkdir(parents=True, exist_ok=True)
    (folder / "error.txt").unlink(missing_ok=True)
    write_json(folder / "config.json", config)
    timing: dict[str, Any] = {"started": datetime.now(UTC).isoformat(timespec="seconds"), "seconds": 0.0}
    if (folder / "env.json").exists():  # an earlier command has done a part of the run
        earlier = read_json(folder / "env.json")
        timing, layout = {name: earlier[name] for name in timing}, earlier.get("layout", layout)
    start = time.perf_counter()
    try:
        results = PROCEDURES[config["procedure"]](config | {"layout": layout}, images, device, folder, tick)
    finally:
        seconds = timing["seconds"] + time.perf_counter() - start
        timing["seconds"] = round(seconds, 4)  # the shortest runs take a few milliseconds
        layout_entry = {"layout": layout} if config["procedure"] in TRAINING else {}
        write_json(folder / "env.json", timing | environment(device, config["kernels"]) | layout_entry)
    for name, arrays in results.items():
        np.savez(folder / "probes" / f"{name}.npz", **arrays)  # type: ignore[arg-type]  # no name is allow_pickle
    (folder / "DONE").touch()


# ------------------------------------------------------------------------------------------------ time and progress


class Deadline:
    """The end of a command's time. ``check`` raises Stopped if the next check would probably come too late.

    The next interval between two checks is expected to be as long as the longest one so far.
    """

    def __init__(self, seconds: float) -> None:
        self.end = time.perf_counter() + seconds
        self.last, self.longest = math.inf, 0.0  # what precedes the first check is not repeated

    def check(self) -> None:
        now = time.perf_counter()
        self.last, self.longest = now, max(self.longest, now - self.last)
        if now + self.longest > self.end:
            raise Stopped


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

    def tick(self, share: float, next_step: str) -> None:
        """Shows that ``share`` of the run is done, and that ``next_step`` is next."""
        self.share = share
        self.run.set_postfix_str(next_step, refresh=False)
        self.run.update(share - self.run.n)
        self._show()

    def end(self, outcome: str) -> None:
        planned, seconds = self.todo[self.done], time.perf_counter() - self.started
        if outcome == "done":  # a failed run may have ended early
            self.pace.add(planned.kind, planned.seconds, seconds)
        self.done, self.share = self.done + 1, 0.0
        self.started = time.perf_counter()
        self._show()
        total = len(self.todo)
        if self.runs.disable:
            line = (
                f"[{self.done:>{len(str(total))}}/{total}] {planned.name}: {outcome}, {duration(seconds, exact=True)}"
            )
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
