"""Invented results of each experiment, one module each.

``holds(config)`` returns what a run of that configuration would measure if the results were as in the paper (at the
paper's scale). ``breaks(config)`` returns results that contradict every claim that is checked. Both return {name:
array} with the names of the experiment's procedure.
"""

import importlib

import numpy as np

Arrays = dict[str, np.ndarray]


def made_up(config: dict, holds: bool = True) -> Arrays:
    """The arrays of one run."""
    module = importlib.import_module(f"{__name__}.{config['experiment']}")
    return (module.holds if holds else module.breaks)(config)


def from_paper(paper: dict, config: dict) -> Arrays:
    """A spec's ``paper`` table, of (quantity, norm) and one value per layer, as arrays; 1 for missing values."""
    return {
        f"{name}/{layer}": np.full(1, 1.0 if value is None else value)
        for (name, norm), values in paper.items()
        if norm == config["norm"]
        for layer, value in zip(config["layers"], values, strict=True)
    }


def scalars(layer: int | None = None, **values: object) -> Arrays:
    """Numbers as arrays without dimensions, of one layer if it is given; "_" in a name represents a space."""
    ending = "" if layer is None else f"/{layer}"
    return {f"{name.replace('_', ' ')}{ending}": np.asarray(value) for name, value in values.items()}
