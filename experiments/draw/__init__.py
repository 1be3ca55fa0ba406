"""How results look: one style for all figures, and the words that the drawers share. Needs numpy and matplotlib alone.

A drawer is a module of two functions and a text: ``tables(spec, results)`` gives named tables, each a list of rows;
the first holds every number of the figure, ``draw(rows)`` draws it from those alone, and CAPTION says how to read it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter

Rows = list[dict[str, Any]]  # what stands in a column is known by its name

# Okabe and Ito's colours, told apart with every kind of colour vision; the shape of a marker says the same again.
INK, GRID = "#1a1c20", "#c9ccd3"
COLOURS = {
    "blue": "#0072b2",
    "vermilion": "#d55e00",
    "green": "#009e73",
    "purple": "#cc79a7",
    "orange": "#e69f00",
    "sky": "#56b4e9",
}
SERIES = tuple(COLOURS[name] for name in ("blue", "vermilion", "green", "purple", "sky"))  # of more than two
NETS = {"batch": ("with batch norm", COLOURS["blue"], "o"), "none": ("without", COLOURS["vermilion"], "s")}

STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": INK,
    "axes.facecolor": "none",  # so that the figure's ground is the only one
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.constrained_layout.use": True,
    "figure.figsize": (5.4, 3.6),  # inches; a phone shows it at two thirds of its size, still readable
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    "savefig.transparent": False,
    "svg.fonttype": "none",  # text stays text: small files, readable aloud
    "svg.hashsalt": "bnkern",  # the same ids on every run
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


def save(draw: Callable[[Rows], Figure], rows: Rows, stem: Path) -> None:
    """Draws ``rows`` in the common style as ``stem``.svg and .png, the same bytes for the same rows."""
    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]  # it asks for the literal names
        figure = draw(rows)
        for axes in figure.axes:
            for axis in (axes.xaxis, axes.yaxis):
                if axis.get_scale() == "log":
                    _label_powers(axis)
        figure.savefig(stem.with_suffix(".svg"), metadata={"Date": None, "Creator": None})
        figure.set_layout_engine("none")  # stays as it was laid out, and takes no time again
        figure.savefig(stem.with_suffix(".png"), dpi=160, metadata={"Software": None})


def _label_powers(axis: Axis) -> None:
    """Powers of ten alone; plain 1, 2 and 5 times them on an axis that spans too few. A drawer's own ticks stay."""
    if isinstance(axis.get_major_locator(), FixedLocator):
        return
    axis.set_minor_formatter(NullFormatter())
    low, high = axis.get_view_interval()
    if 0 < low < high < 30 * low:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def column(rows: Rows, name: str, **where: object) -> list:
    """One column of the rows that have these values."""
    return [row[name] for row in rows if all(row[key] == value for key, value in where.items())]


def band(axes, x, rows: Rows, name: str, style: str, colour: str) -> None:
    """The line ``name`` over x, and behind it the band from ``name low`` to ``name high``."""
    axes.fill_between(
        x, column(rows, f"{name} low"), column(rows, f"{name} high"), color=colour, alpha=0.2, linewidth=0
    )
    axes.plot(x, column(rows, name), style, color=colour)


def ranged(name: str, values: np.ndarray) -> dict[str, float]:
    """What ``band`` draws of one number a seed: the median, the least and the largest."""
    return {name: np.median(values), f"{name} low": np.min(values), f"{name} high": np.max(values)}


def living(name: str, values: np.ndarray, dead: np.ndarray) -> dict[str, float]:
    """As ``ranged``, of the seeds that are not dead; nan where all are."""
    return (
        ranged(name, values[~dead]) if not dead.all() else dict.fromkeys((name, f"{name} low", f"{name} high"), np.nan)
    )


def count(seeds: int) -> str:
    """1 seed, 2 seeds."""
    return f"{seeds} seed{'s' * (seeds != 1)}"


def key_of_nets(seeds: int) -> list[Line2D]:
    """The legend's entries for the networks with and without batch norm."""
    return [
        Line2D([], [], color=colour, marker=marker, label=f"{text}, {count(seeds)}")
        for text, colour, marker in NETS.values()
    ]


def key_of_paper() -> Line2D:
    """The legend's entry for the paper's values: hollow diamonds."""
    return Line2D(
        [], [], color=INK, marker="D", markerfacecolor="none", markersize=8, linestyle="none", label="the paper"
    )
