"""Distributed runs end in order, also after an exception: first the process group's threads, then the interpreter."""

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

from bnkern.probes import load
from tests import ROOT
from tests.train.launches import torchrun
from tests.train.training import tiny

LAUNCHES = int(os.environ.get("BNKERN_LAUNCHES", "200"))  # the number of launches of the slow test

THREADS = """
import os
def gloo_threads():
    names = [open(f"/proc/self/task/{task}/comm").read().strip() for task in os.listdir("/proc/self/task")]
    return [name for name in names if "gloo" in name]
"""

# One rank is enough, because it has the same threads.
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
    """The threads end before the interpreter, however the block ends.

    A model in DDP does not keep them, even in a cycle.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        [sys.executable, "-c", ONE_RANK.replace("{end}", end)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    within, afterwards = (int(line.split()[0]) for line in process.stdout.splitlines())
    assert within >= 3 and afterwards == 0, process.stdout
    assert process.returncode == status, process.stderr


COMMAND_LINE = f"""{THREADS}
import sys
from bnkern.train.__main__ import main
status = main(sys.argv[1:])
print(len(gloo_threads()), "threads afterwards")
sys.exit(status)
"""
FAILING_COMMAND_LINE = f"""
import os
import bnkern.train.loop
def fail(*_):
    raise RuntimeError("raised by the test")
if os.environ["RANK"] == "1":
    bnkern.train.loop._Run.end_epoch = fail
{COMMAND_LINE}"""


def run_of(folder: Path, **settings: object) -> tuple[str, ...]:
    """The arguments of the command line."""
    return json.dumps(tiny(log_every=1, **settings).to_dict()), "--out", str(folder), "--device", "cpu"


@contextmanager
def two_ranks(script: str, *arguments: str) -> Iterator[list[subprocess.Popen]]:
    """Two processes that run the script and connect through environment variables, as with torchrun."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", script, *arguments],
            cwd=ROOT,
            env=os.environ | environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        yield ranks
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()


def assert_ended(ranks: list[subprocess.Popen], status: int) -> list[str]:
    """Requires this status of each rank, and no remaining threads. Returns their output on stderr."""
    errors = []
    for rank in ranks:
        output, error = rank.communicate(timeout=120)
        assert rank.returncode == status, f"{rank.returncode}: {error}"
        assert output.splitlines()[-1] == "0 threads afterwards", output
        errors.append(error)
    return errors


def test_command_line_ends_in_order(tmp_path: Path) -> None:
    with two_ranks(COMMAND_LINE, *run_of(tmp_path, batch=500, epochs=1)) as ranks:
        assert_ended(ranks, 0)


def test_command_line_ends_in_order_after_an_error(tmp_path: Path) -> None:
    """After an error of one rank the other one fails in its next collective, because the connection is closed."""
    with two_ranks(FAILING_COMMAND_LINE, *run_of(tmp_path, batch=500, epochs=1)) as ranks:
        errors = assert_ended(ranks, 1)
    assert errors[1].splitlines()[-1] == "RuntimeError: raised by the test" and "RuntimeError: " in errors[0]


def test_command_line_ends_in_order_after_an_interrupt(tmp_path: Path) -> None:
    with two_ranks(COMMAND_LINE, *run_of(tmp_path, epochs=50)) as ranks:
        deadline = time.monotonic() + 120
        while not (written := list(tmp_path.glob("*/metrics.jsonl"))) or not written[0].stat().st_size:
            assert time.monotonic() < deadline and all(rank.poll() is None for rank in ranks)
            time.sleep(0.1)
        for rank in ranks:
            rank.send_signal(signal.SIGINT)
        errors = assert_ended(ranks, 130)
    assert all("continues from the last checkpoints" in error for error in errors)


RECORDING = f"""{THREADS}
import os, sys
import torch
import torch.distributed as dist
from bnkern import probes
from bnkern.train.processes import process_group
from tests.support.probing import CHANNEL, make_net, train
def run():
    net = make_net(norm=False)
    with probes.record(net, CHANNEL, out=sys.argv[1]) as rec:
        train(net, 3, rec)
        rec.flush()
        train(net, 2, rec)
        if dist.get_rank() == 1:
            raise ValueError("raised by the test")
        dist.all_reduce(torch.zeros(1))
try:
    with process_group("gloo"):
        run()
finally:
    print(len(gloo_threads()), "threads afterwards")
"""


def test_recording_ends_in_order_after_an_error(tmp_path: Path) -> None:
    """After an error of one rank it enters no collective, in which it would wait. Flushed records are on the disk."""
    with two_ranks(RECORDING, str(tmp_path)) as ranks:
        errors = assert_ended(ranks, 1)
    assert "ValueError: raised by the test" in errors[1] and "RuntimeError: " in errors[0]
    assert load(tmp_path).steps.tolist() == [0, 1, 2]


@pytest.mark.slow
def test_launches_under_load(tmp_path: Path) -> None:
    """No launch ends by a signal, while two processes keep the cores busy. There are BNKERN_LAUNCHES launches."""
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
