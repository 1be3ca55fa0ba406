"""Linear growth with batch norm, exponential growth without. For breaks the networks are exchanged."""

from tests.experiments.made_up import Arrays, scalars


def holds(config: dict) -> Arrays:
    return _net(config["norm"] == "batch")


def breaks(config: dict) -> Arrays:
    return _net(config["norm"] != "batch")


def _net(batch: bool) -> Arrays:
    arrays = {}
    for k in range(54):
        since = k % 18 + 1
        variance, branch = (since / 2, 2 / (since + 1)) if batch else (2.0 ** (k + 1) / 4, 0.5)
        arrays |= scalars(3 + 2 * k, variance=variance, **{"mean square": variance, "branch over skip": branch})
    return arrays
