"""Training after a warm-up. For breaks every run diverges."""

from tests.experiments.made_up import Arrays
from tests.experiments.made_up.learning_rates import trained


def holds(config: dict) -> Arrays:
    return trained(30.0, 99.0, diverged=float(config["options"]["warmup"] == 0))


def breaks(config: dict) -> Arrays:
    return trained(10.0, 10.0, diverged=1.0)
