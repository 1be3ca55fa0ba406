"""Losses that are lowest at 0.0001, and for breaks at 0.1."""

import math

import numpy as np

from tests.experiments.made_up import Arrays


def losses(config: dict, best: float) -> Arrays:
    """The results of the procedure for a search among learning rates."""
    rates = sorted(config["options"]["lrs"])
    last = [1.0 + abs(math.log10(rate / best)) for rate in rates]
    results = {"lrs": rates, "last loss": last, "best rate": math.log10(best), "learning limit": math.log10(best)}
    results |= {f"last loss at {rate:g}": loss for rate, loss in zip(rates, last, strict=True)}
    return {name: np.asarray(value, float) for name, value in results.items()}


def holds(config: dict) -> Arrays:
    return losses(config, 1e-4)


def breaks(config: dict) -> Arrays:
    return losses(config, 0.1)
