"""The demo's figure: Table 1 on one seed, and the probe of two short training runs."""

import numpy as np
from matplotlib.figure import Figure

from . import NETS, Rows, band, column, key_of_nets, key_of_paper


def draw(rows: Rows) -> Figure:
    """Left: a/b by layer and the paper's values. Right: the spread of the last norm layer's input by training step."""
    table = [row for row in rows if "layer" in row]
    steps = [row for row in rows if "step" in row]
    figure = Figure(figsize=(8.6, 3.6))
    left, right = figure.subplots(1, 2)
    layers = sorted({row["layer"] for row in table})
    for norm, (_, colour, marker) in NETS.items():
        positions = np.arange(len(layers))
        left.plot(positions - 0.1, column(table, "a/b", norm=norm), marker, color=colour)
        paper = column(table, "a/b paper", norm=norm)
        left.plot(positions + 0.1, paper, "D", color=colour, markerfacecolor="none", markersize=8)
        band(right, column(steps, "step", norm=norm), [row for row in steps if row["norm"] == norm], "sd", "-", colour)
    left.set_yscale("log")
    left.set_xticks(range(len(layers)), [f"layer {layer}" for layer in layers])
    left.set_xlim(-0.5, len(layers) - 0.5)
    left.set_title("Table 1: a/b at initialisation", fontsize=10)
    right.set_xlabel("training step")
    right.set_title("Last norm layer's input: standard deviation\n(median channel, 5 to 95 %)", fontsize=10)
    right.set_ylim(bottom=0)
    figure.legend(handles=[*key_of_nets(1), key_of_paper()], loc="outside lower center", ncols=3)
    return figure
