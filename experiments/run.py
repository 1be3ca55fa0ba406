"""The runner: which runs are wanted, which are finished already, and the rest one after the other.

A run lives in ``<out>/<experiment>/<scale>-<label>-seed<k>/``: ``config.json`` (what was asked), ``env.json`` (what it
ran on), ``probes/<file>.npz`` (what it measured), what else its procedure keeps and, written last, ``DONE``. A folder
without DONE was interrupted or failed (then ``error.txt`` says why) and is done again, from what its procedure kept.
"""

import os
import shutil
import sys
import time
import traceback
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from bnkern.train import cifar10
from bnkern.train.runlog import differing, environment, finished, put_aside, write_json

from . import spec
from .procedures import PROCEDURES
from .results import configuration

INTERRUPTED = 130  # exit status after Ctrl-C


@dataclass(frozen=True)
class Planned:
    """One run that is wanted: its folder and its whole configuration."""

    folder: Path
    config: dict
    minutes: float  # that it is expected to take, on two cores
    kept: Path | None = None  # a folder that counts too, if it has this run, finished

    @property
    def name(self) -> str:
        return f"{self.folder.parent.name}/{self.folder.name}"

    def finished(self) -> bool:
        """Whether it is done, as configured now."""
        return any(finished(place, self.config) for place in (self.folder, self.kept) if place)


def plan(
    experiments: list[str], scale: str, data: str, seeds: int | None, out: Path, kept: Path | None = None
) -> list[Planned]:
    """All runs of the experiments: every configuration of their specs at that scale, for seeds 0, 1, ..."""
    wanted = []
    for experiment in experiments:
        about = spec(experiment)
        at = about.scale(scale)
        runs = about.at(at)
        minutes = about.minutes.get(at, 1) / max(1, sum(run.seeds for run in runs))
        for run in runs:
            for seed in range(seeds or run.seeds):
                config = configuration(experiment, about, run, at, data, seed)
                name = f"{at}-{run.label}-seed{seed}" + "-synthetic" * (config["data"] == "synthetic")
                there = kept / experiment / name if kept else None
                wanted.append(Planned(out / experiment / name, config, minutes, there))
    return wanted


def run(
    experiments: list[str],
    scale: str = "reduced",
    data: str | None = None,
    device: str | None = None,
    seeds: int | None = None,
    out: Path = Path("results"),
    resume: bool = True,
    kept: Path | None = None,
) -> int:
    """Does what is not done yet; a run that fails is recorded and does not stop the others.

    Args:
        experiments: names.
        scale: one of specs.SCALES.
        data: as for bnkern.train.cifar10.load; at scale "smoke", "synthetic" where nothing is given.
        device: torch's name; default "cuda" where there is one, else "cpu".
        seeds: how many, instead of each configuration's own number.
        out: where result folders are.
        resume: keep finished runs; else do them all again.
        kept: another folder, by experiment, whose finished runs count as done.

    Returns:
        the exit status: 0; 1 where a run failed, or data or disk are wanting; 130 after Ctrl-C.
    """
    data = data or os.environ.get("BNKERN_DATA") or ("synthetic" if scale == "smoke" else None)
    kind = "synthetic" if data == "synthetic" else "cifar10"
    wanted = plan(experiments, scale, kind, seeds, out, kept)
    todo = [planned for planned in wanted if not (resume and planned.finished())]
    expected = 60 * sum(planned.minutes for planned in todo)
    about = f", about {duration(expected)} on two cores" if todo and scale != "smoke" else ""
    print(f"{len(wanted)} runs: {len(wanted) - len(todo)} finished before, {len(todo)} to do{about}", flush=True)
    if not todo:
        return 0
    try:
        images = cifar10.load(data) if any(planned.config["data"] != "none" for planned in todo) else None
        on = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        failed = _run_all(todo, images, on)
    except cifar10.DataError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        done = sum(planned.finished() for planned in wanted)
        print(f"\nstopped: {done} of {len(wanted)} runs are finished; the same command does the rest", file=sys.stderr)
        return INTERRUPTED
    except OSError as error:  # a full disk, a folder that cannot be written
        print(f"stopped: {error.strerror or error} ({out}); the same command does the rest", file=sys.stderr)
        return 1
    if failed:
        print(f"{failed} of {len(todo)} runs failed; error.txt in their folders says why", file=sys.stderr)
    return 1 if failed else 0


def _run_all(todo: list[Planned], images: cifar10.Cifar10 | None, device: torch.device) -> int:
    """How many failed."""
    failed = 0
    with Progress([planned.minutes for planned in todo]) as progress:
        for planned in todo:
            progress.start(planned.name, planned.minutes)
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
    """Bars over all runs and within one on a terminal, elsewhere a line a run; both with the time that is left.

    Runs weigh as many minutes as their specs expect; the time left is what they expect, times what the runs so far
    took over what they were expected to take.
    """

    def __init__(self, minutes: list[float]) -> None:
        self.total, self.done = len(minutes), 0
        self.whole, self.past, self.weight, self.share = sum(minutes), 0.0, 0.0, 0.0
        self.clock = time.perf_counter()
        terminal = sys.stderr.isatty()
        form = "{desc} {percentage:3.0f}%|{bar}| {elapsed}{postfix}"
        self.runs = tqdm(total=1, bar_format=form, disable=not terminal)
        self.run = tqdm(total=1, bar_format=form, disable=not terminal, leave=False)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.run.close()
        self.runs.close()

    def start(self, name: str, minutes: float) -> None:
        self.name, self.weight, self.share, self.started = name, minutes, 0.0, time.perf_counter()
        self.run.set_postfix_str("", refresh=False)
        self.run.set_description(name, refresh=False)
        self.run.reset()
        self._show()

    def tick(self, share: float, what: str) -> None:
        """``share`` of the run is done, ``what`` comes next."""
        self.share = share
        self.run.set_postfix_str(what, refresh=False)
        self.run.update(share - self.run.n)
        self._show()

    def end(self, outcome: str) -> None:
        self.done += 1
        self.past, self.share = self.past + self.weight, 0.0
        self._show()
        if self.runs.disable:
            took = duration(time.perf_counter() - self.started, exact=True)
            line = f"[{self.done:>{len(str(self.total))}}/{self.total}] {self.name}: {outcome}, {took}"
            print(line + (f", about {duration(self.left())} left" if self.done < self.total else ""), flush=True)
        elif outcome != "done":
            self.runs.write(f"{self.name}: {outcome}", file=sys.stderr)

    def left(self) -> float:
        """Seconds."""
        past = self.past + self.share * self.weight
        pace = (time.perf_counter() - self.clock) / past if past else 60.0
        return pace * (self.whole - past)

    def _show(self) -> None:
        self.runs.set_description(f"run {min(self.done + 1, self.total)} of {self.total}", refresh=False)
        self.runs.set_postfix_str(f"about {duration(self.left())} left", refresh=False)
        self.runs.update((self.past + self.share * self.weight) / self.whole - self.runs.n)


def duration(seconds: float, exact: bool = False) -> str:
    """For a reader: 40 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{seconds:.1f} s" if exact else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
