"""Appendix H: the largest stable learning rate by depth."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from . import GRID, INK, NETS, Rows

CAPTION = (
    "The largest learning rate that is stable (filled), and the largest at which the network learns (hollow): mean of "
    "the logarithm and range over seeds. Shaded: outside of the grid. An arrow up marks a limit above the grid, and "
    "an arrow down a limit below the rates that were tried. These are bounds, and no line leads to them."
)
LIMITS = {"limit": "stable", "learning limit": "learns"}
TRIED = ("lrs", "survived", "learned")
ARROWS = {1: "^", -1: "v"}


def tables(spec, results) -> dict[str, Rows]:
    """The limits by depth as log10, the number of seeds whose limit is only a bound, and every rate that was tried."""
    limits, tried = [], []
    for planned in spec.runs:
        runs = results.where(label=planned.label)
        if not runs:
            continue
        row = {"norm": planned.norm, "depth": runs[0].config["depth"], "seeds": len(runs)}
        for name in LIMITS:
            values = [run.value(name) for run in runs]
            numbers, bounds = [value.number for value in values], [value.bound for value in values]
            row |= {name: np.mean(numbers), f"{name} low": min(numbers), f"{name} high": max(numbers)}
            row |= {f"{name} above all": bounds.count(1), f"{name} below all": bounds.count(-1)}
        rates = runs[0].config["options"]["lrs"]
        limits.append(row | {"lowest rate": min(rates), "highest rate": max(rates)})
        for run in runs:
            for rate, survived, learned in zip(*(run.at(name) for name in TRIED), strict=True):
                labels = {"norm": planned.norm, "depth": row["depth"], "seed": run.config["seed"]}
                tried.append(labels | {"lr": rate, "survived": survived, "learned": learned})
    return {"depth_limits": limits, "depth_limits_tried": tried}


def draw(rows: Rows) -> Figure:
    """Limits over depth. Both axes are logarithmic."""
    figure = Figure(figsize=(5.4, 3.8))
    axes = figure.add_subplot()
    for norm, (_, colour, marker) in NETS.items():
        for name, shift in zip(LIMITS, (0.985, 1.015), strict=True):
            selected = [row for row in rows if row["norm"] == norm]
            inside = [row for row in selected if not row[f"{name} above all"] and not row[f"{name} below all"]]
            hollow: dict[str, Any] = {} if name == "limit" else {"markerfacecolor": "none"}
            if inside:
                depth = np.array([row["depth"] for row in inside], float) * shift
                mean, low, high = (
                    10.0 ** np.array([row[key] for row in inside]) for key in (name, f"{name} low", f"{name} high")
                )
                style: dict[str, Any] = dict(
                    fmt=marker + ("-" if name == "limit" else ":"), color=colour, capsize=2, linewidth=1.2
                )
                axes.errorbar(depth, mean, [mean - low, high - mean], **style, **hollow)
            for bound, suffix in ((1, "above all"), (-1, "below all")):
                ends = [row for row in selected if row[f"{name} {suffix}"]]
                limits = [10 ** row[f"{name} {'high' if bound == 1 else 'low'}"] for row in ends]
                places = [row["depth"] * shift for row in ends]
                axes.plot(places, limits, ARROWS[bound], color=colour, markersize=8, linestyle="none", **hollow)
    depths = sorted({row["depth"] for row in rows})
    axes.set(xscale="log", yscale="log", xlabel="depth", ylabel="learning rate")
    axes.set_xticks(depths, [str(depth) for depth in depths])
    axes.minorticks_off()
    lowest, highest = min(row["lowest rate"] for row in rows), max(row["highest rate"] for row in rows)
    axes.set_ylim(lowest / 4, highest * 4)
    for edges in ((lowest / 4, lowest), (highest, highest * 4)):
        axes.axhspan(*edges, color=GRID, alpha=0.5, linewidth=0)
    nets = [Line2D([], [], color=colour, marker=marker, label=text) for text, colour, marker in NETS.values()]
    kinds = [
        Line2D([], [], color=INK, marker="o", label="stable"),
        Line2D([], [], color=INK, marker="o", markerfacecolor="none", linestyle=":", label="learns"),
        Line2D([], [], color=INK, marker="^", markersize=8, linestyle="none", label="above the grid"),
        Line2D([], [], color=INK, marker="v", markersize=8, linestyle="none", label="below those tried"),
    ]
    figure.legend(handles=nets + kinds, loc="outside lower center", ncols=3)
    return figure
