"""Made-up results of whole experiments, a stand-in for their procedures, and the configuration of a small training."""

from pathlib import Path

import numpy as np
import torch

from bnkern.train.cifar10 import synthetic
from experiments import results as result_files
from experiments import run as runner
from experiments import spec
from experiments.results import Finished, Results
from tests.experiments.made_up import made_up

IMAGES = synthetic(64, 20)
CPU = torch.device("cpu")


def results_of(name: str, holds: bool = True, seeds: int | None = None, **changes: float) -> Results:
    """Made-up results at scale full, for which the claims hold or break, but for ``changes``.

    The default number of seeds is 2, or enough for percentiles if there is a claim on all runs together.
    """
    seeds = seeds or enough_seeds(name)
    runs = []
    for planned in runner.plan([name], "full", "cifar10", seeds, Path()):
        run = Finished(planned.folder, planned.config, {"seconds": 1.0, "started": "2026-11-28T12:00:00"})
        run.__dict__["arrays"] = made_up(planned.config, holds) | changes
        runs.append(run)
    return Results("full", "cifar10", tuple(runs))


def enough_seeds(name: str) -> int:
    return result_files.FOR_PERCENTILES if any(claim.pooled for claim in spec(name).claims) else 2


class Procedure:
    """Stands in for a measurement: gives the paper's numbers, counts its calls, and raises the errors of ``fails``."""

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
    return result_files.read(folder, spec(folder.name), scale)


def run(out: Path, **options: object) -> int:
    return runner.run(["moments_by_depth"], **{"scale": "smoke", "out": out, **options})


def ignore_progress(share: float, what: str) -> None:
    pass


def configuration(norm: str = "batch", **options: object) -> dict:
    common = {"label": "run", "seed": 0, "depth": 8, "batch": 4, "norm": norm, "shortcut": "projection"}
    common |= {"init": "xavier_normal", "kernels": "bnkern", "layers": [], "quantities": []}
    return common | {"options": {"lr": 0.01, "epochs": 2, "images": 16, "tests": 10} | options}


def same_arrays(ours: dict[str, dict[str, np.ndarray]], theirs: dict[str, dict[str, np.ndarray]]) -> None:
    assert ours.keys() == theirs.keys()
    for file, arrays in ours.items():
        for name, values in arrays.items():
            np.testing.assert_array_equal(values, theirs[file][name], err_msg=name)
