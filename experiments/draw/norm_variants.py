"""Appendix K, Table 4: final accuracy by learning rate for other normalisations."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from . import INK, SERIES, column
from .curves import CHANCE, of_runs

CAPTION = "Test accuracy of the last epoch by learning rate, mean and standard deviation over seeds. Dashed: guessing."
NORMS = {"layer": ("layer norm", "o"), "group": ("group norm", "^"), "instance": ("instance norm", "s")}


def tables(spec, results) -> dict:
    """The end of every run, and the curves, a row for each evaluation."""
    curves, ends = of_runs(results, [run.label for run in spec.runs], {})
    for row in ends:
        row["norm"], _, rate = row["run"].partition("-")
        row["lr"] = float(rate)
    return {"norm_variants": ends} | ({"norm_variants_curves": curves} if curves else {})


def draw(rows) -> Figure:
    """A line for each normalisation over the learning rate."""
    figure = Figure(figsize=(5.4, 3.6))
    axes = figure.add_subplot()
    for (norm, (text, marker)), colour in zip(NORMS.items(), SERIES, strict=False):
        names = ("lr", "test accuracy", "test accuracy spread")
        rate, mean, spread = (np.array(column(rows, name, norm=norm), float) for name in names)
        order = rate.argsort()
        style: dict[str, Any] = dict(marker=marker, color=colour, capsize=2, linewidth=1.2, label=text)
        axes.errorbar(rate[order], mean[order], spread[order], **style)
    axes.axhline(CHANCE, color=INK, linestyle="--", linewidth=0.8)
    axes.set(xscale="log", xlabel="learning rate", ylabel="test accuracy, %")
    figure.legend(loc="outside lower center", ncols=3)
    return figure
