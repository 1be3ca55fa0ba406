"""Figure 2: a narrow distribution with batch norm, and one a hundred times wider with heavy tails without.

For breaks the networks are exchanged.
"""

import numpy as np

from tests.experiments.made_up import Arrays, scalars

EDGES = np.concatenate([-(2.0 ** np.arange(4, -13, -1)), 2.0 ** np.arange(-12, 5)])


def holds(config: dict) -> Arrays:
    sd, kurtosis, largest = (0.012, 0.5, 0.04) if config["norm"] == "batch" else (1.2, 50, 4)
    counts = np.exp(-np.abs(EDGES[:-1]))
    return scalars(55, sd=sd, excess_kurtosis=kurtosis, largest=largest, histogram=1000 * counts, edges=EDGES)


def breaks(config: dict) -> Arrays:
    return holds(config) | scalars(55, sd=1.0, excess_kurtosis=8.0)
