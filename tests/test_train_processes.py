"""Distributed runs end in order: the process group's threads first, then the interpreter, also after an exception."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.test_train_distributed import torchrun
from tests.training import tiny

ROOT = Path(__file__).resolve().parent.parent
LAUNCHES = int(os.environ.get("BNKERN_LAUNCHES", "200"))  # of the slow test

THREADS = """
import os
def gloo_threads():
    names = [open(f"/proc/self/task/{task}/comm").read().strip() for task in os.listdir("/proc/self/task")]
    return [name for name in names if "gloo" in name]
"""

# One rank is enough: it has the same threads.
ONE_RANK = f"""{THREADS}
import signal, sys
import torch
import torch.distributed as dist
from bnkern.train.processes import process_group
def step():
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))
    model.itself = [model]  # a reference cycle
    model(torch.ones(3, 2)).sum().backward()
    print(len(gloo_threads()), "threads within", flush=True)
    {{end}}
try:
    with process_group("gloo", store=dist.HashStore(), rank=0, world_size=1):
        step()
finally:
    print(len(gloo_threads()), "threads afterwards", flush=True)
"""
CHAINED = """
    try:
        raise ValueError
    except ValueError:
        raise KeyError"""


@pytest.mark.parametrize(
    ("end", "status"),
    [
        ("return", 0),
        ("raise ValueError", 1),
        (CHAINED, 1),
        ("sys.exit(3)", 3),
        ("signal.raise_signal(signal.SIGINT)", -signal.SIGINT),
    ],
    ids=["returned", "error", "chained_error", "exit", "interrupt"],
)
def test_threads_of_the_group_end_with_the_block(end: str, status: int) -> None:
    """The interpreter ends after them, whatever ended the block: a model in DDP, in a cycle too, keeps none alive."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", ONE_RANK.replace("{end}", end)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    within, afterwards = (int(line.split()[0]) for line in done.stdout.splitlines())
    assert within >= 3 and afterwards == 0, done.stdout
    assert done.returncode == status, done.stderr


# The command line in one rank. "fails": the second rank raises at the end of its first epoch.
RANK = f"""{THREADS}
import sys
import bnkern.train.loop
from bnkern.train.__main__ import main
def fail(*_):
    raise RuntimeError("as the test asked")
if "fails" in sys.argv[1]:
    bnkern.train.loop._Run.end_epoch = fail
status = main(sys.argv[2:])
print(len(gloo_threads()), "threads afterwards")
sys.exit(status)
"""


@contextmanager
def command_line(folder: Path, modes: tuple[str, ...], **settings: object) -> Iterator[list[subprocess.Popen]]:
    """One run in as many processes as there are modes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [json.dumps(tiny(log_every=1, **settings).to_dict()), "--out", str(folder), "--device", "cpu"]
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(len(modes))}
    environment = os.environ | environment | {"OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, mode, *words],
            cwd=ROOT,
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, mode in enumerate(modes)
    ]
    try:
        yield ranks
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()


def assert_ended(ranks: list[subprocess.Popen], status: int) -> list[str]:
    """Each rank with that status and without threads; what they wrote to stderr."""
    errors = []
    for rank in ranks:
        output, error = rank.communicate(timeout=120)
        assert rank.returncode == status, f"{rank.returncode}: {error}"
        assert output.splitlines()[-1] == "0 threads afterwards", output
        errors.append(error)
    return errors


def test_command_line_ends_in_order(tmp_path: Path) -> None:
    with command_line(tmp_path, ("", ""), batch=500, epochs=1) as ranks:
        assert_ended(ranks, 0)


def test_command_line_ends_in_order_after_an_error(tmp_path: Path) -> None:
    """Of one rank: the other one learns of it in its next collective, from the closed connection."""
    with command_line(tmp_path, ("", "fails"), batch=500, epochs=1) as ranks:
        errors = assert_ended(ranks, 1)
    assert errors[1].splitlines()[-1] == "RuntimeError: as the test asked" and "RuntimeError: " in errors[0]


def test_command_line_ends_in_order_after_an_interrupt(tmp_path: Path) -> None:
    with command_line(tmp_path, ("", ""), epochs=50) as ranks:
        deadline = time.monotonic() + 120
        while not (written := list(tmp_path.glob("*/metrics.jsonl"))) or not written[0].stat().st_size:
            assert time.monotonic() < deadline and all(rank.poll() is None for rank in ranks)
            time.sleep(0.1)
        for rank in ranks:
            rank.send_signal(signal.SIGINT)
        errors = assert_ended(ranks, 130)
    assert all("goes on from the last checkpoints" in error for error in errors)


@pytest.mark.slow
def test_launches_under_load(tmp_path: Path) -> None:
    """Many launches beside two processes that keep the cores busy: none ends by a signal. BNKERN_LAUNCHES of them."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    try:
        for launch in range(LAUNCHES):
            folder = tmp_path / str(launch)
            folder.mkdir()
            torchrun(folder, 2, "batch")
    finally:
        for process in busy:
            process.kill()
            process.wait()
