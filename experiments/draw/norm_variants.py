"""Appendix K, Table 4: final accuracy by learning rate for other normalisations."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from . import SERIES, column
from .curves import of_runs

CAPTION = "Test accuracy of the last epoch by learning rate, mean and standard deviation over seeds."
NORMS = {"layer": ("layer norm", "o"), "group": ("group norm", "^"), "instance": ("instance norm", "s")}


def tables(spec, results) -> dict:
    """How every run ended; and the curves on the way there, a row an evaluation."""
    curves, ends = of_runs(results, [run.label for run in spec.runs], {})
    for row in ends:
        row["norm"], _, rate = row["run"].partition("-")
        row["lr"] = float(rate)
    return {"norm_variants": ends} | ({"norm_variants_curves": curves} if curves else {})


def draw(rows) -> Figure:
    """A line a normalisation over the learning rate."""
    figure = Figure(figsize=(5.4, 3.6))
    axes = figure.add_subplot()
    for (norm, (text, marker)), colour in zip(NORMS.items(), SERIES, strict=False):
        names = ("lr", "test accuracy", "test accuracy spread")
        rate, mean, spread = (np.array(column(rows, name, norm=norm), float) for name in names)
        order = rate.argsort()
        style: dict[str, Any] = dict(marker=marker, color=colour, capsize=2, linewidth=1.2, label=text)
        axes.errorbar(rate[order], mean[order], spread[order], **style)
    axes.set(xscale="log", xlabel="learning rate", ylabel="test accuracy, %", ylim=(0, 101))
    figure.legend(loc="outside lower center", ncols=3)
    return figure
