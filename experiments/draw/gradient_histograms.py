"""Figure 2: densities of the entries of a gradient, with and without batch norm."""

from itertools import pairwise

import numpy as np
from matplotlib.figure import Figure

from . import INK, NETS, Rows, column, count, nearest_to_median

CAPTION = (
    "Density of the entries of layer 55's gradient in one network, up to the 99.9 % quantile of their magnitude. It is "
    "the network whose standard deviation is nearest to the median over the seeds. The vertical axes are logarithmic. "
    "The scales differ: the lower horizontal axis is much wider. Dotted: the range of the paper's axis."
)
PAPER_RANGE = {"batch": 0.04, "none": 4.0}
STEPS = 80  # the maximum number of bars


def tables(spec, results) -> dict[str, Rows]:
    """The density of each bar, and the moments of every seed."""
    bars, moments = [], []
    layer = spec.runs[0].layers[0]
    for norm in NETS:
        runs = results.where(norm=norm)
        if not runs:
            continue
        shown = nearest_to_median(runs, lambda run: run.at("sd", layer).item())
        bars += [
            {"norm": norm, "seeds": len(runs), "seed": shown.config["seed"], **bar}
            for bar in _bars(shown.at("histogram", layer), shown.at("edges", layer))
        ]
        moments += [
            {"norm": norm, "seed": run.config["seed"]}
            | {name: run.at(name, layer).item() for name in ("sd", "excess kurtosis", "largest")}
            for run in runs
        ]
    return {"gradient_histograms": bars, "gradient_histograms_moments": moments}


def _bars(counts: np.ndarray, edges: np.ndarray) -> Rows:
    """Bars up to the 99.9 % quantile. Where the logarithmic bins are narrow, several bins form one bar."""
    middle = len(counts) // 2
    beyond = counts[middle + 1 :] + counts[:middle][::-1]  # entries by magnitude
    inside = np.searchsorted(np.cumsum(beyond), 0.999 * beyond.sum())
    reach = edges[middle + 2 + inside]
    kept = np.flatnonzero(np.abs(edges) <= reach)
    chosen = [kept[0]]
    for k in kept:
        if edges[k] - edges[chosen[-1]] >= 2 * reach / STEPS:
            chosen.append(k)
    total = counts.sum()
    return [
        {
            "from": edges[a],
            "to": edges[b],
            "entries": int(counts[a:b].sum()),
            "density": counts[a:b].sum() / total / (edges[b] - edges[a]),
        }
        for a, b in pairwise(chosen)
    ]


def draw(rows: Rows) -> Figure:
    """Two panels, each with its own scale."""
    figure = Figure(figsize=(5.4, 5))
    nets = [norm for norm in NETS if column(rows, "density", norm=norm)]
    for axes, norm in zip(figure.subplots(len(nets), 1, squeeze=False)[:, 0], nets, strict=True):
        text, colour, _ = NETS[norm]
        edges = [*column(rows, "from", norm=norm), column(rows, "to", norm=norm)[-1]]
        axes.stairs(column(rows, "density", norm=norm), edges, color=colour, fill=True, alpha=0.35)
        axes.stairs(column(rows, "density", norm=norm), edges, color=colour, linewidth=1.2)
        for end in (-PAPER_RANGE[norm], PAPER_RANGE[norm]):
            axes.axvline(end, color=INK, linestyle=":", linewidth=1)
        axes.set_yscale("log")
        seed, seeds = (column(rows, name, norm=norm)[0] for name in ("seed", "seeds"))
        axes.set_title(f"{text}, seed {seed} of {count(seeds)}", loc="left", fontsize=10)
        axes.set_ylabel("density")
    axes.set_xlabel("entry of dL/dK")
    return figure
