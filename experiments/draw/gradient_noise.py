"""Equation 2: the noise of a mini-batch's gradient over the batch size."""

import numpy as np
from matplotlib.figure import Figure

from . import INK, SERIES, Rows, column

CAPTION = (
    "E |g_B - g|^2 times |B|, over its value C for single images. By equation 2 this is at most one, and it is one if "
    "images are drawn independently. Mean and standard deviation over seeds. C is not defined in training mode, and "
    "the value of the largest batch takes its place. Dotted: the theory, also for drawing without replacement."
)
NETS = {
    "none": ("without batch norm", "s"),
    "batch": ("batch norm, frozen", "o"),
    "unrepeated": ("frozen, without replacement", "^"),
    "training": ("batch norm, training mode", "v"),
}


def tables(spec, results) -> dict[str, Rows]:
    """The noise for each network and batch size, and |B| noise / C, with the spread over seeds."""
    rows = []
    for label in NETS:
        runs = results.where(label=label)
        sizes: tuple[int, ...] = runs[0].config["options"]["sizes"] if runs else ()
        for size in sizes:
            noise = np.array([run.at("noise", size).item() for run in runs])
            units = [run.arrays.get("C", run.at("noise", sizes[-1]) * sizes[-1]).item() for run in runs]
            share = noise * size / np.array(units)
            row = {"net": label, "size": size, "seeds": len(runs), "noise": noise.mean(), "share": share.mean()}
            row["spread"] = share.std(ddof=1) if len(runs) > 1 else 0.0
            count = runs[0].config["options"]["images"]
            row["expected"] = (count - size) / (count - 1) if label == "unrepeated" else 1.0
            rows.append(row)
    return {"gradient_noise": rows}


def draw(rows: Rows) -> Figure:
    """|B| noise / C by batch size, a marker for each network."""
    figure = Figure(figsize=(5.4, 3.8))
    axes = figure.add_subplot()
    for (label, (text, marker)), colour in zip(NETS.items(), SERIES[1::-1] + SERIES[2:], strict=False):
        size, share, spread, expected = (
            np.array(column(rows, name, net=label), float) for name in ("size", "share", "spread", "expected")
        )
        if len(size):
            axes.errorbar(size, share, spread, fmt=marker, color=colour, capsize=2, linewidth=1, label=text)
            axes.plot(size, expected, ":", color=INK, linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_ylim(0, 1.6)
    axes.set_xlabel("batch size |B|")
    axes.set_ylabel("|B| noise / C")
    figure.legend(loc="outside lower center", ncols=2)
    return figure
