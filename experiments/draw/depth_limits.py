"""Appendix H: the largest learning rate that a network bears, by depth."""

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from . import INK, NETS, Rows, column

CAPTION = (
    "Largest learning rate of those tried that is borne (filled) and that teaches (hollow), mean of its logarithm and "
    "range over seeds."
)
LIMITS = {"limit": "borne", "learning limit": "teaches"}


def tables(spec, results) -> dict[str, Rows]:
    """The limits by depth, as logarithms to base 10; and every rate tried."""
    limits, tried = [], []
    for run in spec.runs:
        done = results.where(label=run.label)
        if not done:
            continue
        row = {"norm": run.norm, "depth": done[0].config["depth"], "seeds": len(done)}
        for name in LIMITS:
            values = [one.at(name).item() for one in done]
            row |= {name: np.mean(values), f"{name} low": min(values), f"{name} high": max(values)}
        limits.append(row)
        for index, rate in enumerate(done[0].at("lrs")):
            shares = {name: np.mean([one.at(name)[index] for one in done]) for name in ("survived", "learned")}
            tried.append({"norm": run.norm, "depth": row["depth"], "lr": rate, **shares})
    return {"depth_limits": limits, "depth_limits_tried": tried}


def draw(rows: Rows) -> Figure:
    """Limits over depth, both axes logarithmic."""
    figure = Figure(figsize=(5.4, 3.8))
    axes = figure.add_subplot()
    for norm, (_, colour, marker) in NETS.items():
        depth = np.array(column(rows, "depth", norm=norm), float)
        for name, shift in zip(LIMITS, (0.985, 1.015), strict=True):
            mean, low, high = (
                10 ** np.array(column(rows, key, norm=norm), float) for key in (name, f"{name} low", f"{name} high")
            )
            if len(depth):
                style = dict(fmt=marker + ("-" if name == "limit" else ":"), color=colour, capsize=2, linewidth=1.2)
                hollow = {} if name == "limit" else {"markerfacecolor": "none"}
                axes.errorbar(depth * shift, mean, [mean - low, high - mean], **style, **hollow)
    depths = sorted({row["depth"] for row in rows})
    axes.set(xscale="log", yscale="log", xlabel="depth", ylabel="learning rate")
    axes.set_xticks(depths, [str(depth) for depth in depths])
    axes.minorticks_off()
    nets = [Line2D([], [], color=colour, marker=marker, label=text) for text, colour, marker in NETS.values()]
    kinds = [
        Line2D([], [], color=INK, marker="o", label="borne"),
        Line2D([], [], color=INK, marker="o", markerfacecolor="none", linestyle=":", label="teaches"),
    ]
    figure.legend(handles=nets + kinds, loc="outside lower center", ncols=4)
    return figure
