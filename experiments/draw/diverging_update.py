"""Figure 4: channel means and variances while the diverging update is applied."""

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from . import COLOURS, INK, Rows, band, column, count, key_of_paper, ranged

CAPTION = (
    "The largest |mean| and the largest variance of a layer's channels while the diverging update is applied. Lines: "
    "median over seeds; bands: all seeds. Hollow: the paper's, after the whole update."
)
LOOK = (("blue", "o-"), ("green", "s-"), ("vermilion", "^-"))
PAPER = {"largest |mean|": {8: 1.4, 44: 3.7e3, 80: 3e8}, "largest variance": {8: 1.0, 44: 5.3e6, 80: 5.5e16}}


def tables(spec, results) -> dict[str, Rows]:
    """For each layer and part of the update, over seeds; and the loss."""
    runs, rows, losses = results.runs, [], []
    for k, part in enumerate(runs[0].at("part")):
        for layer in runs[0].config["layers"]:
            means, variances = (np.array([run.at(name, layer)[k] for run in runs]) for name in ("mean", "var"))
            row = {"layer": layer, "part": part, "seeds": len(runs)}
            row |= ranged("largest |mean|", np.abs(means).max(1)) | ranged("largest variance", variances.max(1))
            rows.append(row)
        losses.append({"part": part} | ranged("loss", np.array([run.at("loss")[k] for run in runs])))
    return {"diverging_update": rows, "diverging_update_loss": losses}


def draw(rows: Rows) -> Figure:
    """Two panels over the share of the update, logarithmic upwards."""
    figure = Figure(figsize=(5.4, 5.6))
    panels = figure.subplots(2, 1, sharex=True)
    layers = sorted({row["layer"] for row in rows})
    key = []
    for layer, (name, style) in zip(layers, LOOK, strict=True):
        mine = [row for row in rows if row["layer"] == layer]
        colour = COLOURS[name]
        key.append(Line2D([], [], color=colour, marker=style[0], label=f"layer {layer}"))
        for axes, (quantity, paper) in zip(panels, PAPER.items(), strict=True):
            band(axes, 100 * np.array(column(mine, "part")), mine, quantity, style, colour)
            if layer in paper:
                axes.plot(100, paper[layer], "D", color=colour, markerfacecolor="none", markersize=8, clip_on=False)
    for axes, quantity in zip(panels, PAPER, strict=True):
        axes.set_yscale("log")
        axes.set_ylabel(quantity)
        axes.axhline(1, color=INK, linewidth=0.6)
    panels[-1].set_xlabel(f"share of the update applied, % ({count(rows[0]['seeds'])})")
    figure.legend(handles=[*key, key_of_paper()], loc="outside lower center", ncols=4)
    return figure
