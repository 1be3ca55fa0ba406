"""With batch norm the gradient is smaller and remains valid over longer steps. For breaks both networks are alike."""

import numpy as np

from tests.experiments.made_up import Arrays, scalars


def holds(config: dict) -> Arrays:
    batch, options = config["norm"] == "batch", config["options"]
    rates = np.array(options["rates"])
    reach, norm = (0.01, 3.0) if batch else (1e-5, 1e4)
    arrays = {"rates": rates}
    for at in options["at"]:
        arrays |= scalars(at, reach=reach, norm=norm, predictiveness=rates / reach, smoothness=1 / rates)
    return arrays


def breaks(config: dict) -> Arrays:
    return holds(config) | {
        name: value for at in config["options"]["at"] for name, value in scalars(at, reach=1e-3, norm=5.0).items()
    }
