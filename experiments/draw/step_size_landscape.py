"""Figure 3: relative loss along the gradient, by mini-batch."""

import numpy as np
from matplotlib.figure import Figure

from . import INK, NETS, Rows, band, column, key_of_nets, key_of_paper, living

CAPTION = (
    "Loss after a step of size a along minus the mini-batch's own gradient, over the loss before. Left with batch "
    "norm, right without. The scales differ: values above 10 on the left and above 1e6 on the right are drawn at the "
    "edge. Lines: median over the seeds whose network is not dead there. Bands: all of these seeds. Hollow: the lowest "
    "points of the paper's curves."
)
HIGHEST = {"batch": 10, "none": 1e6}  # the paper's axis without batch norm ends at 1e6 too
PAPER = {("batch", 1): (0.03, 10**-0.06), ("batch", 4): (0.035, 10**-0.15), ("batch", 7): (0.09, 10**-0.11),
         ("none", 1): (2e-4, 0.1)}  # fmt: skip


def tables(spec, results) -> dict[str, Rows]:
    """The relative loss at each step size: median and range over the living seeds, and the number of dead ones."""
    rows = []
    for norm in NETS:
        runs = results.where(norm=norm)
        for batch in runs[0].config["options"]["at"] if runs else ():
            relative, dead = (np.array([run.at(name, batch) for run in runs]) for name in ("relative", "dead"))
            for k, rate in enumerate(runs[0].at("rates")):
                row = {"norm": norm, "mini-batch": batch, "a": rate, "seeds": len(runs), "dead": int(dead[:, k].sum())}
                rows.append(row | living("relative loss", relative[:, k], dead[:, k]))
    return {"step_size_landscape": rows}


def draw(rows: Rows) -> Figure:
    """A row of panels for each mini-batch, and a column for each network. Both axes are logarithmic."""
    figure = Figure(figsize=(5.4, 6.4))
    numbers = sorted({row["mini-batch"] for row in rows})
    panels = figure.subplots(len(numbers), len(NETS), sharex=True, sharey="col", squeeze=False)
    for line, number in zip(panels, numbers, strict=True):
        for axes, (norm, (_, colour, marker)) in zip(line, NETS.items(), strict=True):
            selected = [
                {key: min(value, HIGHEST[norm]) if "loss" in key else value for key, value in row.items()}
                for row in rows
                if (row["norm"], row["mini-batch"]) == (norm, number)
            ]
            band(axes, column(selected, "a"), selected, "relative loss", f"{marker}-", colour)
            if (norm, number) in PAPER:
                axes.plot(*PAPER[norm, number], "D", color=colour, markerfacecolor="none", markersize=8)
            axes.axhline(1, color=INK, linewidth=0.6)
            axes.set(xscale="log", yscale="log")
            axes.set_title(f"mini-batch {number}", loc="left", fontsize=10)
        line[0].set_ylabel("relative loss")
    for axes in panels[-1]:
        axes.set_xlabel("a")
    seeds = min(row["seeds"] for row in rows)
    figure.legend(handles=[*key_of_nets(seeds), key_of_paper()], loc="outside lower center", ncols=2)
    return figure
