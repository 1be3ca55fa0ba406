"""Figure 4: channel means and variances while the diverging update is applied."""

import numpy as np
from matplotlib.colors import SymLogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from . import INK, SERIES, Rows, column, count, key_of_paper

CAPTION = (
    "Heat maps: mean and variance of every channel (upwards) over the share of the update that is applied (to the "
    "right), each map with its own symmetric logarithmic scale, for the seed whose largest mean at the last layer is "
    "the median. Below: the largest |mean| of a layer's channels, one thin line for each seed and a thick one for the "
    "seed of the maps. Hollow: the paper's values after the whole update."
)
LAYER_STYLES = dict(zip((8, 44, 80), ((SERIES[0], "o"), (SERIES[2], "s"), (SERIES[1], "^")), strict=True))
PAPER = {8: 1.4, 44: 3.7e3, 80: 3e8}
MOMENTS = {"mean": "mean", "var": "variance"}
CHANNELS = 64  # of the widest layer


def tables(spec, results) -> dict[str, Rows]:
    """For each part of the update the largest |mean| and variance of each seed, and every channel of one seed."""
    runs, last = results.runs, spec.runs[0].layers[-1]
    ends = [run.at("largest mean", last).item() for run in runs]
    shown = runs[int(np.argsort(ends)[(len(ends) - 1) // 2])] if runs else None
    rows, losses = [], []
    for run in runs:
        for k, part in enumerate(run.at("part")):
            losses.append({"seed": run.config["seed"], "part": part, "loss": run.at("loss")[k]})
            for layer in run.config["layers"]:
                for moment, name in MOMENTS.items():
                    values = run.at(moment, layer)[k]
                    row = {"seed": run.config["seed"], "layer": layer, "part": part, "moment": name}
                    row |= {"largest": np.abs(values).max(), "shown": int(run is shown)}
                    channels = dict(enumerate(values)) if run is shown else {}
                    rows.append(row | {f"channel {c}": channels.get(c) for c in range(CHANNELS)})
    return {"diverging_update": rows, "diverging_update_loss": losses}


def draw(rows: Rows) -> Figure:
    """Maps over the channels, a column for each layer, and the largest means of all seeds below."""
    figure = Figure(figsize=(6.6, 7.4))
    layers = sorted({row["layer"] for row in rows})
    above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=(5, 3))[:, 0]
    panels = above.subplots(len(MOMENTS), len(layers), sharex=True, squeeze=False)
    for line, moment in zip(panels, MOMENTS.values(), strict=True):
        for axes, layer in zip(line, layers, strict=True):
            selected = [row for row in rows if (row["layer"], row["moment"], row["shown"]) == (layer, moment, 1)]
            channels = [f"channel {c}" for c in range(CHANNELS) if selected[0][f"channel {c}"] is not None]
            values = np.array([[row[name] for name in channels] for row in selected], float).T
            values = np.ma.masked_invalid(values)  # values overflow if the step is too large
            largest = float(np.abs(values).max()) if values.count() else 1.0
            picture = axes.imshow(
                values,
                cmap="PuOr_r",
                norm=SymLogNorm(max(largest / 1e4, 1e-3), vmin=-largest, vmax=largest),
                aspect="auto",
                interpolation="none",
                origin="lower",
                extent=(-2.5, 102.5, -0.5, len(channels) - 0.5),
            )
            axes.grid(False)
            axes.set_title(f"layer {layer}: {moment}s", loc="left", fontsize=9)
            bar = above.colorbar(picture, ax=axes, fraction=0.08, ticks=[-largest, 0, largest])
            bar.ax.set_yticklabels([_power(-largest), "0", _power(largest)], fontsize=8)
            bar.ax.minorticks_off()
        line[0].set_ylabel("channel")
    panels[-1, len(layers) // 2].set_xlabel("share of the update applied, %")
    axes = below.subplots()
    means = [row for row in rows if row["moment"] == "mean"]
    seeds = sorted({row["seed"] for row in means})
    for layer in layers:
        colour, marker = LAYER_STYLES[layer]
        for seed in seeds:
            selected = [row for row in means if (row["layer"], row["seed"]) == (layer, seed)]
            style = dict(marker=marker, markersize=4) if selected[0]["shown"] else dict(linewidth=0.7, alpha=0.7)
            axes.plot(100 * np.array(column(selected, "part")), column(selected, "largest"), color=colour, **style)
        axes.plot(100, PAPER[layer], "D", color=colour, markerfacecolor="none", markersize=8, clip_on=False)
    axes.axhline(1, color=INK, linewidth=0.6)
    axes.set(yscale="log", ylabel="largest |mean|", xlabel=f"share of the update applied, % ({count(len(seeds))})")
    key = [Line2D([], [], color=LAYER_STYLES[k][0], marker=LAYER_STYLES[k][1], label=f"layer {k}") for k in layers]
    below.legend(handles=[*key, key_of_paper()], loc="outside lower center", ncols=4)
    return figure


def _power(value: float) -> str:
    """The number with one digit, for example -3e8."""
    mantissa, exponent = f"{value:.0e}".split("e")
    return f"{value:.1f}" if abs(value) < 100 else f"{mantissa}e{int(exponent)}"
