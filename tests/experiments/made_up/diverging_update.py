"""Figure 4: later layers diverge more strongly and later. For breaks all layers diverge alike."""

import numpy as np

from tests.experiments.made_up import Arrays, scalars

LARGEST = {8: 1.4, 44: 3.7e3, 80: 3e8}


def holds(config: dict) -> Arrays:
    parts = np.linspace(0, 1, config["options"]["parts"] + 1)
    arrays = {"part": parts, "loss": np.exp(9 * parts), "step": np.asarray(1)}
    for layer, largest in LARGEST.items():
        means = largest * parts[:, None] ** np.array([layer, layer / 2])
        arrays |= scalars(layer, mean=means, var=1 + means**2, largest_mean=largest, half_way=layer / 100)
    return arrays


def breaks(config: dict) -> Arrays:
    arrays = holds(config)
    for layer in LARGEST:
        arrays |= scalars(layer, largest_mean=1.0, half_way=1 - layer / 100)
    return arrays
