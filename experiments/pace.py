"""Estimates of the time that runs take: the shares of the runs of an experiment, and the time that is left.

The specs state minutes for each experiment on two cores. The ratio to the time on another machine differs between
experiments. Every finished run therefore corrects the estimate of its experiment, of its procedure, and of all others.
"""

import math
import time
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from bnkern.train.resnet import ResNet

from .specs import TRAINING, Run

REFERENCE = 0.093  # seconds of the step that step_seconds takes, on the machine of the specs' minutes
NORM_WORK = {"instance": 1.6}  # seconds of a step of ResNet-56 over those with layer or group norm, on Zen 5


def work(run: Run) -> float:
    """The work of a run in the unit of its procedure. It serves to compare the runs of one experiment."""
    options = run.options
    if "epochs" in options and run.procedure in TRAINING:
        rates = 12 if options.get("search") else len(options.get("lrs", [0]))  # a search tries about 12
        steps = max(1, options["epochs"]) * options.get("images", 50_000) * rates
        return run.depth * steps * NORM_WORK.get(run.norm, 1)
    if run.procedure == "noise":
        images = sum(min(options["most"] * size, options["budget"]) for size in options["sizes"])
        return images + options["images"] * (options["mode"] == "frozen")
    if run.procedure == "theory":
        return max(options["factors"]) * options.get("size", 80) ** 3
    return options.get("batches", 1)


def shares(runs: Iterable[Run]) -> dict[str, float]:
    """The share that one seed of each run has in the time of all runs and seeds, by label."""
    weights = {run.label: (work(run), run.seeds) for run in runs}
    total = sum(weight * seeds for weight, seeds in weights.values())
    return {label: weight / total for label, (weight, _) in weights.items()}


def step_seconds(device: torch.device) -> float:
    """The seconds of a training step of a ResNet-8 with 128 images: the faster of two steps, after one to warm up."""
    torch.manual_seed(0)
    network = ResNet(8, "batch").to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = torch.rand(128, 3, 32, 32, device=device).contiguous(memory_format=torch.channels_last)
    labels = torch.arange(128, device=device) % 10
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        F.cross_entropy(network(images), labels).backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


class Kind(NamedTuple):
    """The properties that determine the pace of a run."""

    procedure: str
    experiment: str


class Pace:
    """The ratio of measured to expected seconds, from the finished runs.

    The pace of an experiment is that of its finished runs and of one more run, which has the pace of the procedure.
    The pace of a procedure is the geometric mean over its experiments and the overall pace, each with weight 1.
    The overall pace is the geometric mean over the experiments and ``start``, the estimate before any run. Its
    weight is ``START``, because a step that takes a second predicts less than an experiment that takes minutes.
    An experiment whose finished runs were expected to take less than a second has that part of a second as its
    weight. The fixed costs of such short runs make their ratio large.
    """

    START = 0.25

    def __init__(self, start: float = 1.0) -> None:
        self._start = start
        self._expected: dict[Kind, list[float]] = {}
        self._seconds: dict[Kind, float] = {}

    def add(self, kind: Kind, expected: float, seconds: float) -> None:
        """Adds a finished run that took ``seconds`` and was expected to take ``expected`` seconds."""
        self._expected.setdefault(kind, []).append(expected)
        self._seconds[kind] = self._seconds.get(kind, 0.0) + max(seconds, 1e-3)

    def of(self, kind: Kind) -> float:
        """The expected pace of the next runs of a kind."""
        overall = self._mean(self._seconds, self._start, self.START)
        pace = self._mean([other for other in self._seconds if other.procedure == kind.procedure], overall, 1.0)
        if kind not in self._seconds:
            return pace
        expected = self._expected[kind]
        typical = sum(expected) / len(expected)
        return (self._seconds[kind] + pace * typical) / (sum(expected) + typical)

    def _mean(self, kinds: Iterable[Kind], prior: float, prior_weight: float) -> float:
        total, weights = prior_weight * math.log(prior), prior_weight
        for kind in kinds:
            expected = sum(self._expected[kind])
            weight = min(1.0, expected)
            total += weight * math.log(self._seconds[kind] / expected)
            weights += weight
        return math.exp(total / weights)
