"""Figure 3: with batch norm steps may be large, without it the loss explodes. For breaks both networks behave alike."""

import numpy as np

from experiments.specs.step_size_landscape import BEST
from tests.experiments.made_up import Arrays, scalars


def holds(config: dict) -> Arrays:
    batch, options = config["norm"] == "batch", config["options"]
    rates = np.array(options["rates"])
    relative = 1 + (rates / (0.1 if batch else 1e-3)) ** 2 - rates**0.5
    arrays = {"rates": rates}
    for at in options["at"]:
        results = {
            "improving": 0.1 if batch else 1e-3,
            "best rate": BEST.get((config["norm"], at), 2e-4),
            "lowest": 0.9,
        }
        results |= {"largest to 0.2": 3, "passes 1e3": 0.005, "passes 1e6": 0.005}
        arrays |= scalars(at, relative=relative, dead=np.zeros(len(rates), bool), **results, **{"dead at start": 0})
    return arrays


def breaks(config: dict) -> Arrays:
    arrays = holds(config)
    for at in config["options"]["at"]:
        results = {"improving": 0.1, "best rate": 10, "largest to 0.2": 100, "passes 1e3": 0.02}
        arrays |= scalars(at, **results)
    return arrays
