"""Made-up results of whole experiments, and a stand-in for their procedures."""

from pathlib import Path

from experiments import results as reading
from experiments import run as running
from experiments import spec
from experiments.results import Finished, Results
from tests.experiments.made_up import made_up


def results_of(name: str, holds: bool = True, seeds: int | None = None, **changed: float) -> Results:
    """Made-up results at scale full, for which the claims hold or break, but for ``changed``.

    The default number of seeds is 2, or enough for percentiles if there is a claim on all runs together.
    """
    seeds = seeds or enough_seeds(name)
    runs = []
    for planned in running.plan([name], "full", "cifar10", seeds, Path()):
        made = Finished(planned.folder, planned.config, {"seconds": 1.0, "started": "2026-11-28T12:00:00"})
        made.__dict__["arrays"] = made_up(planned.config, holds) | changed
        runs.append(made)
    return Results("full", "cifar10", tuple(runs))


def enough_seeds(name: str) -> int:
    return reading.FOR_PERCENTILES if any(claim.pooled for claim in spec(name).claims) else 2


class Procedure:
    """Stands in for a measurement: gives the paper's numbers, counts its calls, and raises what ``fails`` says."""

    def __init__(self, fails: dict[int, BaseException] | None = None) -> None:
        self.calls: list[tuple[str, int]] = []
        self.fails = fails or {}

    def __call__(self, config: dict, data, device, folder, tick) -> dict:
        self.calls.append((config["label"], config["seed"]))
        tick(0.5, "half way")
        if error := self.fails.get(len(self.calls)):
            raise error
        return {"all": made_up(config)}


def read(folder: Path, scale: str | None = None) -> Results:
    return reading.read(folder, spec(folder.name), scale)


def run(out: Path, **options: object) -> int:
    return running.run(["moments_by_depth"], **{"scale": "smoke", "out": out, **options})
