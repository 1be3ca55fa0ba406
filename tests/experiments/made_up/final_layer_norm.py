"""The numbers of Section 4, with limits that differ by a factor of ten. For breaks both are reversed."""

import numpy as np

from experiments.specs.final_layer_norm import PAPER
from tests.experiments.made_up import Arrays
from tests.experiments.made_up.learning_rates import trained

LIMITS = {"limit-none": -2.5, "limit-final": -1.5, "limit-batch": 0.0}


def limits(limit: float) -> Arrays:
    """The results of the procedure for a search of the largest rate."""
    results = {"lrs": [1e-3, 1], "survived": [1, 0], "learned": [1, 0], "limit": limit, "learning limit": limit - 0.5}
    return {name: np.asarray(value, float) for name, value in results.items()}


def holds(config: dict) -> Arrays:
    return trained(PAPER[config["label"]]) if config["label"] in PAPER else limits(LIMITS[config["label"]])


def breaks(config: dict) -> Arrays:
    tests = {"batch-0.1": 20.0, "final-0.03": 90.0, "none-0.0001": 95.0}
    return trained(tests[config["label"]]) if config["label"] in tests else limits(-LIMITS[config["label"]])
