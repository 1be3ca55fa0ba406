"""Limits that fall with depth only without batch norm, and for breaks only with batch norm."""

import math

from tests.experiments.made_up import Arrays
from tests.experiments.made_up.final_layer_norm import limits


def holds(config: dict) -> Arrays:
    return limits(0.0 if config["norm"] == "batch" else -2 * math.log10(config["depth"]))


def breaks(config: dict) -> Arrays:
    return limits(0.0 if config["norm"] == "none" else -2 * math.log10(config["depth"]))
