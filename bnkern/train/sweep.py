"""Many runs: one after the other, in several processes on this machine, or on a Ray cluster.

A finished run is skipped, and an unfinished one continues from its checkpoint. A run that fails does not stop the
others; its ``error.txt`` has the reason.
"""

import json
import os
import queue
import subprocess
import sys
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import cache
from pathlib import Path
from typing import Any

import torch

from . import cifar10
from .config import Config
from .loop import train
from .runlog import differing, finished, outcome


def sweep(
    configs: list[Config],
    out: Path,
    *,
    data: str | None = None,
    device: str | None = None,
    processes: int = 1,
    ray: str | None = None,
    gpus: float = 1.0,
    resume: bool = True,
    tensorboard: bool = False,
    flight_steps: int = 0,
) -> int:
    """Does the runs that are not done yet, each in ``out / config.title``, and prints the outcome of each.

    Args:
        configs: the runs, no two with the same title.
        out: a folder. With Ray it must be shared by all machines; otherwise results stay on the machine of their run.
        data: where CIFAR-10 is, as for :func:`.cifar10.load`.
        device: torch's name; default "cuda" where there is one, else "cpu".
        processes: how many runs at once on this machine. They share its cores evenly (unless OMP_NUM_THREADS says
            otherwise), take its GPUs in turn, and write their output to ``out / <title>.log``.
        ray: address of a Ray cluster ("auto", "local", "ray://host:10001"), instead.
        gpus: per run on Ray: 0.25 puts four runs on one GPU, 0 requests none.
        resume: if False, existing runs are put aside and start again.
        tensorboard: mirror metrics.
        flight_steps: the number of steps that a flight recorder keeps of each run; 0 for none.

    Returns:
        The number of runs that failed.

    Raises:
        ValueError: two runs share a title, or the folder of one has another run.
        DataError: CIFAR-10 is not available.
        RuntimeError: ``ray`` is given and Ray is not installed.
    """
    titles = [config.title for config in configs]
    if twice := {title for title in titles if titles.count(title) > 1}:
        raise ValueError(f"runs must differ in name or seed: {', '.join(sorted(twice))} occurs twice")
    todo = [c for c in configs if not (resume and finished(out / c.title, c.to_dict()))]
    for config in todo:
        if resume and (names := differing(out / config.title, config.to_dict())):
            raise ValueError(f"{out / config.title} has another run (other {', '.join(names)}): rename this one")
    print(
        f"{len(configs)} run{'s' * (len(configs) > 1)}: {len(configs) - len(todo)} finished before, {len(todo)} to do",
        flush=True,
    )
    options: dict[str, Any] = {
        "out": out,
        "data": data,
        "device": device,
        "resume": resume,
        "tensorboard": tensorboard,
        "flight_steps": flight_steps,
    }
    if ray is not None:
        ended = _on_ray(todo, ray, gpus, options)
    elif processes > 1 and todo:
        ended = _in_processes(todo, processes, options)
    else:
        ended = ((config, run(config, **options)) for config in todo)
    failed = 0
    for done, (config, error) in enumerate(ended, start=1):
        failed += error is not None
        result = f"FAILED: {error}" if error is not None else _result(out / config.title)
        print(f"[{done}/{len(todo)}] {config.title}: {result}", flush=True)
    return failed


def run(
    config: Config,
    out: Path,
    data: str | None = None,
    device: str | None = None,
    resume: bool = True,
    tensorboard: bool = False,
    flight_steps: int = 0,
) -> str | None:
    """Does one run in this process. Returns the error in one line, or None; ``error.txt`` has the traceback."""
    folder = out / config.title
    images = _load("synthetic" if config.data == "synthetic" else data)  # an error here ends the sweep
    try:
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        train(config, folder, images, device, resume=resume, tensorboard=tensorboard, flight_steps=flight_steps)
    except Exception as error:
        _write_error(folder, traceback.format_exc())
        return f"{type(error).__name__}: {error}"
    (folder / "error.txt").unlink(missing_ok=True)
    return None


_load = cache(cifar10.load)  # the runs of one process share the data


def _write_error(folder: Path, text: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "error.txt").write_text(text)


def _result(folder: Path) -> str:
    ended = outcome(folder)
    if ended.diverged is not None:
        return f"diverged at step {ended.diverged}"
    if ended.test_accuracy is None or ended.best_test_accuracy is None:
        return f"{ended.steps} steps, not evaluated"
    return f"test {100 * ended.test_accuracy:.2f} % in the last epoch, best {100 * ended.best_test_accuracy:.2f} %"


# ------------------------------------------------------------------------------------------- processes, and Ray


def _in_processes(todo: list[Config], processes: int, options: dict) -> Iterator[tuple[Config, str | None]]:
    """Does each run in a process of its own, so that a crash of one does not end another."""
    slots: queue.Queue[int] = queue.Queue()
    for slot in range(processes):
        slots.put(slot)
    threads = str(max(1, (os.cpu_count() or 1) // processes))
    gpus = _visible_gpus()

    def one(config: Config) -> str | None:
        slot = slots.get()
        try:
            environment = {"OMP_NUM_THREADS": threads} | os.environ
            if gpus:
                environment["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
            return _in_process(config, environment, **options)
        finally:
            slots.put(slot)

    pool = ThreadPoolExecutor(processes)
    try:
        started = {pool.submit(one, config): config for config in todo}
        for future in as_completed(started):
            yield started[future], future.result()
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C, which also reaches the running processes


def _in_process(
    config: Config,
    environment: dict[str, str],
    out: Path,
    data: str | None,
    device: str | None,
    resume: bool,
    tensorboard: bool,
    flight_steps: int,
) -> str | None:
    out.mkdir(parents=True, exist_ok=True)
    log = out / f"{config.title}.log"
    with log.open("w") as file:
        words = command(config, out, data, device, resume, tensorboard, flight_steps)
        done = subprocess.run(
            words, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, env=environment, check=False
        )
    if done.returncode == 0:
        return None
    if done.returncode > 0:
        last = log.read_text().strip().splitlines()[-1:] or ["no output"]
        return f"{last[0]} (exit status {done.returncode}; the whole output is in {log})"
    error = f"killed by signal {-done.returncode}"
    _write_error(out / config.title, error + "\n")
    return error


def command(
    config: Config, out: Path, data: str | None, device: str | None, resume: bool, tensorboard: bool, flight_steps: int
) -> list[str]:
    """Returns the command that does one run in a process of its own."""
    words = [sys.executable, "-m", "bnkern.train", json.dumps(config.to_dict()), "--out", str(out)]
    words += ["--data", data] if data else []
    words += ["--device", device] if device else []
    words += ["--flight-recorder", str(flight_steps)] * bool(flight_steps)
    return words + ["--tensorboard"] * tensorboard + ["--resume" if resume else "--no-resume"]


def _visible_gpus() -> list[str]:
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(i) for i in range(torch.cuda.device_count())]


def _on_ray(todo: list[Config], address: str, gpus: float, options: dict) -> Iterator[tuple[Config, str | None]]:
    try:
        import ray
    except ImportError as error:
        raise RuntimeError("a sweep on Ray needs Ray: pip install 'bnkern[ray]'") from error
    options = options | {"out": options["out"].absolute()}
    ray.init(address=address)
    try:
        job = ray.remote(num_cpus=1, num_gpus=gpus)(run)
        started = {job.remote(config, **options): config for config in todo}
        while started:
            (ready, *_), _ = ray.wait(list(started))
            config = started.pop(ready)
            try:
                message = ray.get(ready)
            except ray.exceptions.RayError as error:  # the machine of the run is gone, or the run was killed
                message = f"{type(error).__name__}: {error}"
                _write_error(options["out"] / config.title, message + "\n")
            yield config, message
    finally:
        ray.shutdown()
