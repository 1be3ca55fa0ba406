"""The figures of the report, as SVG, from the rows of a results file. A figure whose rows are not there is None."""

import io
from collections.abc import Callable
from statistics import geometric_mean

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.report.compare import compare
from benchmarks.report.tables import groups
from benchmarks.tools.measurements import FUSED, PHASES
from experiments.draw import INK, STYLE

# Okabe and Ito's colours and, for who cannot tell them apart, a marker each; the page has its own for a dark ground.
SERIES = (("#0072b2", "o"), ("#d55e00", "s"), ("#009e73", "^"), ("#cc79a7", "D"), ("#e69f00", "v"), ("#56b4e9", "P"))
POINTS = {"linestyle": "none"}
WIDTH = 5.4  # inches
LINE = 0.2  # inches of height for a line of labels


def draw_all(results: dict, old: dict | None = None) -> dict[str, tuple[str, str]]:
    """Each figure that the rows give, by name: its SVG and what it shows."""
    rows = [row for row in results["rows"] if row["mode"] == "call" and "missing" not in row]
    found = {"speedups": (_speedups(rows), SPEEDUPS), "roof": (_roof(rows), ROOF)}
    found |= {f"growth-{axis}": (_growth(rows, axis), GROWTH) for axis in ("N", "C", "S", "depth")}
    found["memory"] = _memory(rows), MEMORY
    if old is not None:
        found["changes"] = _changes(old, results), CHANGES
    return {name: (svg, caption) for name, (svg, caption) in found.items() if svg is not None}


def _svg(height: float, draw: Callable[[Axes], None]) -> str:
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": "bnkern"}):
        figure = Figure(figsize=(WIDTH, height))
        draw(figure.subplots())
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    return stream.getvalue()


def _legend(axes: Axes) -> None:
    """Above the axes, where it covers nothing."""
    axes.figure.legend(loc="outside upper left", ncols=2)  # two fit the width


SPEEDUPS = (
    "Batch norm + addition + ReLU, forward and backward through autograd: how many times as fast as the better of "
    "torch's two eager forms (medians of the rounds' ratios). Right of the line bnkern is faster."
)


def _speedups(rows: list[dict]) -> str | None:
    chosen = [r for r in rows if r["bench"] == "batch_norm" and r["op"] == FUSED]
    cases = {case: {row["provider"]: row for row in group} for (case,), group in groups(chosen, _short).items()}
    cases = {case: cells for case, cells in cases.items() if "speedup" in cells.get("bnkern", {})}
    if not cases:
        return None

    def draw(axes: Axes) -> None:
        names = list(cases)[::-1]
        ours = [cases[name]["bnkern"]["speedup"]["best"] for name in names]
        axes.axvline(1, color=INK, linewidth=1)
        axes.plot(ours, names, **POINTS, color=SERIES[0][0], marker=SERIES[0][1], label="bnkern")
        others = [
            (name, peer)
            for peer in ("compile", "attorch", "FlagGems", "Apex groupbn")
            for name in names
            if "speedup" in cases[name].get(peer, {})
        ]
        for k, peer in enumerate(dict.fromkeys(peer for _, peer in others), 1):
            at = [name for name, other in others if other == peer]
            colour, marker = SERIES[k]
            values = [cases[name][peer]["speedup"]["best"] for name in at]
            axes.plot(values, at, **POINTS, color=colour, marker=marker, label=peer)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}x")
        axes.set_xlabel(f"times the better eager form\n(bnkern's geometric mean: {geometric_mean(ours):.2f}x)")
        _legend(axes)

    return _svg(1.1 + LINE * len(cases), draw)


def _short(row: dict) -> str:
    layout = {"channels_last": "NHWC", "nchw": "NCHW"}.get(row["layout"], row["layout"])
    return f"{row['shape']} {layout} {row['dtype']}"


ROOF = (
    "The bandwidth of each phase, by the least bytes that it must move, as a share of what a copy of 256 MiB reaches "
    "in the same rounds: the roof. A tensor that stays in the caches may pass it."
)


def _roof(rows: list[dict]) -> str | None:
    chosen = [r for r in rows if r["bench"] in PHASES and r["provider"] == "bnkern"]
    if not chosen:
        return None
    phases = groups(chosen, lambda r: r["bench"])

    def draw(axes: Axes) -> None:
        axes.axhline(100, color=INK, linewidth=1, label="copy")
        for k, phase in enumerate(PHASES):
            group = phases.get((phase,), [])
            sizes = [r["tensor_bytes"] / 1e6 * 1.12 ** (k - 1.5) for r in group]  # side by side, to be told apart
            shares = [100 * r["share_of_copy"] for r in group]
            colour, marker = SERIES[k]
            axes.plot(sizes, shares, **POINTS, color=colour, marker=marker, label=phase)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_ylim(bottom=0)
        axes.set_xlabel("one tensor, MB")
        axes.set_ylabel("% of the copy's bandwidth")
        _legend(axes)

    return _svg(3.6, draw)


GROWTH = (
    "Forward and backward against the size of one axis, the others fixed; both axes logarithmic. A straight line of "
    "slope one is time in proportion to the work; where it flattens to the left the fixed cost of a call remains."
)


def _growth(rows: list[dict], axis: str) -> str | None:
    drawn = ("bnkern", "eager in place", "no norm") if axis == "depth" else ("bnkern", "eager in place")
    chosen = [r for r in rows if r.get("axis") == axis and r["provider"] in drawn]
    series = groups(chosen, lambda r: f"{r['provider']} {r['layout']}")
    if not series:
        return None

    def draw(axes: Axes) -> None:
        for (colour, marker), ((provider,), group) in zip(SERIES, series.items(), strict=False):
            group.sort(key=lambda r: r["value"])
            at, low, high = ([r[key] for r in group] for key in ("value", "p20_ms", "p80_ms"))
            axes.fill_between(at, low, high, color=colour, alpha=0.2, linewidth=0)
            axes.plot(at, [r["median_ms"] for r in group], color=colour, marker=marker, label=provider)
        values = sorted({r["value"] for group in series.values() for r in group})
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks(values, [str(value) for value in values])
        axes.minorticks_off()
        axes.set_xlabel(f"{axis}")
        axes.set_ylabel("ms")
        _legend(axes)

    return _svg(3.2, draw)


MEMORY = (
    "What autograd keeps for the backward of a whole network, parameters not counted, and the peak of memory during "
    "one training step."
)


def _memory(rows: list[dict]) -> str | None:
    chosen = [r for r in rows if r["bench"] == "memory_of_networks"]
    if not chosen:
        return None

    def draw(axes: Axes) -> None:
        names = [f"{r['op']}, {r['provider']}" for r in chosen][::-1]
        for (colour, marker), (key, label) in zip(
            SERIES, {"saved_bytes": "kept for backward", "peak_bytes": "peak of a step"}.items(), strict=False
        ):
            found = [(name, r[key] / 1e6) for name, r in zip(names, chosen[::-1], strict=True) if r.get(key)]
            axes.plot([v for _, v in found], [n for n, _ in found], **POINTS, color=colour, marker=marker, label=label)
        axes.set_xlim(left=0)
        axes.set_xlabel("MB")
        _legend(axes)

    return _svg(1.1 + LINE * len(chosen), draw)


CHANGES = (
    "Medians against those of the other file, after the drift of each case's peers is taken out; rows beyond the noise "
    "(the band), and no more than forty of them, the largest changes. Left of the line is faster."
)


def _changes(old: dict, new: dict) -> str | None:
    changes, noise = compare(old, new)
    beyond = sorted((c for c in changes if c.beyond(noise) and not c.is_peer), key=lambda c: c.factor)[-40:]
    if not beyond:
        return None

    def draw(axes: Axes) -> None:
        axes.axvline(1, color=INK, linewidth=1)
        axes.axvspan(1 / noise, noise, color=INK, alpha=0.12, linewidth=0)
        names = [f"{c.row['bench']} {c.row['op']}\n{_short(c.row)}" for c in beyond]
        for (colour, marker), label, slower in zip(SERIES, ("faster", "slower"), (False, True), strict=False):
            found = [(c.times, name) for c, name in zip(beyond, names, strict=True) if (c.times > 1) == slower]
            axes.plot([t for t, _ in found], [n for _, n in found], **POINTS, color=colour, marker=marker, label=label)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:.2f}x")
        axes.set_xlabel("times the old median")
        _legend(axes)

    return _svg(1.1 + 2 * LINE * len(beyond), draw)
