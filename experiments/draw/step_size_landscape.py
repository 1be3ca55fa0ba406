"""Figure 3: relative loss along the gradient, by mini-batch."""

import numpy as np
from matplotlib.figure import Figure

from . import INK, NETS, Rows, band, column, key_of_nets, key_of_paper, ranged

CAPTION = (
    "Loss after a step of size a along minus the mini-batch's own gradient, over the loss before. Lines: median over "
    "seeds; bands: all seeds. Hollow: the paper's lowest points. Values above 1e6 are drawn there, as the paper does."
)
HIGHEST = 1e6
PAPER = {("batch", 1): (0.03, 10**-0.06), ("batch", 4): (0.035, 10**-0.15), ("batch", 7): (0.09, 10**-0.11),
         ("none", 1): (2e-4, 0.1)}  # fmt: skip


def tables(spec, results) -> dict[str, Rows]:
    """The relative loss at each rate: median and range over seeds."""
    rows = []
    for norm in NETS:
        runs = results.where(norm=norm)
        for at in runs[0].config["options"]["at"] if runs else ():
            relative = np.array([run.at("relative", at) for run in runs])
            for rate, values in zip(runs[0].at("rates"), relative.T, strict=True):
                row = {"norm": norm, "mini-batch": at, "a": rate, "seeds": len(runs)}
                rows.append(row | ranged("relative loss", values))
    return {"step_size_landscape": rows}


def draw(rows: Rows) -> Figure:
    """A panel a mini-batch; both axes logarithmic."""
    figure = Figure(figsize=(5.4, 6.4))
    numbers = sorted({row["mini-batch"] for row in rows})
    panels = figure.subplots(len(numbers), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for axes, number in zip(panels, numbers, strict=True):
        for norm, (_, colour, marker) in NETS.items():
            mine = [
                {key: min(value, HIGHEST) if "loss" in key else value for key, value in row.items()}
                for row in rows
                if (row["norm"], row["mini-batch"]) == (norm, number)
            ]
            band(axes, column(mine, "a"), mine, "relative loss", f"{marker}-", colour)
            if (norm, number) in PAPER:
                axes.plot(*PAPER[norm, number], "D", color=colour, markerfacecolor="none", markersize=8)
        axes.axhline(1, color=INK, linewidth=0.6)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_title(f"mini-batch {number}", loc="left", fontsize=10)
        axes.set_ylabel("relative loss")
    axes.set_xlabel("a")
    seeds = min(row["seeds"] for row in rows)
    figure.legend(handles=[*key_of_nets(seeds), key_of_paper()], loc="outside lower center", ncols=3)
    return figure
