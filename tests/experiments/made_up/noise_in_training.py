"""The accuracies of Figure 1, and the same C for all runs, so that the noise grows with the learning rate.

For breaks C more than compensates the rate.
"""

import math

import numpy as np

from tests.experiments.made_up import Arrays, learning_rates


def noisy(config: dict, c: float) -> Arrays:
    felt = config["options"]["lr"] * c / config["batch"]
    results = {"step": [0, 10], "C": [c, c], "|g|^2": [1.0, 1.0], "lr C / |B|": [felt, felt]}
    results |= {"C before the first drop": c, "lr C / |B| before the first drop": felt}
    results |= {"log10 lr C / |B| before the first drop": math.log10(felt)}
    return learning_rates.holds(config) | {name: np.asarray(value, float) for name, value in results.items()}


def holds(config: dict) -> Arrays:
    return noisy(config, 100.0)


def breaks(config: dict) -> Arrays:
    return noisy(config, config["options"]["lr"] ** -2 * (1000 if config["norm"] == "none" else 1))
