"""Variance of the signal and share of the branch, block by block."""

import numpy as np
from matplotlib.figure import Figure

from . import INK, NETS, Rows, band, column, key_of_nets, ranged

CAPTION = (
    "After each residual block, averaged over channels: the variance of the output, its squared channel mean, and the "
    "variance of the branch over that of the skip path. Lines: median over seeds; bands: all seeds. Dotted: a new "
    "stage begins."
)
QUANTITIES = {"variance": "variance", "mean square": "squared mean", "branch over skip": "branch / skip"}


def tables(spec, results) -> dict[str, Rows]:
    """For each block, named by its last layer, over seeds."""
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
    """Three panels over the layer's number, logarithmic upwards."""
    figure = Figure(figsize=(5.4, 6.4))
    panels = figure.subplots(3, 1, sharex=True)
    for axes, (name, label) in zip(panels, QUANTITIES.items(), strict=True):
        for norm, (_, colour, _) in NETS.items():
            mine = [row for row in rows if row["norm"] == norm]
            band(axes, column(mine, "layer"), mine, name, "-" if norm == "batch" else "--", colour)
        for stage in (37.5, 73.5):
            axes.axvline(stage, color=INK, linestyle=":", linewidth=1)
        axes.set_yscale("log")
        axes.set_ylabel(label)
    panels[-1].set_xlabel("layer")
    figure.legend(handles=key_of_nets(min(row["seeds"] for row in rows)), loc="outside lower center", ncols=2)
    return figure
