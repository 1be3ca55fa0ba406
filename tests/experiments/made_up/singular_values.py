"""The numbers of Theorem 1, and for breaks unrelated distributions."""

import numpy as np

from experiments.specs.singular_values import EDGE, FIRST_BIN
from tests.experiments.made_up import Arrays


def holds(config: dict) -> Arrays:
    results = {"slope": 1.43, "straightness": 0.995, "limit": 1.425}
    for m in config["options"]["factors"]:
        results |= {
            f"x/{m}": np.linspace(0.1, 4, 5),
            f"density/{m}": np.linspace(1, 0, 5),
            f"share/{m}": np.linspace(0, 1, 5),
            f"s/{m}": np.linspace(0.1, 2, 50),
            f"edge of s/{m}": EDGE.get(m, 2.5),
            f"mass/{m}": 1.0,
            f"m2/{m}": m + 1.0,
            f"exponent/{m}": -m / (m + 1),
            f"edge over e (M + 1/2)/{m}": 1.0,
            f"first bin/{m}": FIRST_BIN.get(m, 1000),
            f"largest/{m}": EDGE.get(m, 2.5),
            f"distance of s^2/{m}": 0.003,
            f"distance of s/{m}": 0.19,
            f"log10 kappa/{m}": 1.43 * m,
            f"plain log10 kappa/{m}": min(1.43 * m, 17),
        }
    return {name: np.asarray(value, float) for name, value in results.items()}


def breaks(config: dict) -> Arrays:
    results = {name: 2 * value + 7 for name, value in holds(config).items()}
    return results | {name: np.asarray(0.0) for name in results if name.startswith(("distance of s/", "straight"))}
