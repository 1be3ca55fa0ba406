"""Accuracy during training, for the figures of training runs."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from . import INK, SERIES, Rows, column

MARKERS, POINTS = 25, 40  # at most on a curve, because a run has up to 2,400 epochs
CHANCE = 10.0  # percent, with ten classes
CURVES = {"test curve": "test accuracy, %", "train curve": "train accuracy, %"}


def of_runs(results, labels: list[str], paper: dict[str, float]) -> tuple[Rows, Rows]:
    """Means and spreads over the seeds that did not diverge: a row for each evaluation and for each run's end."""
    curves, ends = [], []
    for label in labels:
        runs = results.where(label=label)
        if not runs:
            continue
        whole = [run for run in runs if not run.at("diverged") and len(run.at("share"))]
        for index, share in enumerate(whole[0].at("share") if whole else ()):
            row = {"run": label, "seeds": len(whole), "share": share}
            for name in CURVES:
                row |= _spread(name, [run.at(name)[index].item() for run in whole])
            curves.append(row | {"paper": paper.get(label)})
        end = {"run": label, "seeds": len(runs)}
        end |= {name: sum(run.value(name).number for run in runs) for name in ("diverged", "dead")}
        for name in ("test accuracy", "train accuracy", "best test accuracy"):
            end |= _spread(name, [run.at(name).item() for run in whole])
        ends.append(end | {"paper": paper.get(label), "steps": max(run.at("steps").item() for run in runs)})
    return curves, ends


def _spread(name: str, values: list[float]) -> dict[str, float | np.floating]:
    mean = np.mean(values) if values else np.nan
    return {name: mean, f"{name} spread": np.std(values, ddof=1) if len(values) > 1 else 0.0}


def panels(rows: Rows, styles: dict[str, tuple[str, int, str]]) -> Figure:
    """One panel for test and one for train accuracy. ``styles`` has text, number of the colour, and marker by run.

    The axes span the curves. The paper's values are drawn if they are within the axes.
    """
    figure = Figure(figsize=(5.4, 6.2))
    low, high = _limits(rows)
    papers = False
    for axes, (name, text) in zip(figure.subplots(2, 1, sharex=True), CURVES.items(), strict=True):
        for label, (_, colour, marker) in styles.items():
            share, mean, spread = (
                np.array(column(rows, key, run=label), float) for key in ("share", name, f"{name} spread")
            )
            finite = np.flatnonzero(np.isfinite(mean))
            if not len(finite):
                continue
            # From the last one backwards, so that the end of training is drawn.
            drawn = finite[:: -max(1, -(-len(finite) // POINTS))][::-1]
            x, y, width = 100 * share[drawn], mean[drawn], spread[drawn]
            if width.any():  # with one seed there is no band
                axes.fill_between(x, y - width, y + width, color=SERIES[colour], alpha=0.18, linewidth=0)
            every = -(-len(x) // MARKERS)
            axes.plot(x, y, marker=marker, markevery=every, markersize=3.5, color=SERIES[colour], linewidth=1.2)
            paper = column(rows, "paper", run=label)[0]
            if name == "test curve" and paper is not None and low < paper < high:
                papers = True
                axes.plot(101.5, paper, "D", color=SERIES[colour], markerfacecolor="none", markersize=6, clip_on=False)
        for drop in (50, 75):
            axes.axvline(drop, color=INK, linestyle=":", linewidth=1)
        axes.axhline(CHANCE, color=INK, linestyle="--", linewidth=0.8)
        axes.set(ylabel=text, ylim=(low, high), xlim=(0, 103))
    axes.set_xlabel("share of training, %")
    shown = [label for label in styles if column(rows, "run", run=label)]
    key = [
        Line2D([], [], color=SERIES[colour], marker=marker, label=f"{text} (n = {column(rows, 'seeds', run=label)[0]})")
        for label in shown
        for text, colour, marker in [styles[label]]
    ]
    if papers:
        hollow: dict[str, Any] = dict(color=INK, marker="D", markerfacecolor="none", linestyle="none")
        key.append(Line2D([], [], label="the paper, final", **hollow))
    key.append(Line2D([], [], color=INK, linestyle="--", linewidth=0.8, label="guessing"))
    key.append(Line2D([], [], color=INK, linestyle=":", linewidth=1, label="drops of the rate"))
    figure.legend(handles=key, loc="outside lower center", ncols=2)
    return figure


def _limits(rows: Rows) -> tuple[float, float]:
    """The range of all curves with a margin of 3 points. It includes the accuracy of guessing."""
    values = np.array([column(rows, name) for name in CURVES], float)
    values = values[np.isfinite(values)]
    return min(values.min(initial=CHANCE), CHANCE) - 3, min(values.max(initial=CHANCE) + 3, 101)
