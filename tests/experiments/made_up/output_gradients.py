"""Figure 6: one full column without batch norm. For breaks the networks are exchanged."""

import numpy as np

from tests.experiments.made_up import Arrays, scalars


def holds(config: dict) -> Arrays:
    return _net(config, config["norm"] == "batch")


def breaks(config: dict) -> Arrays:
    return _net(config, config["norm"] != "batch")


def _net(config: dict, batch: bool) -> Arrays:
    gradient = np.zeros((config["batch"], 10))
    gradient[:, 9] = (0.3 if batch else 0.95) / config["batch"]
    numbers = dict(entropy=1.1, cosine=0.1) if batch else dict(entropy=1e-20, cosine=0.8)
    return scalars(gradient=gradient, largest_column_mean=0.3 if batch else 0.95, **numbers)
