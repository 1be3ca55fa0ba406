"""Figure 7: without batch norm a few channels have most of the gradient. For breaks the networks are exchanged."""

import numpy as np

from tests.experiments.made_up import Arrays, scalars


def holds(config: dict) -> Arrays:
    return _net(config["norm"] == "batch")


def breaks(config: dict) -> Arrays:
    return _net(config["norm"] != "batch")


def _net(batch: bool) -> Arrays:
    i = np.arange(1, 33.0)
    matrix = np.ones((32, 32)) + i if batch else np.outer(i, i) ** 3
    uneven = dict(variation=0.4, rank_correlation=-0.3) if batch else dict(variation=2.5, rank_correlation=0.99)
    extra = {"variation of rows": 0.2, "variation of columns": 0.2, "explained by rows and columns": 0.95}
    return scalars(45, M=matrix, **{"input means": i}, **uneven, **extra)
