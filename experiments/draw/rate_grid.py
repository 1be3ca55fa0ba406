"""Figure 1: the training loss of short runs without batch norm, by learning rate."""

import math

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from . import INK, NETS, Rows, column, count

CAPTION = (
    "Mean training loss in the last epoch of a short run at a constant learning rate, without batch norm: geometric "
    "mean and range over the seeds that did not diverge. A cross at the top marks a rate at which all seeds diverged. "
    "Dashed: the loss of guessing."
)
GUESS = math.log(10)


def tables(spec, results) -> dict[str, Rows]:
    """A row for each rate: the loss, and the number of seeds that diverged and for which the rate is the best."""
    rows = []
    runs = results.where(label=spec.runs[0].label)
    for index, rate in enumerate(runs[0].at("lrs") if runs else ()):
        losses = np.array([run.at("last loss")[index] for run in runs])
        finite = losses[np.isfinite(losses)]
        row = {"lr": rate, "seeds": len(runs), "diverged": len(losses) - len(finite)}
        row["best"] = sum(math.isclose(10 ** run.at("best rate"), rate) for run in runs)
        row["loss"] = np.exp(np.mean(np.log(finite))) if len(finite) else np.inf
        rows.append(row | {"loss low": min(finite, default=np.inf), "loss high": max(finite, default=np.inf)})
    return {"rate_grid": rows}


def draw(rows: Rows) -> Figure:
    """The loss over the rate. Both axes are logarithmic."""
    figure = Figure(figsize=(5.4, 3.6))
    axes = figure.add_subplot()
    text, colour, marker = NETS["none"]
    trained = [row for row in rows if math.isfinite(row["loss"])]
    rate, loss, low, high = (np.array(column(trained, key), float) for key in ("lr", "loss", "loss low", "loss high"))
    axes.errorbar(rate, loss, [loss - low, high - loss], fmt=marker + "-", color=colour, capsize=3, linewidth=1.2)
    diverged_rates = column(rows, "lr", loss=math.inf)
    axes.plot(
        diverged_rates,
        [0.96] * len(diverged_rates),
        "x",
        color=colour,
        transform=axes.get_xaxis_transform(),
        clip_on=False,
    )
    axes.axhline(GUESS, color=INK, linestyle="--", linewidth=0.8)
    axes.set(xscale="log", yscale="log", xlabel="learning rate", ylabel="training loss")
    keys = [
        Line2D([], [], color=colour, marker=marker, label=f"{text}, {count(rows[0]['seeds'])}"),
        Line2D([], [], color=INK, linestyle="--", linewidth=0.8, label="guessing"),
    ]
    if diverged_rates:
        keys.append(Line2D([], [], color=colour, marker="x", linestyle="none", label="all seeds diverged"))
    figure.legend(handles=keys, loc="outside lower center", ncols=3)
    return figure
