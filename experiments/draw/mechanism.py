"""Table 1 with the input or the gradient centred: a/b by layer."""

from typing import Any, Literal

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from . import INK, NETS, Rows, column, count

CAPTION = (
    "a/b by layer, geometric mean and standard deviation over seeds: unchanged (full), without the channel means of "
    "the input (half full), and without those of the gradient (hollow). Dotted: the value for N independent signs."
)
FILLS: dict[str, Literal["full", "left", "none"]] = {"nothing": "full", "input": "left", "gradient": "none"}


def tables(spec, results) -> dict[str, Rows]:
    """Geometric means of a, b, a/b and a/(b sqrt N) for each layer and variant, and the spread of a/b."""
    rows = []
    for planned in spec.runs:
        centred = planned.options["centred"]
        runs = results.where(norm=planned.norm, centred=centred)
        for layer in planned.layers if runs else ():
            row = {"norm": planned.norm, "centred": centred or "nothing", "layer": layer, "seeds": len(runs)}
            row["summands"] = int(runs[0].at("count", layer))
            for name in ("a", "b", "a/b", "a/(b sqrt N)"):
                logs = np.log([run.at(name, layer).item() for run in runs])
                row[name] = np.exp(logs.mean())
                if name == "a/b":
                    row["a/b spread"] = np.exp(logs.std(ddof=1)) if len(runs) > 1 else 1.0
            rows.append(row)
    return {"mechanism": rows}


def draw(rows: Rows) -> Figure:
    """a/b on a logarithmic axis. The variants of a layer are drawn side by side."""
    figure = Figure(figsize=(5.4, 3.9))
    axes = figure.add_subplot()
    layers = sorted({row["layer"] for row in rows})
    variants = sorted({(row["norm"], row["centred"]) for row in rows}, key=lambda v: (v[0], list(FILLS).index(v[1])))
    for shift, (norm, centred) in zip(np.linspace(-0.3, 0.3, len(variants)), variants, strict=True):
        selected = [row for row in rows if (row["norm"], row["centred"]) == (norm, centred)]
        _, colour, marker = NETS[norm]
        ratio, spread = (np.array(column(selected, name), float) for name in ("a/b", "a/b spread"))
        axes.errorbar(
            np.arange(len(layers)) + shift, ratio, [ratio - ratio / spread, ratio * spread - ratio],
            fmt=marker, color=colour, capsize=2, linewidth=1, markersize=7, fillstyle=FILLS[centred],
        )  # fmt: skip
    roots = [np.sqrt(column(rows, "summands", layer=layer)[0]) for layer in layers]
    axes.hlines(roots, np.arange(len(layers)) - 0.4, np.arange(len(layers)) + 0.4, colors=INK, linestyles=":")
    axes.set_yscale("log")
    axes.set_ylabel("a/b")
    axes.set_xticks(range(len(layers)), [f"layer {layer}" for layer in layers])
    axes.grid(axis="x", visible=False)
    plain: dict[str, Any] = dict(color=INK, linestyle="none", marker="o", markersize=7)
    key = [
        Line2D([], [], color=colour, marker=marker, linestyle="none", label=f"{text}, {count(rows[0]['seeds'])}")
        for text, colour, marker in NETS.values()
    ]
    texts = {"input": "input centred", "gradient": "gradient centred"}
    key += [Line2D([], [], fillstyle=FILLS[centred], label=text, **plain) for centred, text in texts.items()]
    key.append(Line2D([], [], color=INK, linestyle=":", label="independent signs, √N"))
    figure.legend(handles=key, loc="outside lower center", ncols=2)
    return figure
