"""Reads result files, and judges the paper's claims by them. Needs numpy only."""

import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .specs import JUDGED, PRECISIONS, SCALES, TRAINING, Claim, Run, Spec

PUBLISHED = Path(__file__).parent / "published"
RUNS = "runs"  # its subfolder for finished runs that take hours, by experiment
FOR_PERCENTILES = 40  # the number of runs from which percentiles are stated: then 2.5 % is one run


class Value(NamedTuple):
    """A number of one run, or only a bound of it, if a search ended at the edge of its range.

    ``bound``: 0 for the number itself, 1 if the true number is at least ``number``, -1 if it is at most ``number``, and
    None if two bounds were combined that do not bound the result.
    """

    number: float
    bound: int | None = 0

    def minus(self, other: "Value") -> "Value":
        """The difference of the two numbers."""
        return Value(self.number - other.number, _combined(self.bound, other.bound))

    def over(self, other: "Value") -> "Value":
        """The ratio of two numbers that are not negative. nan if the denominator is 0."""
        ratio = self.number / other.number if other.number else math.nan
        return Value(ratio, _combined(self.bound, other.bound))


def _combined(first: int | None, second: int | None) -> int | None:
    """The bound of a result that rises with the first number and falls with the second."""
    if first is None or second is None:
        return None
    if first and second:
        return first if first == -second else None
    return first or -second


@dataclass(frozen=True)
class Finished:
    """One finished run: its folder, ``config`` (its configuration) and ``env`` (the machine and the versions)."""

    folder: Path
    config: dict
    env: dict

    @property
    def precision(self) -> str:
        """One of specs.PRECISIONS, that of its training."""
        return self.config["options"].get("precision", PRECISIONS[0])

    @cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        """All measured arrays by name. The name is ``<quantity>/<layer>`` if the quantity belongs to a layer."""
        arrays: dict[str, np.ndarray] = {}
        for file in sorted((self.folder / "probes").glob("*.npz")):
            with np.load(file) as stored:
                arrays |= dict(stored)
        return arrays

    def at(self, quantity: str, layer: int | None = None) -> np.ndarray:
        """The array of one quantity, at one layer if it is measured for each layer."""
        return self.arrays[quantity if layer is None else f"{quantity}/{layer}"]

    def value(self, quantity: str, layer: int | None = None) -> Value:
        """The quantity, averaged over channels if it has any, and its bound.

        The bound is read from the array "<quantity> bound", if there is one. A quantity of :data:`DERIVED` is computed.
        """
        if quantity in DERIVED:
            return Value(DERIVED[quantity](self))
        name = f"{quantity} bound" + ("" if layer is None else f"/{layer}")
        bound = int(self.arrays[name]) if name in self.arrays else 0
        return Value(float(np.mean(self.at(quantity, layer))), bound)


def _dead(run: Finished) -> float:
    """1 if a training run ended at chance, without divergence: its network guesses.

    The train accuracy of its last epoch is then at most that of a guess among ten classes, 10 %, and three standard
    deviations of a binomial share of the epoch's images.
    """
    batch = run.config["batch"]
    images = run.config["options"].get("images", 50_000) // batch * batch
    return float(run.at("train accuracy") <= 100 * (0.1 + 3 * math.sqrt(0.1 * 0.9 / images)))  # 0 if nan: it diverged


DERIVED: dict[str, Callable[[Finished], float]] = {  # quantities that follow from the arrays of a training run
    "dead": _dead,
    "train minus test accuracy": lambda run: float(run.at("train accuracy") - run.at("test accuracy")),
}


def judged(scale: str, data: str) -> bool:
    """Whether claims are judged by results of this scale on these data."""
    return scale in JUDGED and data != "synthetic"


@dataclass(frozen=True)
class Results:
    """The finished runs of one experiment at one scale and precision, on one kind of data.

    The kinds of data are "cifar10", "synthetic" and "none".
    """

    scale: str
    data: str
    runs: tuple[Finished, ...]
    stale: int = 0  # the number of runs that were left out, see read
    precision: str = PRECISIONS[0]

    def where(self, **config: object) -> list[Finished]:
        """The runs whose config or options have these values, in the order of their seeds."""
        return [run for run in self.runs if all((run.config | run.config["options"])[k] == config[k] for k in config)]

    def each(self, quantity: str, layer: int | None = None, **config: object) -> list[Value]:
        """One value for each run: the quantity at the layer, averaged over channels if it has any."""
        return [run.value(quantity, layer) for run in self.where(**config)]

    def ratio(self, of: dict, to: dict) -> list[Value]:
        """One value for each seed that has both: the first over the second. Both are given as arguments of ``each``."""
        first, second = (self._by_seed(**selection) for selection in (of, to))
        return [first[seed].over(second[seed]) for seed in sorted(first.keys() & second.keys())]

    def _by_seed(self, quantity: str, layer: int | None = None, **config: object) -> dict[int, Value]:
        seeds = [run.config["seed"] for run in self.where(**config)]
        return dict(zip(seeds, self.each(quantity, layer, **config), strict=True))

    def difference(self, quantity: str, layer: int, after: int, **config: object) -> list[Value]:
        """One value for each run: the quantity at ``layer`` minus that at ``after``."""
        pairs = zip(self.each(quantity, layer, **config), self.each(quantity, after, **config), strict=True)
        return [first.minus(second) for first, second in pairs]

    def slope(self, quantity: str, layers: tuple[int, ...], **config: object) -> list[float]:
        """One number for each run: the least-squares slope of the quantity over the layers' numbers."""
        columns = [[value.number for value in self.each(quantity, layer, **config)] for layer in layers]
        return [float(np.polyfit(layers, row, 1)[0]) for row in zip(*columns, strict=True)]

    def gap(self, quantity: str, first: str, second: str) -> list[Value]:
        """One value for each seed that has both runs: the quantity of the run labelled ``first`` minus ``second``'s."""
        minuends, subtrahends = (self._by_seed(quantity, label=label) for label in (first, second))
        return [minuends[seed].minus(subtrahends[seed]) for seed in sorted(minuends.keys() & subtrahends.keys())]

    def distance(self, paper: tuple[float, ...], error: float, quantity: str, layers: tuple, **config: object) -> list:
        """The distance of the paper's curve over the layers from our runs, as a percentile of our runs' distances.

        The distance of a curve is (curve - mean)^T (covariance + error^2 I)^-1 (curve - mean), Mahalanobis' with the
        error of reading the paper's figure. Mean and covariance are those of our runs. For the distance of one of our
        runs they are those of the others. With fewer than :data:`FOR_PERCENTILES` runs the result is not known.
        """
        curves = np.array([[run.value(quantity, layer).number for layer in layers] for run in self.where(**config)])
        if len(curves) < FOR_PERCENTILES:
            return [Value(math.nan, None)] if len(curves) else []

        def squared(curve: np.ndarray, others: np.ndarray) -> float:
            covariance = np.cov(others, rowvar=False) + error**2 * np.eye(len(layers))
            deviation = curve - others.mean(0)
            return float(deviation @ np.linalg.solve(covariance, deviation))

        ours = [squared(curve, np.delete(curves, k, 0)) for k, curve in enumerate(curves)]
        return [Value(100 * float(np.mean(np.array(ours) < squared(np.array(paper), curves))))]


def configuration(
    experiment: str, spec: Spec, run: Run, scale: str, data: str, seed: int, precision: str = PRECISIONS[0]
) -> dict:
    """Everything that determines what one run measures. This is the content of its ``config.json``.

    The precision is an option of training runs. The first one of PRECISIONS is not written, and other runs have none.
    """
    content = asdict(run) | {"experiment": experiment, "scale": scale, "data": data if spec.images else "none"}
    del content["seeds"]
    if precision != PRECISIONS[0] and run.procedure in TRAINING:
        content["options"] |= {"precision": precision}
    return json.loads(json.dumps(content | {"seed": seed}))  # so that it equals the content of the file


def folder_name(config: dict) -> str:
    """The name of a run's folder, which differs between the configurations of one spec."""
    parts = [config["scale"], config["label"], f"seed{config['seed']}", config["options"].get("precision")]
    return "-".join([*filter(None, parts), *["synthetic"] * (config["data"] == "synthetic")])


def serves(config: dict, requested: dict) -> bool:
    """Whether a training run measures what the run ``requested`` would, so that it need not be repeated.

    Their settings are equal: everything but experiment and label. A run that also measures the noise of its gradients
    serves as one that does not, because the measurement changes no bit of the training.
    """
    unused = () if "noise" in requested["options"] else ("noise",)

    def settings(run_config: dict) -> dict:
        options = {name: value for name, value in run_config["options"].items() if name not in unused}
        return run_config | {"experiment": None, "label": None, "options": options}

    return config.get("procedure") in TRAINING and settings(config) == settings(requested)


def trained(out: Path) -> Iterator[tuple[Path, dict]]:
    """Folder and configuration of all finished training runs in a folder of results, of any experiment."""
    for marker in sorted(out.glob("*/*/DONE")):
        config = json.loads((marker.parent / "config.json").read_text())
        if config.get("procedure") in TRAINING:
            yield marker.parent, config


def finished(folder: Path) -> Iterator[Finished]:
    """The finished runs in the folder of one experiment, by label and seed, of any configuration."""
    runs = []
    for marker in folder.glob("*/DONE"):
        config, env = (json.loads((marker.parent / f"{name}.json").read_text()) for name in ("config", "env"))
        runs.append(Finished(marker.parent, config, env))
    yield from sorted(runs, key=_order)


def read(folder: Path, spec: Spec, scale: str | None = None, published_runs: Path | None = None) -> Results:
    """The results of one experiment: of ``scale``, or else of the largest scale that was run, on CIFAR-10 if possible.

    Runs in the folder ``published_runs`` are added if ``folder`` does not have them, and so are training runs of the
    experiments beside either folder that serve as runs of this one. Runs whose configuration is not one of the spec's
    are counted as ``stale`` and left out. Of two precisions the first one of PRECISIONS is read.
    """
    places = [place for place in (folder, published_runs) if place]
    stored = {run.folder.name: run for place in reversed(places) for run in finished(place)}
    runs = {name: run for name, run in stored.items() if run.config in _planned(folder.name, spec, run.config)}
    stale = len(stored) - len(runs)
    for place in places if any(run.procedure in TRAINING for run in spec.runs) else ():
        for shared, config in trained(place.parent):
            for requested in _planned(folder.name, spec, config):
                if folder_name(requested) not in runs and serves(config, requested):
                    runs[folder_name(requested)] = Finished(
                        shared, requested, json.loads((shared / "env.json").read_text())
                    )
    groups: dict[tuple[bool, int, int, str], list[Finished]] = {}
    for run in sorted(runs.values(), key=_order):
        run_scale, data = run.config["scale"], run.config["data"]
        if scale is None or run_scale == spec.scale(scale):
            rank = data != "synthetic", SCALES.index(run_scale), -PRECISIONS.index(run.precision), data
            groups.setdefault(rank, []).append(run)
    if not groups:
        return Results(scale or "none", "none", (), stale)
    best = max(groups)
    return Results(SCALES[best[1]], best[3], tuple(groups[best]), stale, PRECISIONS[-best[2]])


def _planned(experiment: str, spec: Spec, sample: dict) -> list[dict]:
    """The configurations of the spec's runs at the scale and precision, on the data and with the seed of ``sample``."""
    scale, data, seed = (sample[name] for name in ("scale", "data", "seed"))
    precision = sample["options"].get("precision", PRECISIONS[0])
    planned = spec.at(scale) if scale in SCALES else ()
    return [configuration(experiment, spec, run, scale, data, seed, precision) for run in planned]


def _order(run: Finished) -> tuple[str, int]:
    return run.config["label"], run.config["seed"]


@dataclass(frozen=True)
class Finding:
    """A claim and our numbers: the mean of ``values`` (one for each seed), their spread, and whether the claim held.

    ``spread`` is the standard deviation. For geometric means it is the factor exp(standard deviation of ln). ``bound``
    is that of the mean (see Value): 0 if every value is a number, and not merely a bound. ``held`` is None if there is
    no check, if the results are not judged, or if the mean is only a bound. ``passing`` counts the seeds whose own
    value is a number that passes the check.
    """

    claim: Claim
    values: tuple[Value, ...]
    mean: float
    spread: float
    bound: int | None
    held: bool | None
    passing: int

    @property
    def undecided(self) -> bool:
        """Whether the claim would be judged if its values were more than bounds."""
        return self.claim.check is not None and bool(self.values) and self.bound != 0

    @property
    def percentile(self) -> float | None:
        """The percentage of our numbers that are below the paper's, if there are :data:`FOR_PERCENTILES` or more."""
        if self.claim.paper is None or len(self.values) < FOR_PERCENTILES or self.bound != 0:
            return None
        return 100 * sum(value.number < self.claim.paper for value in self.values) / len(self.values)


def find(claim: Claim, ours: Iterable[Value | float], judged: bool) -> Finding:
    """One claim judged by our values, one for each seed.

    If one of the values is not finite, the claim does not hold. If the mean is only a bound, the claim is undecided.
    """
    values = tuple(value if isinstance(value, Value) else Value(float(value)) for value in ours)
    if not values:
        return Finding(claim, (), math.nan, math.nan, 0, None, 0)
    numbers = np.array([value.number for value in values])
    geometric = claim.mean == "geometric"
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.log(numbers) if geometric else numbers
        mean = float(np.mean(terms))
        spread = float(np.std(terms, ddof=1)) if len(values) > 1 else math.nan
        if geometric:
            mean, spread = float(np.exp(mean)), float(np.exp(spread))
    bounds = {value.bound for value in values} - {0}
    bound = 0 if not bounds else bounds.pop() if len(bounds) == 1 else None
    held, passing = None, 0
    if claim.check and judged:
        passing = sum(_holds(claim, value.number) for value in values if value.bound == 0)
        held = _holds(claim, mean) if bound == 0 else None
    return Finding(claim, values, mean, spread, bound, held, passing)


def _holds(claim: Claim, number: float) -> bool:
    return claim.check is not None and math.isfinite(number) and bool(claim.check.holds(number))


def verdict(findings: list[Finding], ran: bool, judged: bool) -> str:
    """ "held", "held in part" or "did not hold"; "not run"; "shown" if the results are not judged.

    The verdict is "incomplete" while runs are missing that a checked claim needs. "held" requires that no checked claim
    is undecided.
    """
    if not ran:
        return "not run"
    if not judged:
        return "shown"
    checked = [finding for finding in findings if finding.claim.check]
    if not all(finding.values for finding in checked):
        return "incomplete"
    held = [finding.held is True for finding in checked]
    if all(held):
        return "held" if held else "shown"
    if any(held):
        return "held in part"
    return "undecided" if all(finding.undecided for finding in checked) else "did not hold"


def judge(spec: Spec, results: Results) -> tuple[str, list[Finding]]:
    """The verdict on an experiment, and the findings behind it."""
    judging = judged(results.scale, results.data)
    findings = [find(claim, claim.ours(results), judging) for claim in spec.claims]
    return verdict(findings, bool(results.runs), judging), findings
