"""Section 4: the largest stable learning rate and the accuracy with no, one and all batch norms."""

import numpy as np
from matplotlib.figure import Figure

from . import INK, SERIES, Rows

CAPTION = (
    "Left: the largest stable learning rate, geometric mean and range over seeds. An arrow marks a limit outside of "
    "the rates tried. Right: test accuracy of the last epoch, mean and standard deviation over seeds, at the learning "
    "rate written at the axis. Hollow: the paper's values."
)
NETS = {"none": ("none", SERIES[1]), "final": ("one, at the end", SERIES[2]), "batch": ("everywhere", SERIES[0])}


def tables(spec, results) -> dict[str, Rows]:
    """The limit and the accuracy of each network, if it was run."""
    rows = []
    for norm in NETS:
        values = results.each("limit", label=f"limit-{norm}")
        limits, bounds = [value.number for value in values], {value.bound for value in values}
        label = next(label for label in spec.paper if label.startswith(norm))
        accuracies = [run.at("test accuracy").item() for run in results.where(label=label)]
        row = {"batch norm": norm, "run": label, "seeds": len(accuracies), "paper": spec.paper[label]}
        row |= {"limit": np.mean(limits) if limits else np.nan, "limit low": min(limits, default=np.nan)}
        row |= {"limit high": max(limits, default=np.nan), "bound": sum(bounds)}
        row["test accuracy"] = np.mean(accuracies) if accuracies else np.nan
        row["spread"] = np.std(accuracies, ddof=1) if len(accuracies) > 1 else 0.0
        rows.append(row)
    return {"final_layer_norm": rows}


def draw(rows: Rows) -> Figure:
    """Two panels, with the place of batch norm to the right."""
    figure = Figure(figsize=(5.4, 3.6))
    left, right = figure.subplots(1, 2)
    for position, (norm, (_, colour)) in enumerate(NETS.items()):
        [row] = [row for row in rows if row["batch norm"] == norm]
        middle, low, high = (10 ** row[name] for name in ("limit", "limit low", "limit high"))
        marker = {0: "o", 1: "^", -1: "v"}[row["bound"]]
        left.errorbar(position, middle, [[middle - low], [high - middle]], fmt=marker, color=colour, capsize=3)
        right.errorbar(position, row["test accuracy"], row["spread"], fmt="o", color=colour, capsize=3)
        right.plot(position, row["paper"], "D", color=colour, markerfacecolor="none", markersize=8)
        right.annotate(row["run"].partition("-")[2], (position, 3), ha="center", color=INK, fontsize=9)
    left.set(yscale="log", ylabel="largest stable learning rate")
    right.set(ylabel="test accuracy, %", ylim=(0, 101))
    for axes in (left, right):
        axes.set_xticks(range(len(NETS)), [text.replace(", ", ",\n") for text, _ in NETS.values()])
        axes.set_xlim(-0.5, len(NETS) - 0.5)
        axes.grid(axis="x", visible=False)
    figure.supxlabel("batch norm", fontsize=10)
    return figure
