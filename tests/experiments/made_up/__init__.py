"""Made-up results of each experiment, one module each.

``holds(config)`` gives what a run of that configuration would have measured, had everything come out as the paper says
(at the paper's scale); ``breaks(config)`` what contradicts every claim that is checked. Both return {name: array} under
the names that the experiment's procedure gives.
"""

import importlib

import numpy as np

Arrays = dict[str, np.ndarray]


def made_up(config: dict, holds: bool = True) -> Arrays:
    """The arrays of one run."""
    module = importlib.import_module(f"{__name__}.{config['experiment']}")
    return (module.holds if holds else module.breaks)(config)


def from_paper(paper: dict, config: dict) -> Arrays:
    """A spec's ``paper`` table, of (quantity, norm) and one value a layer, as arrays; 1 where it has no value."""
    return {
        f"{name}/{layer}": np.full(1, 1.0 if value is None else value)
        for (name, norm), values in paper.items()
        if norm == config["norm"]
        for layer, value in zip(config["layers"], values, strict=True)
    }


def scalars(layer: int | None = None, **values: object) -> Arrays:
    """Numbers as arrays without dimensions, of one layer where one is given; "_" in a name stands for a space."""
    ending = "" if layer is None else f"/{layer}"
    return {f"{name.replace('_', ' ')}{ending}": np.asarray(value) for name, value in values.items()}
