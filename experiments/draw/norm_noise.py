"""Beyond the paper: the noise scale of the whole gradient, and as the norm layers see it."""

import numpy as np
from matplotlib.figure import Figure

from . import INK, NETS, SERIES, Rows, column

CAPTION = (
    "The noise scale B = tr Sigma / |G|^2 in images, during training: of all parameters, of the norm layers' "
    "parameters, and of the norm layers from the contributions of the samples within a batch. Geometric "
    "means and ranges over seeds. A step is missing where one seed's estimate of |G|^2 is not positive. Below: tr "
    "Sigma from the samples over tr Sigma from the batches, of the norm layers. It is 1 for independent samples."
)
KINDS = {
    "network": ("whole network", SERIES[0], "o"),
    "norms": ("norm layers", SERIES[1], "s"),
    "samples": ("norm layers, from samples", SERIES[2], "^"),
}
LABELS = {"batch": "batch", "affine": "none"}  # and their names in NETS


def tables(spec, results) -> dict[str, Rows]:
    """A row for each network, measurement and kind: B, and the means over seeds of tr Sigma and |G|^2."""
    rows = []
    for label in LABELS:
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
    """Over the step: a panel for each network, and one for the ratio. All axes are logarithmic."""
    figure = Figure(figsize=(5.4, 7.6))
    *panels, last = figure.subplots(3, 1, sharex=True)
    for axes, net in zip(panels, LABELS, strict=True):
        title, colour_of_net, marker_of_net = NETS[LABELS[net]]
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
        step, samples, norms = (
            np.array(column(rows, name, net=net, kind=kind), float)
            for name, kind in (("step", "samples"), ("noise", "samples"), ("noise", "norms"))
        )
        last.plot(step + 1, samples / norms, marker=marker_of_net, color=colour_of_net, label=title)
    last.axhline(1, color=INK, linestyle=":", linewidth=1)
    last.set(xscale="log", yscale="log", ylabel="tr Sigma, samples / norms", xlabel="step, from 1")
    last.legend()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure
