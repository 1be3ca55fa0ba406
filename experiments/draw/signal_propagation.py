"""Variance of the activations and share of the branch, block by block."""

from typing import Literal

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from . import INK, NETS, Rows, band, column, count, ranged

CAPTION = (
    "After each residual block, averaged over channels: the variance of the output, its squared channel mean, and the "
    "variance of the branch over that of the skip path. Lines: median over seeds. Bands: all seeds. Dotted: a new "
    "stage begins."
)
LINES: dict[str, Literal["-", "--"]] = {"batch": "-", "none": "--"}
QUANTITIES = {"variance": "variance", "mean square": "squared mean", "branch over skip": "branch / skip"}


def tables(spec, results) -> dict[str, Rows]:
    """Median and range over seeds for each block. A block is listed under the number of its last layer."""
    rows = []
    for norm in NETS:
        runs = results.where(norm=norm)
        layers = (
            sorted(int(name.split("/")[1]) for name in runs[0].arrays if name.startswith("variance/")) if runs else ()
        )
        for layer in layers:
            row = {"norm": norm, "layer": layer, "seeds": len(runs)}
            for name in QUANTITIES:
                row |= ranged(name, np.array([run.at(name, layer).item() for run in runs]))
            rows.append(row)
    return {"signal_propagation": rows}


def draw(rows: Rows) -> Figure:
    """Three panels over the layers. The vertical axes are logarithmic."""
    figure = Figure(figsize=(5.4, 6.4))
    panels = figure.subplots(3, 1, sharex=True)
    for axes, (name, label) in zip(panels, QUANTITIES.items(), strict=True):
        for norm, (_, colour, _) in NETS.items():
            selected = [row for row in rows if row["norm"] == norm]
            band(axes, column(selected, "layer"), selected, name, LINES[norm], colour)
        for stage in (37.5, 73.5):
            axes.axvline(stage, color=INK, linestyle=":", linewidth=1)
        axes.set_yscale("log")
        axes.set_ylabel(label)
    panels[-1].set_xlabel("layer")
    seeds = count(min(row["seeds"] for row in rows))
    key = [
        Line2D([], [], color=NETS[norm][1], linestyle=line, label=f"{NETS[norm][0]}, {seeds}")
        for norm, line in LINES.items()
    ]
    figure.legend(handles=key, loc="outside lower center", ncols=2)
    return figure
