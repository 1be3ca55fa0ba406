"""Layers as in Theorem 1 that training moves away from it. For breaks training moves layers towards it."""

import numpy as np

from tests.experiments.made_up import Arrays


def products(config: dict, init: float, trained: float) -> Arrays:
    results = {}
    for when, distance in (("init", init), ("trained", trained)):
        for m in range(1, len(config["layers"]) + 1):
            results |= {
                f"{when} s/{m}": np.linspace(0.1, 2, 10),
                f"{when} theorem/{m}": np.linspace(0.1, 2, 10),
                f"{when} distance/{m}": distance,
                f"{when} largest over edge/{m}": 1 + 2 * distance,
                f"{when} log10 kappa/{m}": m + 10 * distance,
            }
    return {name: np.asarray(value) for name, value in results.items()}


def holds(config: dict) -> Arrays:
    return products(config, 0.01, 0.2)


def breaks(config: dict) -> Arrays:
    return products(config, 0.3, 0.1)
