"""Figure 3: with batch norm steps may be large, without they blow up; and both alike, and wild."""

import numpy as np

from tests.made_up import Arrays, scalars


def holds(config: dict) -> Arrays:
    batch, options = config["norm"] == "batch", config["options"]
    rates = np.array(options["rates"])
    relative = 1 + (rates / (0.1 if batch else 1e-3)) ** 2 - rates**0.5
    found = dict(improving=0.1, largest=3, largest_to_001=1, best_rate=0.03, lowest=0.87) if batch else dict(
        improving=1e-3, largest=1e6, largest_to_001=1e6, best_rate=2e-4, lowest=0.1
    )  # fmt: skip
    found = {name.replace("001", "0.01"): value for name, value in found.items()}
    arrays = {"rates": rates}
    for at in options["at"]:
        arrays |= scalars(at, relative=relative, **found)
    return arrays


def breaks(config: dict) -> Arrays:
    arrays = holds(config)
    for at in config["options"]["at"]:
        arrays |= scalars(at, improving=0.1, largest=100, best_rate=10, **{"largest to 0.01": 100})
    return arrays
