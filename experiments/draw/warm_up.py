"""Beyond the paper: the outcome of training without batch norm after a warm-up, by learning rate and warm-up."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from . import INK, SERIES, Rows, column
from .curves import CHANCE

CAPTION = (
    "Accuracy of the last epoch without batch norm, by learning rate and by the number of steps at 1e-4 before it. One "
    "marker for each seed: filled for the training batches, hollow for the test images. Crosses: runs that diverged. "
    "Dashed: guessing."
)
MARKERS = ("o", "s", "^")


def tables(spec, results) -> dict[str, Rows]:
    """A row for each run: its rate, warm-up and seed, and how it ended."""
    rows = [
        {"lr": run.config["options"]["lr"], "warm-up": run.config["options"]["warmup"], "seed": run.config["seed"]}
        | {name: run.at(name).item() for name in ("diverged", "steps", "train accuracy", "test accuracy")}
        for run in results.runs
    ]
    return {"warm_up": sorted(rows, key=lambda row: (row["lr"], row["warm-up"], row["seed"]))}


def draw(rows: Rows) -> Figure:
    """The warm-ups side by side, with the rates next to each other."""
    figure = Figure(figsize=(5.4, 3.8))
    axes = figure.add_subplot()
    warm_ups, rates = (sorted({row[name] for row in rows}) for name in ("warm-up", "lr"))
    for k, rate in enumerate(rates):
        style: dict[str, Any] = dict(color=SERIES[k], marker=MARKERS[k], linestyle="none", clip_on=False)
        for place, steps in enumerate(warm_ups):
            x = place + 0.25 * (k - (len(rates) - 1) / 2)
            for name, fill in (("train accuracy", SERIES[k]), ("test accuracy", "none")):
                values = np.array(column(rows, name, lr=rate, **{"warm-up": steps, "diverged": 0}), float)
                axes.plot(np.full(len(values), x), values, markerfacecolor=fill, **style)
            diverged = len(column(rows, "seed", lr=rate, **{"warm-up": steps, "diverged": 1}))
            spread = 0.05 * (np.arange(diverged) - (diverged - 1) / 2)
            axes.plot(x + spread, np.zeros(diverged), **style | {"marker": "x"})
    axes.axhline(CHANCE, color=INK, linestyle="--", linewidth=0.8)
    axes.set_xticks(range(len(warm_ups)), [f"{steps:g}" for steps in warm_ups])
    axes.set(xlabel="steps at 1e-4 before the rate", ylabel="accuracy, %", ylim=(0, None))
    axes.grid(axis="x", visible=False)
    key = [
        Line2D([], [], color=SERIES[k], marker=MARKERS[k], linestyle="none", label=f"lr {rate:g}")
        for k, rate in enumerate(rates)
    ]
    figure.legend(handles=key, loc="outside lower center", ncols=3)
    return figure
