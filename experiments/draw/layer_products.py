"""Beyond the paper: singular values of products of the convolutions of a network, before and after training."""

import numpy as np
from matplotlib.figure import Figure

from . import INK, SERIES, Rows, column

CAPTION = (
    "Singular values in ascending order, for products of 1, 3 and 5 successive convolutions, at initialisation and "
    "after training. Dotted: Theorem 1. Means over seeds of the logarithm."
)
TIMES = {"init": ("at initialisation", SERIES[0]), "trained": ("after training", SERIES[1])}
FACTORS = (1, 3, 5)


def tables(spec, results) -> dict[str, Rows]:
    """The quantiles of the singular values, and distances and condition numbers."""
    values, summary = [], []
    for when in TIMES if results.runs else ():
        for m in range(1, len(spec.runs[0].layers) + 1):
            ours, theorem = (
                np.exp(np.mean([np.log(run.at(f"{when} {name}", m)) for run in results.runs], 0))
                for name in ("s", "theorem")
            )
            shares = (np.arange(len(ours)) + 0.5) / len(ours)
            if m in FACTORS:
                values += [
                    {"when": when, "factors": m, "share": share, "s": s, "theorem": expected}
                    for share, s, expected in zip(shares, ours, theorem, strict=True)
                ]
            row = {"when": when, "factors": m, "seeds": len(results.runs)}
            for name in ("distance", "largest over edge", "log10 kappa"):
                row[name] = np.mean([run.at(f"{when} {name}", m).item() for run in results.runs])
            summary.append(row)
    return {"layer_products": values, "layer_products_summary": summary}


def draw(rows: Rows) -> Figure:
    """A panel for each number of factors: the quantile s over the share below it."""
    figure = Figure(figsize=(5.4, 3.8))
    panels = figure.subplots(1, len(FACTORS), sharey=True)
    for axes, m in zip(panels, FACTORS, strict=True):
        for when, (text, colour) in TIMES.items():
            share, s, theorem = (column(rows, name, when=when, factors=m) for name in ("share", "s", "theorem"))
            axes.plot(100 * np.array(share), s, color=colour, label=text)
        axes.plot(100 * np.array(share), theorem, ":", color=INK, label="Theorem 1")
        axes.set(yscale="log", title=f"M = {m}")
        axes.title.set_fontsize(10)
    panels[0].set_ylabel("singular value")
    panels[1].set_xlabel("share of singular values below, %")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure
