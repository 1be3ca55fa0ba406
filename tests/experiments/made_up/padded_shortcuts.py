"""Figure 5 without the falls, and for breaks with them."""

import numpy as np

from experiments.specs.padded_shortcuts import PAPER
from tests.experiments.made_up import Arrays, from_paper


def holds(config: dict) -> Arrays:
    return {name: np.zeros(1) for name in breaks(config)}


def breaks(config: dict) -> Arrays:
    return from_paper(PAPER, config)
