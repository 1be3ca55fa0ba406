"""Result files read back, and the paper's claims held against them. Needs numpy alone."""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from .specs import SCALES, Claim, Run, Spec


@dataclass(frozen=True)
class Finished:
    """One finished run: its folder, ``config`` (what was asked) and ``env`` (what it ran on)."""

    folder: Path
    config: dict
    env: dict

    @cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        """Everything measured, by name; of a layer ``<quantity>/<layer>``."""
        arrays = {}
        for file in sorted((self.folder / "probes").glob("*.npz")):
            with np.load(file) as stored:
                arrays |= dict(stored)
        return arrays

    def at(self, quantity: str, layer: int | None = None) -> np.ndarray:
        """What was measured of one quantity, at one layer where it is of layers."""
        return self.arrays[quantity if layer is None else f"{quantity}/{layer}"]


@dataclass(frozen=True)
class Results:
    """The finished runs of one experiment at one scale, on one kind of data: "cifar10", "synthetic", "none"."""

    scale: str
    data: str
    runs: tuple[Finished, ...]
    stale: int = 0  # runs that were left out, see read

    def where(self, **config: object) -> list[Finished]:
        """The runs whose config, or its options, have these values, by seed."""
        return [run for run in self.runs if all((run.config | run.config["options"])[k] == config[k] for k in config)]

    def each(self, quantity: str, layer: int | None = None, **config: object) -> list[float]:
        """One number a run: the quantity at the layer, averaged over channels where it has any."""
        return [float(np.mean(run.at(quantity, layer))) for run in self.where(**config)]

    def ratio(self, of: dict, to: dict) -> list[float]:
        """One number a seed that has both: the first over the second, each given as the arguments of ``each``."""
        first, second = (self._by_seed(**which) for which in (of, to))
        pairs = [(first[seed], second[seed]) for seed in sorted(first.keys() & second.keys())]
        return [a / b if b else math.inf for a, b in pairs]

    def _by_seed(self, quantity: str, layer: int | None = None, **config: object) -> dict[int, float]:
        seeds = [run.config["seed"] for run in self.where(**config)]
        return dict(zip(seeds, self.each(quantity, layer, **config), strict=True))

    def difference(self, quantity: str, layer: int, after: int, **config: object) -> list[float]:
        """One number a run: the quantity at ``layer`` less that at ``after``."""
        pairs = zip(self.each(quantity, layer, **config), self.each(quantity, after, **config), strict=True)
        return [first - second for first, second in pairs]

    def slope(self, quantity: str, layers: tuple[int, ...], **config: object) -> list[float]:
        """One number a run: the least-squares slope of the quantity over the layers' numbers."""
        columns = [self.each(quantity, layer, **config) for layer in layers]
        return [float(np.polyfit(layers, row, 1)[0]) for row in zip(*columns, strict=True)]

    def gap(self, quantity: str, first: str, second: str) -> list[float]:
        """One number a seed that both runs have: the quantity of the run labelled ``first`` less the ``second``'s."""
        of, less = (self._by_seed(quantity, label=label) for label in (first, second))
        return [of[seed] - less[seed] for seed in sorted(of.keys() & less.keys())]


def configuration(experiment: str, about: Spec, run: Run, scale: str, data: str, seed: int) -> dict:
    """All that decides what one run measures, as its ``config.json`` has it."""
    asked = asdict(run) | {"experiment": experiment, "scale": scale, "data": data if about.images else "none"}
    del asked["seeds"]
    return json.loads(json.dumps(asked | {"seed": seed}))  # so that it equals what is read back


def finished(folder: Path) -> Iterator[Finished]:
    """The finished runs in the folder of one experiment, by label and seed, whatever their configuration."""
    found = []
    for done in folder.glob("*/DONE"):
        config, env = (json.loads((done.parent / f"{name}.json").read_text()) for name in ("config", "env"))
        found.append(Finished(done.parent, config, env))
    yield from sorted(found, key=lambda run: (run.config["label"], run.config["seed"]))


def read(folder: Path, about: Spec, scale: str | None = None) -> Results:
    """The results of one experiment: of the scale asked for, else the largest there is, on real images if any.

    Runs whose configuration is not, or no longer, one of the spec's are counted as ``stale`` and otherwise left out.
    """
    groups: dict[tuple[bool, int, str], list[Finished]] = {}
    stale = 0
    for run in finished(folder):
        at, data, seed = (run.config[name] for name in ("scale", "data", "seed"))
        wanted = (configuration(folder.name, about, planned, at, data, seed) for planned in about.at(at))
        if run.config not in wanted:
            stale += 1
        elif scale is None or at == about.scale(scale):
            groups.setdefault((data != "synthetic", SCALES.index(at), data), []).append(run)
    if not groups:
        return Results(scale or "none", "none", (), stale)
    best = max(groups)
    return Results(SCALES[best[1]], best[2], tuple(groups[best]), stale)


@dataclass(frozen=True)
class Finding:
    """A claim beside what we found: the mean of ``values`` (one a seed), their spread, and whether it held.

    ``spread`` is the standard deviation; with geometric means the factor exp(standard deviation of ln). ``held``
    is None where there is nothing to check, or nothing to check it on.
    """

    claim: Claim
    values: tuple[float, ...]
    mean: float
    spread: float
    held: bool | None


def find(claim: Claim, results: Results) -> Finding:
    """One claim held against the results. A value that is not a number never holds."""
    values = tuple(claim.ours(results))
    if not values:
        return Finding(claim, (), math.nan, math.nan, None)
    geometric = claim.mean == "geometric"
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.log(values) if geometric else np.asarray(values)
        mean = float(np.mean(terms))
        spread = float(np.std(terms, ddof=1)) if len(values) > 1 else math.nan
        if geometric:
            mean, spread = float(np.exp(mean)), float(np.exp(spread))
    held = bool(claim.check.holds(mean)) if claim.check else None
    return Finding(claim, values, mean, spread, held)


def verdict(findings: list[Finding], results: Results) -> str:
    """ "held", "held in part" or "did not hold"; "not run"; "not judged" where the scale or the data cannot tell.

    "incomplete" while runs are missing that a claim to be checked needs.
    """
    if not results.runs:
        return "not run"
    if results.scale == "smoke" or results.data == "synthetic":
        return "not judged"
    checked = [finding for finding in findings if finding.claim.check]
    if not all(finding.values for finding in checked):
        return "incomplete"
    held = [finding.held for finding in checked]
    if all(held):
        return "held" if held else "not judged"
    return "held in part" if any(held) else "did not hold"


def judge(spec: Spec, results: Results) -> tuple[str, list[Finding]]:
    """The verdict on an experiment and what it rests on."""
    findings = [find(claim, results) for claim in spec.claims]
    return verdict(findings, results), findings
