"""Accuracy that rises with the learning rate, and for breaks falls."""

import math

from tests.experiments.made_up import Arrays
from tests.experiments.made_up.learning_rates import trained


def holds(config: dict) -> Arrays:
    return trained(93 + 3 * math.log10(config["options"]["lr"]))


def breaks(config: dict) -> Arrays:
    return trained(80 - 3 * math.log10(config["options"]["lr"]))
