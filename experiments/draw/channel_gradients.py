"""Figure 7 and Appendix G: gradients by channel, as heat maps and over the means of the channels."""

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from . import NETS, Rows, column

CAPTION = (
    "Layer 45, seed 0. Above: M over its mean, with output channels upwards and input channels to the right, and one "
    "logarithmic colour scale for both. Below: the mean of each input channel's column of M over the mean of M, over "
    "the |mean| of that channel."
)


def tables(spec, results) -> dict[str, Rows]:
    """Mean and column of M of each input channel for the first seed, and the variation of M for each seed."""
    layer = spec.runs[0].layers[0]
    channels, seeds = [], []
    for norm in NETS:
        runs = results.where(norm=norm)
        if runs:
            matrix, means = runs[0].at("M", layer) / runs[0].at("M", layer).mean(), runs[0].at("input means", layer)
            for i, values in enumerate(matrix.T):
                row = {"norm": norm, "input": i, "|mean|": means[i], "gradient": values.mean()}
                channels.append(row | {f"M {o}": value for o, value in enumerate(values)})
        quantities = ("variation", "variation of rows", "variation of columns", "rank correlation")
        seeds += [
            {"norm": norm, "seed": run.config["seed"]} | {name: run.at(name, layer).item() for name in quantities}
            for run in runs
        ]
    return {"channel_gradients": channels, "channel_gradients_seeds": seeds}


def draw(rows: Rows) -> Figure:
    """Two heat maps above two scatter plots."""
    figure = Figure(figsize=(5.4, 5.6))
    nets = [norm for norm in NETS if column(rows, "input", norm=norm)]
    panels = figure.subplots(2, len(nets), squeeze=False, sharex="row", sharey="row", height_ratios=(3, 2))
    outputs = [key for key in rows[0] if key.startswith("M ")]
    for (above, below), norm in zip(panels.T, nets, strict=True):
        text, colour, marker = NETS[norm]
        matrix = np.array([column(rows, key, norm=norm) for key in outputs], float)
        picture = above.imshow(
            np.maximum(matrix, 1e-3),
            cmap="cividis",
            norm=LogNorm(1e-2, 1e2),
            interpolation="none",
            origin="lower",
            aspect="auto",
        )
        above.set_title(text, loc="left", fontsize=10)
        above.set_xlabel("input channel")
        above.grid(False)
        below.plot(column(rows, "|mean|", norm=norm), column(rows, "gradient", norm=norm), marker, color=colour)
        below.set_xscale("log")
        below.set_yscale("log")
        below.set_xlabel("|mean| of the channel")
    panels[0, 0].set_ylabel("output channel")
    panels[1, 0].set_ylabel("gradient over its mean")
    figure.colorbar(picture, ax=panels[0], label="M over its mean", fraction=0.05)
    return figure
