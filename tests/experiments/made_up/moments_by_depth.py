"""The numbers of Figure 5. For breaks all layers are alike and far from these."""

import numpy as np

from experiments.specs.moments_by_depth import PAPER
from tests.experiments.made_up import Arrays, from_paper


def holds(config: dict) -> Arrays:
    return from_paper(PAPER, config)


def breaks(config: dict) -> Arrays:
    return {name: np.full(1, 1e6) for name in holds(config)}
