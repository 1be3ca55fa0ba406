"""Beyond the paper: lr C / |B| during the runs of Figure 1."""

import numpy as np
from matplotlib.figure import Figure

from . import INK, SERIES, Rows, column

CAPTION = (
    "Above: C, the batch size times the variance of the gradient, during training. Below: lr C / |B|, the noise of a "
    "step over the step size. Geometric means and ranges over seeds. Dotted: drops of the learning rate, at 50 and 75 "
    "% of each run."
)
QUANTITIES = {"C": "C", "lr C / |B|": "lr C / |B|"}
TEXTS = {
    "batch-0.1": "batch norm, lr 0.1",
    "batch-0.003": "batch norm, lr 0.003",
    "batch-0.0001": "batch norm, lr 0.0001",
    "none-0.0001": "no batch norm, lr 0.0001",
}
MARKERS = "o^vs"
DROPS = (0.5, 0.75)


def tables(spec, results) -> dict[str, Rows]:
    """A row for each measurement."""
    rows = []
    for planned in spec.runs:
        runs = [run for run in results.where(label=planned.label) if len(run.at("step"))]
        for index, step in enumerate(runs[0].at("step") if runs else ()):
            row = {"run": planned.label, "seeds": len(runs), "step": step}
            for name in QUANTITIES:
                values = [run.at(name)[index] for run in runs if len(run.at(name)) > index]
                row |= {name: np.exp(np.mean(np.log(values))), f"{name} low": min(values), f"{name} high": max(values)}
            rows.append(row)
    return {"noise_in_training": rows}


def draw(rows: Rows) -> Figure:
    """Two panels over the step. All axes are logarithmic."""
    figure = Figure(figsize=(5.4, 5.8))
    labels = list(dict.fromkeys(row["run"] for row in rows))
    for axes, (name, text) in zip(figure.subplots(2, 1, sharex=True), QUANTITIES.items(), strict=True):
        for label, colour, marker in zip(labels, (SERIES[0], SERIES[4], SERIES[2], SERIES[1]), MARKERS, strict=False):
            step, mean, low, high = (
                np.array(column(rows, key, run=label), float) for key in ("step", name, f"{name} low", f"{name} high")
            )
            axes.fill_between(step + 1, low, high, color=colour, alpha=0.18, linewidth=0)
            axes.plot(step + 1, mean, marker=marker, color=colour, linewidth=1.2, label=TEXTS[label])
        lengths = {max(column(rows, "step", run=label)) + 1 for label in labels}  # the last step is always measured
        for drop in sorted({share * length for share in DROPS for length in lengths}):
            axes.axvline(drop + 1, color=INK, linestyle=":", linewidth=1)
        axes.set(xscale="log", yscale="log", ylabel=text)
    axes.set_xlabel("step, from 1")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure
