"""The numbers of Table 1. For breaks all layers are alike and far from these."""

import numpy as np

from experiments.specs.gradient_signs import PAPER
from tests.experiments.made_up import Arrays, from_paper


def holds(config: dict) -> Arrays:
    arrays = from_paper(PAPER, config)
    for layer in config["layers"]:
        extra = {"count": 100, "sign agreement": 0.3}
        extra |= {name: np.ones((4, 4, 3, 3)) for name in ("sum", "abs_sum", "sign_sum", "nonzero")}
        arrays |= {f"{name}/{layer}": np.asarray(value) for name, value in extra.items()}
    return arrays


def breaks(config: dict) -> Arrays:
    return {name: np.full(1, 1e6) for name in holds(config)}
