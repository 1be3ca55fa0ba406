"""Beyond the paper: the noise scale of the whole gradient, and as the norm layers see it."""

import numpy as np
from matplotlib.figure import Figure

from . import SERIES, Rows, column

CAPTION = (
    "The noise scale B = tr Sigma / |G|^2 in images, during training: of all parameters, of the norm layers' "
    "parameters, and of the norm layers from the contributions of the samples within a batch. Above with batch norm, "
    "below without. Geometric means and ranges over seeds. A step is missing where one seed's estimate of |G|^2 is "
    "not positive."
)
KINDS = {
    "network": ("whole network", SERIES[0], "o"),
    "norms": ("norm layers", SERIES[1], "s"),
    "samples": ("norm layers, from samples", SERIES[2], "^"),
}
NETS = {"batch": "with batch norm", "affine": "without batch norm"}


def tables(spec, results) -> dict[str, Rows]:
    """A row for each network, measurement and kind: B, and the means over seeds of tr Sigma and |G|^2."""
    rows = []
    for label in NETS:
        runs = [run for run in results.where(label=label) if len(run.at("step"))]
        for index, step in enumerate(runs[0].at("step") if runs else ()):
            reached = [run for run in runs if len(run.at("step")) > index]
            for kind in KINDS:
                noise, square, scale = (
                    np.array([run.at(f"{name} {kind}")[index] for run in reached])
                    for name in ("noise", "square", "scale")
                )
                row = {"net": label, "step": step, "kind": kind, "seeds": len(reached)}
                row |= {"noise": noise.mean(), "square": square.mean(), "scale": np.exp(np.log(scale).mean())}
                rows.append(row | {"scale low": scale.min(), "scale high": scale.max()})
    return {"norm_noise": rows}


def draw(rows: Rows) -> Figure:
    """A panel for each network over the step. All axes are logarithmic."""
    figure = Figure(figsize=(5.4, 5.8))
    for axes, (net, title) in zip(figure.subplots(2, 1, sharex=True), NETS.items(), strict=True):
        for kind, (text, colour, marker) in KINDS.items():
            step, mean, low, high = (
                np.array(column(rows, name, net=net, kind=kind), float)
                for name in ("step", "scale", "scale low", "scale high")
            )
            known = np.isfinite(mean)
            mean, low, high = (np.where(known, values, np.nan) for values in (mean, low, high))
            axes.fill_between(step + 1, low, high, color=colour, alpha=0.18, linewidth=0)
            axes.plot(step + 1, mean, marker=marker, color=colour, linewidth=1.2, label=text)
        finite = np.isfinite(column(rows, "scale", net=net)).any()
        axes.set(xscale="log", yscale="log" if finite else "linear", ylabel="B, images", title=title)
    axes.set_xlabel("step, from 1")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure
