"""Figure 5: ln std and ln |mean| of the channels by layer, with and without batch norm."""

import numpy as np
from matplotlib.figure import Figure

from . import INK, NETS, Rows, column, key_of_nets, key_of_paper

CAPTION = (
    "Lines: averages over channels and seeds. Bands: standard deviation over channels. Error bars: the central 95 % of "
    "the networks' averages over channels. Hollow: the paper's values. Dotted: a new stage begins. Layer 110 is the "
    "classifier."
)
QUANTITIES = {"ln_std": "ln std", "ln_abs_mean": "ln |mean|"}


CENTRAL = (2.5, 97.5)  # percentiles


def tables(spec, results) -> dict[str, Rows]:
    """One table, see :func:`by_layer`."""
    return {"moments_by_depth": by_layer(spec, results)}


def by_layer(spec, results) -> Rows:
    """For each layer the average over channels with its mean and spread over seeds, and the spread over channels."""
    rows = []
    for norm in NETS:
        runs = results.where(norm=norm)
        for index, layer in enumerate(spec.runs[0].layers if runs else ()):
            row = {"norm": norm, "layer": layer, "seeds": len(runs)}
            for name in QUANTITIES:
                channels = np.array([run.at(name, layer) for run in runs], float)  # [seeds, C]
                averages = channels.mean(1)
                row[name] = averages.mean()
                row[f"{name} over seeds"] = averages.std(ddof=1) if len(runs) > 1 else 0.0
                row[f"{name} low"], row[f"{name} high"] = np.percentile(averages, CENTRAL)
                row[f"{name} over channels"] = channels.std(1).mean()
                row[f"{name} paper"] = spec.paper[name, norm][index]
            rows.append(row)
    return rows


def draw(rows: Rows) -> Figure:
    """Two panels over the layers: bands over channels, error bars over seeds, hollow markers for the paper."""
    figure = Figure(figsize=(5.4, 5.6))
    panels = figure.subplots(2, 1, sharex=True)
    for axes, (name, label) in zip(panels, QUANTITIES.items(), strict=True):
        for norm, (_, colour, marker) in NETS.items():
            layer, ours, low, high, channels, paper = (
                np.array(column(rows, key, norm=norm), float)
                for key in ("layer", name, *(f"{name} {end}" for end in ("low", "high", "over channels", "paper")))
            )
            # The last layer is the classifier. It is of another kind and not on the line.
            for part, style in ((slice(-1), marker + "-"), (slice(-1, None), marker)):
                x, y = layer[part], ours[part]
                band = (y - channels[part], y + channels[part])
                if len(x) > 1:
                    axes.fill_between(x, *band, color=colour, alpha=0.18, linewidth=0)
                else:
                    axes.vlines(x, *band, colors=colour, alpha=0.3, linewidth=6)
                axes.errorbar(x, y, (y - low[part], high[part] - y), fmt=style, color=colour, capsize=2, elinewidth=1)
            axes.plot(layer, paper, "D", color=colour, markerfacecolor="none", markersize=8)
        axes.axhline(0, color=INK, linewidth=0.6)
        for stage in (37.5, 73.5):
            axes.axvline(stage, color=INK, linestyle=":", linewidth=1)
        axes.set_ylabel(label)
    panels[-1].set_xticks(sorted({row["layer"] for row in rows}))
    panels[-1].set_xlabel("layer")
    fewest = min(row["seeds"] for row in rows)
    figure.legend(handles=[*key_of_nets(fewest), key_of_paper()], loc="outside lower center", ncols=2)
    return figure
