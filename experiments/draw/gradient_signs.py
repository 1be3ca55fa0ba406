"""Table 1 as a figure: a/b by layer with and without batch norm, over the spread of single weights (Appendix J)."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from . import GRID, INK, NETS, Rows, column, count

CAPTION = (
    "a/b by layer. Filled markers: ratio of averages, geometric mean and standard deviation over seeds. Hollow: the "
    "paper's values. Bars: single weights of all seeds (Appendix J). Dotted: the value for N independent signs."
)
QUANTILES = (5, 25, 50, 75, 95)
SAMPLES = 10  # the number of weights listed for each layer


def tables(spec, results) -> dict[str, Rows]:
    """The averages of the layers, the distribution of a/b over their weights, and a sample of the weights."""
    layers = spec.runs[0].layers
    averages, weights = [], []
    for norm in NETS:
        runs = results.where(norm=norm)
        for layer in layers if runs else ():
            averages.append(_averages(spec, runs, norm, layers.index(layer), layer))
            weights += _weights(runs[0], norm, layer)
    return {"gradient_signs": averages, "gradient_signs_weights": weights}


def _averages(spec, runs, norm: str, index: int, layer: int) -> dict[str, object]:
    count = runs[0].at("count", layer).item()
    row = {"norm": norm, "layer": layer, "seeds": len(runs), "summands": count}
    for name in ("a", "b", "a/b"):
        logs = np.log([run.at(name, layer).item() for run in runs])
        row |= {name: np.exp(logs.mean()), f"{name} spread": np.exp(logs.std(ddof=1)) if len(runs) > 1 else 1.0}
        row[f"{name} paper"] = spec.paper[name, norm][index]
    row["a/(b sqrt N)"] = row["a/b"] / np.sqrt(count)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.concatenate([(run.at("abs_sum", layer) / np.abs(run.at("sum", layer))).ravel() for run in runs])
    dead = np.isnan(ratios)  # 0/0: a weight between dead channels. All its summands are zero.
    for quantile in QUANTILES:
        row[f"weights' a/b {quantile}%"] = np.percentile(ratios[~dead], quantile)
    row["dead weights"] = int(dead.sum())
    row["sign agreement"] = np.mean([run.at("sign agreement", layer) for run in runs])
    return row


def _weights(run, norm: str, layer: int) -> Rows:
    totals, nets = run.at("abs_sum", layer), np.abs(run.at("sum", layer))
    chosen = np.random.default_rng(layer).choice(totals.size, min(SAMPLES, totals.size), replace=False)
    places = (np.unravel_index(flat, totals.shape) for flat in np.sort(chosen))
    return [
        {
            "norm": norm,
            "layer": layer,
            "weight (o, i, y, x)": " ".join(map(str, place)),
            "sum |d|": totals[place],
            "|sum d|": nets[place],
            "ratio": totals[place] / nets[place] if nets[place] else np.nan,
        }
        for place in places
    ]


def draw(rows: Rows) -> Figure:
    """a/b on a logarithmic axis: bars for weights, filled markers for averages, hollow ones for the paper."""
    figure = Figure(figsize=(5.4, 3.9))
    axes = figure.add_subplot()
    layers = sorted({row["layer"] for row in rows})
    for shift, (norm, (_, colour, marker)) in zip((-0.16, 0.16), NETS.items(), strict=True):
        positions = np.array([layers.index(layer) for layer in column(rows, "layer", norm=norm)]) + shift
        low, first, median, third, high = (column(rows, f"weights' a/b {q}%", norm=norm) for q in QUANTILES)
        axes.vlines(positions + 0.07, low, high, colors=colour, linewidth=1)
        axes.vlines(positions + 0.07, first, third, colors=colour, linewidth=6, alpha=0.55)
        axes.plot(positions + 0.07, median, "_", color=INK, markersize=8, markeredgewidth=1.5)
        ratio, spread = (np.array(column(rows, name, norm=norm), float) for name in ("a/b", "a/b spread"))
        errors = [ratio - ratio / spread, ratio * spread - ratio]
        axes.errorbar(positions - 0.07, ratio, errors, fmt=marker, color=colour, capsize=2, linewidth=1)
        paper = column(rows, "a/b paper", norm=norm)
        axes.plot(positions - 0.07, paper, "D", color=colour, markerfacecolor="none", markersize=8)
    roots = [np.sqrt(column(rows, "summands", layer=layer)[0]) for layer in layers]
    middle = np.arange(len(layers))
    axes.hlines(roots, middle - 0.4, middle + 0.4, colors=INK, linestyles=":", linewidth=1)
    axes.set_yscale("log")
    axes.set_ylabel("a/b")
    axes.set_xticks(middle, [f"layer {layer}" for layer in layers])
    axes.set_xlim(-0.5, len(layers) - 0.5)
    axes.grid(axis="x", visible=False)
    seeds = min(row["seeds"] for row in rows)
    nets = [
        Line2D([], [], color=colour, marker=marker, linestyle="none", label=f"{text}, {count(seeds)}")
        for text, colour, marker in NETS.values()
    ]
    key: dict[str, Any] = dict(color=INK, linestyle="none")
    nets.append(Line2D([], [], marker="D", markerfacecolor="none", markersize=8, label="the paper", **key))
    nets.append(Line2D([], [], color=GRID, linewidth=6, label="single weights: 25-75%, 5-95%"))
    nets.append(Line2D([], [], marker="_", markersize=8, markeredgewidth=1.5, label="their median", **key))
    nets.append(Line2D([], [], color=INK, linestyle=":", linewidth=1, label="independent signs, √N"))
    figure.legend(handles=nets, loc="outside lower center", ncols=2)
    return figure
