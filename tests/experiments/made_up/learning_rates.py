"""The accuracies of Figure 1. For breaks low rates are better, and the wrong runs diverge."""

import numpy as np

from experiments.specs.learning_rates import FINAL
from tests.experiments.made_up import Arrays


def trained(test: float, train: float = 99.9, early: float = 80.0, diverged: float = 0.0) -> Arrays:
    """The results of the procedure for a training run."""
    results = {
        "share": [0.5, 1.0],
        "train curve": [early, train],
        "test curve": [early, test],
        "test accuracy": np.nan if diverged else test,
        "train accuracy": np.nan if diverged else train,
        "best test accuracy": test,
        "test accuracy before the first drop": early,
        "diverged": diverged,
        "steps": 100,
    }
    return {name: np.asarray(value, float) for name, value in results.items()}


def holds(config: dict) -> Arrays:
    test, early, train = FINAL.get(config["label"], (93.0, 85.0, 99.9))
    return trained(test, train, early, float(config["label"] in ("none-0.003", "none-0.1")))


def breaks(config: dict) -> Arrays:
    tests = {"batch-0.1": 50.0, "batch-0.003": 60.0, "batch-0.0001": 70.0, "none-0.0001": 90.0}
    return trained(tests.get(config["label"], 10.0), 70.0) | {"diverged": np.asarray(float("fixup" in config["label"]))}
