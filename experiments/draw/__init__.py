"""The style of all figures, and the shared functions of the drawers. Needs only numpy and matplotlib.

A drawer is a module with two functions and a text. ``tables(spec, results)`` returns named tables, each a list of rows.
The first table has every number of the figure. ``draw(rows)`` draws the figure from its rows. CAPTION explains the
figure.
"""

import re
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

Rows = list[dict[str, Any]]  # the name of a column describes its content

# The palette of Okabe and Ito, whose colours are distinct for every kind of colour vision. Markers differ too.
INK, GRID = "#1a1c20", "#c9ccd3"
COLOURS = {
    "blue": "#0072b2",
    "vermilion": "#d55e00",
    "green": "#009e73",
    "purple": "#cc79a7",
    "orange": "#e69f00",
    "sky": "#56b4e9",
}
SERIES = tuple(COLOURS[name] for name in ("blue", "vermilion", "green", "purple", "sky"))  # for more than two lines
NETS = {"batch": ("with batch norm", COLOURS["blue"], "o"), "none": ("without batch norm", COLOURS["vermilion"], "s")}

STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": INK,
    "axes.facecolor": "none",  # only the figure has a background
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.constrained_layout.use": True,
    "figure.figsize": (5.4, 3.6),  # inches; on a phone the page scrolls a figure horizontally
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    "savefig.transparent": False,
    "svg.fonttype": "none",  # text is stored as text: files are smaller, and screen readers can read it
    "svg.hashsalt": "bnkern",  # the same ids on every run
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


def save(draw: Callable[[Rows], Figure], rows: Rows, stem: Path, title: str, description: str) -> None:
    """Draws ``rows`` in the common style as ``stem``.svg and .png. The same rows give the same bytes.

    ``title`` and ``description`` are for screen readers.
    """
    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]  # the stub requires literal names
        figure = draw(rows)
        for axes in figure.axes:
            for axis in (axes.xaxis, axes.yaxis):
                if axis.get_scale() == "log":
                    _label_powers(axis)
        file = stem.with_suffix(".svg")
        figure.savefig(file, metadata={"Date": None, "Creator": None})
        file.write_text(_smaller(_described(file.read_text(), title, description)))
        figure.set_layout_engine("none")  # keep the layout and do not compute it again
        figure.savefig(stem.with_suffix(".png"), dpi=160, metadata={"Software": None})


def _described(svg: str, title: str, description: str) -> str:
    """The figure with a role, a title and a description."""
    elements = f'<title id="title">{escape(title)}</title>\n <desc id="description">{escape(description)}</desc>'
    opened = r'<svg role="img" aria-labelledby="title description" \1>\n ' + elements.replace("\\", r"\\")
    return re.sub(r"<svg ([^>]*)>", opened, svg, count=1)


def _smaller(svg: str) -> str:
    """The figure at half the size: coordinates in hundredths of a point, without unused ids, groups and indentation."""
    svg = rounded(svg, 2)
    svg = re.sub(r'<g id="(?!patch_1")[\w.]+"', "<g", svg)
    svg = re.sub(r'(<image [^>]*?) id="\w+"', r"\1", svg)  # equal images have equal ids
    svg = re.sub(r"\n\s+", "\n", svg)
    for _ in range(3):  # a tick is three groups around one element
        svg = re.sub(r"<g>\n?(<use [^>]*/>|<path [^>]*/>)\n?</g>", r"\1", svg)
    return svg


def rounded(svg: str, digits: int) -> str:
    """The figure with at most ``digits`` decimals in the attributes of its elements. Its text does not change."""

    def number(match: re.Match) -> str:
        return f"{float(match[0]):.{digits}f}".rstrip("0").rstrip(".")

    longer = rf"-?\d+\.\d{{{digits + 1},}}"
    return re.sub(r"<(?:path|use|text|image|g|rect|circle)\b[^>]*>", lambda tag: re.sub(longer, number, tag[0]), svg)


def _label_powers(axis: Axis) -> None:
    """Sets labels at powers of ten, or at 1, 2 and 5 times them if the axis spans few. Keeps the ticks of a drawer."""
    if isinstance(axis.get_major_locator(), FixedLocator):
        return
    axis.set_minor_locator(NullLocator())
    low, high = axis.get_view_interval()
    if 0 < low < high < 100 * low:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def column(rows: Rows, name: str, **conditions: object) -> list:
    """One column of the rows that have these values."""
    return [row[name] for row in rows if all(row[key] == value for key, value in conditions.items())]


def band(axes, x, rows: Rows, name: str, style: str, colour: str) -> None:
    """The line ``name`` over x, and the band from ``name low`` to ``name high`` behind it."""
    low, high = column(rows, f"{name} low"), column(rows, f"{name} high")
    if low != high:  # with one seed there is no band
        axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
    axes.plot(x, column(rows, name), style, color=colour)


def ranged(name: str, values: np.ndarray) -> dict[str, float]:
    """The columns that ``band`` draws, from one number per seed: the median, the minimum and the maximum."""
    return {name: np.median(values), f"{name} low": np.min(values), f"{name} high": np.max(values)}


def living(name: str, values: np.ndarray, dead: np.ndarray) -> dict[str, float]:
    """The same as ``ranged`` for the seeds that are not dead. The values are nan if all seeds are dead."""
    return (
        ranged(name, values[~dead]) if not dead.all() else dict.fromkeys((name, f"{name} low", f"{name} high"), np.nan)
    )


def nearest_to_median(runs: list, value: Callable[[Any], float]) -> Any:
    """The run whose value is nearest to the median over the runs."""
    values = np.array([value(run) for run in runs])
    return runs[int(np.argmin(np.abs(values - np.median(values))))]


def count(seeds: int) -> str:
    """The number of seeds as text: "1 seed", "2 seeds"."""
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
