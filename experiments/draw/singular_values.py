"""Figures 8, 9 and 20: the density of Theorem 1, samples of singular values, and condition numbers by depth."""

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from . import INK, SERIES, Rows, column

CAPTION = (
    "Top: density of squared singular values for products of M factors (Theorem 1, Figure 8). All densities diverge at "
    "0. The axis is cut at 0.6. Middle: singular values of 1, 3 and 5 drawn factors over all draws, in 50 bins. Thin "
    "lines: Theorem 1 (Figure 9). Bottom: condition numbers of products of M factors, mean and standard deviation over "
    "draws. Crosses: condition numbers from the singular values of the computed product. Dotted: the gain per factor "
    "in the limit of many factors."
)
DENSITIES, DRAWN, BINS = (1, 2, 3, 5), (1, 3, 5), 50
CUT = 0.6  # the end of the axis of the densities, which diverge


def tables(spec, results) -> dict[str, Rows]:
    """Every point of the three panels, and the medians over draws for each number of factors."""
    theory, products, conditions = (results.where(label=run.label) for run in spec.runs)
    points, summary = [], []
    for m in DENSITIES if theory else ():
        shown = zip(theory[0].at("x", m), theory[0].at("density", m), strict=True)
        points += [_point("density", m, x, density) for x, density in shown]
    for m in DRAWN if theory and products else ():
        s = np.concatenate([run.at("s", m) for run in products])
        edges = np.linspace(0, theory[0].at("edge of s", m).item(), BINS + 1)
        share = np.interp(edges**2, theory[0].at("x", m), theory[0].at("share", m), left=0.0, right=1.0)
        counts = np.histogram(s, [*edges[:-1], np.inf])[0]  # a few values are above the theorem's edge
        bins = zip(edges[:-1], edges[1:], counts, np.diff(share) * len(s), strict=True)
        points += [_point("histogram", m, (low + high) / 2, count, expected) for low, high, count, expected in bins]
    for m in products[0].config["options"]["factors"] if products else ():
        row = {"factors": m, "draws": len(products)}
        for name in ("distance of s^2", "distance of s", "largest", "exponent", "first bin", "log10 kappa"):
            row[name] = np.median([run.at(name, m).item() for run in products])
        summary.append(row)
    for m in conditions[0].config["options"]["factors"] if conditions else ():
        kappas, plain = ([run.at(name, m).item() for run in conditions] for name in KAPPAS)
        spread = np.std(kappas, ddof=1) if len(kappas) > 1 else 0.0
        points.append(_point("condition", m, m, np.mean(kappas), np.mean(plain), spread, conditions[0].at("limit")))
    return {"singular_values": points} | ({"singular_values_medians": summary} if summary else {})


KAPPAS = ("log10 kappa", "plain log10 kappa")


def _point(panel: str, factors: int, x, y, other=None, spread=None, limit=None) -> dict[str, object]:
    """``other``: the theorem's count of a bin, or the plain condition number. ``limit``: the gain per factor."""
    limit = None if limit is None else limit.item()
    return {"panel": panel, "factors": factors, "x": x, "y": y, "other": other, "spread": spread, "limit": limit}


def draw(rows: Rows) -> Figure:
    """Three panels: densities, histograms under the theorem's lines, condition numbers."""
    figure = Figure(figsize=(5.4, 8.4))
    density, histogram, condition = figure.subplots(3, 1)
    for m, colour in zip(DENSITIES, SERIES, strict=False):
        x, y = (np.array(column(rows, name, panel="density", factors=m), float) for name in "xy")
        density.plot(x, y, color=colour, label=f"M = {m}")
        middles, counts, expected = (column(rows, name, panel="histogram", factors=m) for name in ("x", "y", "other"))
        if middles:
            edges = [*(np.array(middles) - middles[0]), middles[-1] + middles[0]]
            histogram.stairs(counts, edges, color=colour, linewidth=1.6)
            histogram.plot(middles, expected, color=INK, linewidth=0.8)
    density.set(xlim=(0, 15.5), ylim=(0, CUT), xlabel="x, squared singular value", ylabel=f"density, cut at {CUT:g}")
    density.legend(ncols=2)
    histogram.set(yscale="log", ylim=(1, 6000), xlabel="singular value", ylabel="values in a bin")
    factors, kappa, plain, spread, limit = (
        np.array(column(rows, name, panel="condition"), float) for name in ("x", "y", "other", "spread", "limit")
    )
    if len(factors):
        condition.errorbar(factors, kappa, spread, fmt="o-", color=SERIES[0], capsize=2, linewidth=1)
        condition.plot(factors, plain, "x", color=INK)
        condition.plot(factors, kappa[0] + limit * (factors - factors[0]), ":", color=INK, linewidth=1.2)
    condition.set(xlabel="factors M", ylabel="log10 condition number")
    condition.xaxis.set_major_locator(MaxNLocator(integer=True))
    key = [
        Line2D([], [], color=SERIES[0], marker="o", label="|X| times |X^-1|"),
        Line2D([], [], color=INK, marker="x", linestyle="none", label="from the computed product"),
        Line2D([], [], color=INK, linestyle=":", label="gain in the limit of many factors"),
    ]
    condition.legend(handles=key)
    return figure
