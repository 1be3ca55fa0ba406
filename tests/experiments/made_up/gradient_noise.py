"""Noise of C / |B|, or its share without repetition. For breaks the noise does not fall."""

import numpy as np

from tests.experiments.made_up import Arrays


def holds(config: dict) -> Arrays:
    options, result = config["options"], {"slope": -1.0, "C": 2.0}
    for size in options["sizes"]:
        left = 1.0 if options["replace"] else (options["images"] - size) / (options["images"] - 1)
        result |= {f"noise/{size}": 2.0 / size * left, f"ratio/{size}": left}
    return {name: np.asarray(value) for name, value in result.items()}


def breaks(config: dict) -> Arrays:
    result = {f"noise/{size}": 2.0 for size in config["options"]["sizes"]} | {"slope": 0.0, "C": 2.0}
    result |= {f"ratio/{size}": 3.0 * size for size in config["options"]["sizes"]}
    return {name: np.asarray(value) for name, value in result.items()}
