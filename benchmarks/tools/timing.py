"""Times several providers of one result.

The providers take turns, with one sample each per round, so that drift and noise affect all of them alike. Ratios are
computed within a round before the median over the rounds is taken. On the CPU a sample is the wall-clock time of one
call. On a GPU it is the time between two events around calls on several sets of buffers. Together the sets are larger
than the L2 cache, so that the tensors of each call are not in it. The calls are made one by one, or captured once and
replayed as a graph.
"""

import time
from collections.abc import Callable, Mapping
from math import ceil
from typing import NamedTuple

import numpy as np
import torch

CACHED_BYTES = 64e6  # smaller tensors may stay in a last-level cache, larger ones do not
MOST_SETS = 64

Sampler = Callable[[], float]  # takes one sample and returns seconds per call


class Summary(NamedTuple):
    """Milliseconds per call over the rounds."""

    median_ms: float
    p20_ms: float
    p80_ms: float
    rounds: int


class Comparison:
    """Providers that take turns. The first one is under test. A peer that raises is listed in ``missing``."""

    def __init__(self, samplers: Mapping[str, Sampler]) -> None:
        self.samplers = dict(samplers)
        self.first, *_ = self.samplers
        self.seconds: dict[str, list[float]] = {name: [] for name in self.samplers}
        self.missing: dict[str, str] = {}
        self._turn = 0

    def warm_up(self) -> float:
        """Runs two rounds that do not count. The first compiles and fills pools. Returns the seconds of the second."""
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
        """Takes the peers' samples of a round. Each round begins with another peer."""
        peers = [name for name in self.samplers if name != self.first]
        for k in range(len(peers)):
            name = peers[(k + self._turn) % len(peers)]
            self.seconds[name].append(self.samplers[name]())
        self._turn += 1

    def sample_first(self) -> None:
        """Takes the sample of the provider under test, which ends a round."""
        self.seconds[self.first].append(self.samplers[self.first]())

    def summary(self, name: str) -> Summary:
        p20, median, p80 = np.percentile(self.seconds[name], (20, 50, 80)) * 1e3
        return Summary(float(median), float(p20), float(p80), len(self.seconds[name]))

    def ratio(self, base: str, name: str) -> float:
        """The speed of ``name`` over that of ``base``: the median of the rounds' ratios."""
        return float(np.median(np.divide(self.seconds[base], self.seconds[name])))


def reason(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def rounds_within(budget_s: float, round_s: float, least: int = 5, most: int = 300) -> int:
    """The number of rounds that fit the time budget, limited to ``least`` to ``most``."""
    return int(min(max(budget_s / max(round_s, 1e-9), least), most))


def modes(device: torch.device) -> tuple[str, ...]:
    """The modes of calling: one call at a time, and on a GPU also a replayed graph."""
    return ("call", "graph") if device.type == "cuda" else ("call",)


def samplers(
    providers: Mapping[str, Callable],
    make_data: Callable[[], object],
    nbytes: int,
    device: torch.device,
    mode: str = "call",
) -> dict[str, Sampler]:
    """A sampler for each provider. A provider is a function of the data, whose tensors have ``nbytes`` bytes."""
    if device.type == "cpu":
        data = make_data()
        return {name: wall(lambda f=f: f(data), nbytes < CACHED_BYTES) for name, f in providers.items()}
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    sets = [make_data() for _ in range(min(1 + ceil(2 * l2 / nbytes), MOST_SETS))]
    sampler = {"call": events, "graph": graph}[mode]
    return {name: sampler([lambda f=f, data=data: f(data) for data in sets]) for name, f in providers.items()}


def wall(call: Callable, warm: bool, clock: Callable[[], float] = time.perf_counter) -> Sampler:
    """Wall-clock seconds of one call. With ``warm`` an untimed call precedes it, so that the caches hold the tensors of
    this provider and not those of another."""

    def sample() -> float:
        if warm:
            call()
        start = clock()
        call()
        return clock() - start

    return sample


def events(calls: list[Callable]) -> Sampler:
    """Seconds per call between two events around all calls, which are made one by one."""

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
    side_stream = torch.cuda.Stream()
    side_stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side_stream):  # compile and allocate before the capture
        for call in calls[:1] * 3:
            call()
    torch.cuda.current_stream().wait_stream(side_stream)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        for call in calls:
            call()
    return captured
