"""The change of the gradient along a step, with and without batch norm."""

import numpy as np
from matplotlib.figure import Figure

from . import INK, NETS, Rows, band, column, key_of_nets, ranged

CAPTION = (
    "The change of the gradient after a step of size a, over its norm. Lines: median over seeds. Bands: all seeds. "
    "Dotted: a change by half, which defines the reach. Values above 100 are drawn at 100. The panels have scales of "
    "their own."
)
HIGHEST = 100
QUANTITIES = {"predictiveness": "change", "smoothness": "smoothness"}


def tables(spec, results) -> dict[str, Rows]:
    """Change and effective smoothness at each step size: median and range over seeds."""
    rows = []
    for norm in NETS:
        runs = results.where(norm=norm)
        for batch in runs[0].config["options"]["at"] if runs else ():
            for k, rate in enumerate(runs[0].at("rates")):
                row = {"norm": norm, "mini-batch": batch, "a": rate, "seeds": len(runs)}
                for name, text in QUANTITIES.items():
                    row |= ranged(text, np.array([run.at(name, batch)[k] for run in runs]))
                rows.append(row)
    return {"gradient_predictiveness": rows}


def draw(rows: Rows) -> Figure:
    """The change, a panel for each mini-batch. Both axes are logarithmic."""
    figure = Figure(figsize=(5.4, 5))
    numbers = sorted({row["mini-batch"] for row in rows})
    panels = figure.subplots(len(numbers), 1, sharex=True, squeeze=False)[:, 0]
    for axes, number in zip(panels, numbers, strict=True):
        for norm, (_, colour, marker) in NETS.items():
            selected = [
                {key: min(value, HIGHEST) if "change" in key else value for key, value in row.items()}
                for row in rows
                if (row["norm"], row["mini-batch"]) == (norm, number)
            ]
            band(axes, column(selected, "a"), selected, "change", f"{marker}-", colour)
        axes.axhline(0.5, color=INK, linestyle=":", linewidth=1)
        axes.set(xscale="log", yscale="log", ylabel="||g(a) - g|| / ||g||")
        axes.set_title(f"mini-batch {number}", loc="left", fontsize=10)
    axes.set_xlabel("a")
    figure.legend(handles=key_of_nets(min(row["seeds"] for row in rows)), loc="outside lower center", ncols=2)
    return figure
