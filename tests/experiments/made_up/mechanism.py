"""Centring lowers b only without batch norm, and for breaks only with it."""

from tests.experiments.made_up import Arrays, scalars


def holds(config: dict) -> Arrays:
    return _run(config, config["norm"] == "batch")


def breaks(config: dict) -> Arrays:
    return _run(config, config["norm"] != "batch")


def _run(config: dict, batch: bool) -> Arrays:
    centred, arrays = config["options"]["centred"], {}
    b = 1.0 if batch or not centred else 0.2
    ratio = (200 if batch else 2) / b
    for layer in config["layers"]:
        numbers = {"a/b": ratio, "a/(b sqrt N)": ratio / 360}
        arrays |= scalars(layer, a=b * ratio, b=b, count=360**2, **numbers)
    return arrays
