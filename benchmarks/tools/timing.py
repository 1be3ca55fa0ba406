"""Timing several providers of one result against each other.

The providers take turns, one sample each per round, so that drift and noise hit all alike; ratios are formed within
a round before the median is taken over rounds. On the CPU a sample is the wall-clock time of one call. On a GPU it
is the time between two events around a pass over several sets of buffers, together larger than the L2 cache, so
that each call meets cold memory; called one by one, or captured once and replayed as a graph.
"""

import time
from collections.abc import Callable, Mapping
from math import ceil
from typing import NamedTuple

import numpy as np
import torch

CACHED_BYTES = 64e6  # tensors below may live in a last-level cache; above they do not
MOST_SETS = 64

Sampler = Callable[[], float]  # takes one sample: seconds per call


class Summary(NamedTuple):
    """Milliseconds per call over the rounds."""

    median_ms: float
    p20_ms: float
    p80_ms: float
    rounds: int


class Comparison:
    """Providers taking turns. The first is the one under test; a peer that raises is named in ``missing``."""

    def __init__(self, samplers: Mapping[str, Sampler]) -> None:
        self.samplers = dict(samplers)
        self.first, *_ = self.samplers
        self.seconds: dict[str, list[float]] = {name: [] for name in self.samplers}
        self.missing: dict[str, str] = {}
        self._turn = 0

    def warm_up(self) -> float:
        """Two rounds that do not count: the first compiles and fills pools, the second gives a round's seconds."""
        for name in list(self.samplers):
            try:
                self.samplers[name]()
            except Exception as error:
                if name == self.first:
                    raise
                self.missing[name] = reason(error)
                del self.samplers[name], self.seconds[name]
        start = time.perf_counter()
        for sample in self.samplers.values():
            sample()
        return time.perf_counter() - start

    def sample_peers(self) -> None:
        """The peers' samples of a round, beginning with another peer each round."""
        peers = [name for name in self.samplers if name != self.first]
        for k in range(len(peers)):
            name = peers[(k + self._turn) % len(peers)]
            self.seconds[name].append(self.samplers[name]())
        self._turn += 1

    def sample_first(self) -> None:
        """The sample of the provider under test, which ends a round."""
        self.seconds[self.first].append(self.samplers[self.first]())

    def summary(self, name: str) -> Summary:
        p20, median, p80 = np.percentile(self.seconds[name], (20, 50, 80)) * 1e3
        return Summary(float(median), float(p20), float(p80), len(self.seconds[name]))

    def ratio(self, base: str, name: str) -> float:
        """How many times faster ``name`` is than ``base``: the median of the rounds' ratios."""
        return float(np.median(np.divide(self.seconds[base], self.seconds[name])))


def reason(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def rounds_within(budget_s: float, round_s: float, least: int = 5, most: int = 300) -> int:
    """How many rounds fit the time budget, held between ``least`` and ``most``."""
    return int(min(max(budget_s / max(round_s, 1e-9), least), most))


def modes(device: torch.device) -> tuple[str, ...]:
    """How calls are made: one by one, and on a GPU also as a replayed graph."""
    return ("call", "graph") if device.type == "cuda" else ("call",)


def samplers(
    providers: Mapping[str, Callable],
    make_data: Callable[[], object],
    nbytes: int,
    device: torch.device,
    mode: str = "call",
) -> dict[str, Sampler]:
    """A sampler for each provider, a function of the data; ``nbytes`` is the size of one tensor of the data."""
    if device.type == "cpu":
        data = make_data()
        return {name: wall(lambda f=f: f(data), nbytes < CACHED_BYTES) for name, f in providers.items()}
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    sets = [make_data() for _ in range(min(1 + ceil(2 * l2 / nbytes), MOST_SETS))]
    sampler = {"call": events, "graph": graph}[mode]
    return {name: sampler([lambda f=f, data=data: f(data) for data in sets]) for name, f in providers.items()}


def wall(call: Callable, warm: bool, clock: Callable[[], float] = time.perf_counter) -> Sampler:
    """Wall-clock seconds of one call. ``warm``: right after an untimed one, so that it meets the caches as it left
    them, not as another provider did."""

    def sample() -> float:
        if warm:
            call()
        start = clock()
        call()
        return clock() - start

    return sample


def events(calls: list[Callable]) -> Sampler:
    """Seconds per call between two events around all calls, made one by one."""

    def sample() -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for call in calls:
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / len(calls)

    return sample


def graph(calls: list[Callable]) -> Sampler:
    """Seconds per call of a graph of all calls, captured at the first sample and replayed."""
    replay = None

    def sample() -> float:
        nonlocal replay
        replay = replay or events([_captured(calls).replay])
        return replay() / len(calls)

    return sample


def _captured(calls: list[Callable]) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compile and allocate before the capture
        for call in calls[:1] * 3:
            call()
    torch.cuda.current_stream().wait_stream(side)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        for call in calls:
            call()
    return captured
