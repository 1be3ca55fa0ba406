"""Processes that represent the ranks of a distributed run. They are joined by gloo and execute calls for a test."""

import contextlib
import multiprocessing
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from bnkern.train.processes import process_group

WORLD = 3  # the number of processes of the fixture `ranks`
TIMEOUT_S = 240  # of one call; the slowest call compiles a network


class Ranks:
    """``count`` processes in one default group. Each call runs one function on the first of them."""

    def __init__(self, count: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.folder = tempfile.TemporaryDirectory()
        rendezvous = Path(self.folder.name, "rendezvous").as_uri()
        self.pipes, self.processes = [], []
        for rank in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, count, rendezvous, theirs), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, function: Callable, arguments: list[tuple]) -> list:
        """Returns the results of ``function(*arguments[rank])`` for each rank that has arguments.

        The function must be importable. If a rank raises, dies or exceeds the time, all processes are ended, because
        the others could wait for it.
        """
        for pipe, rank_arguments in zip(self.pipes, arguments, strict=False):
            pipe.send_bytes(pickle.dumps((function, len(arguments), rank_arguments)))
        results, deadline = {}, time.monotonic() + TIMEOUT_S
        while len(results) < len(arguments):
            for rank in set(range(len(arguments))) - set(results):
                try:
                    if not self.pipes[rank].poll(0.005):
                        continue
                    results[rank], error = pickle.loads(self.pipes[rank].recv_bytes())
                except EOFError:
                    error = "the process died"
                if error:
                    self.end()
                    raise AssertionError(f"rank {rank}: {error}")
            if time.monotonic() > deadline:
                self.end()
                raise AssertionError(f"no answer within {TIMEOUT_S} s; only from ranks {sorted(results)}")
        return [results[rank] for rank in range(len(arguments))]

    @property
    def alive(self) -> bool:
        return all(process.is_alive() for process in self.processes)

    def end(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        self.folder.cleanup()


def rank_parts(tensors: list[Tensor | None], split: tuple[int, ...]) -> list[list[Tensor | None]]:
    """The part of each tensor for each rank, in the memory format of the whole tensor."""
    parts = [[None] * len(split) if t is None else [p.clone() for p in t.split(split)] for t in tensors]
    return [list(of_rank) for of_rank in zip(*parts, strict=True)]


GROUPS: dict[int, dist.ProcessGroup] = {}  # in a rank: the group of the first 1, 2, ... ranks


def _serve(rank: int, count: int, rendezvous: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    with process_group("gloo", init_method=rendezvous, rank=rank, world_size=count):
        for size in range(1, count):
            GROUPS[size] = dist.new_group(list(range(size)))
        GROUPS[count] = dist.group.WORLD
        with contextlib.suppress(EOFError):  # the test run ended without Ranks.end, which kills the processes
            while True:
                function, size, arguments = pickle.loads(pipe.recv_bytes())
                try:
                    answer = function(*arguments, group=GROUPS[size]), None
                except BaseException:
                    answer = None, traceback.format_exc()
                pipe.send_bytes(pickle.dumps(answer))
        GROUPS.clear()
