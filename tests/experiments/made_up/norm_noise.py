"""Noise scales that grow along training, the same in each of the three ways; for breaks samples show the opposite."""

import numpy as np

from experiments.procedures.norm_noise import KINDS
from tests.experiments.made_up import Arrays, scalars


def holds(config: dict) -> Arrays:
    return run(config, 1.0, 1.0)


def breaks(config: dict) -> Arrays:
    return run(config, -1.0, 5.0)


def run(config: dict, correlation: float, factor: float) -> Arrays:
    scale = np.array([10.0, 100.0])
    arrays: Arrays = {"step": np.array([0.0, 10.0])}
    for kind in KINDS:
        seen = factor * scale**correlation if kind == "samples" else scale
        arrays |= {f"noise {kind}": seen, f"square {kind}": np.ones(2), f"scale {kind}": seen}
    arrays |= {"noise, samples / norms": np.asarray(factor), "scale, samples / norms": np.asarray(factor)}
    return arrays | scalars(
        rank_correlation=correlation, departure=factor, rank_correlation_of_norms=1.0, test_accuracy=50.0
    )
