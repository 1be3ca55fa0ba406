"""The figures of the report, as SVG, from a results file. A figure without measurements is None."""

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

# Okabe and Ito's colours, each with a marker, so that a series can be identified without its colour. The page
# replaces the colours on a dark background.
SERIES = (("#0072b2", "o"), ("#d55e00", "s"), ("#009e73", "^"), ("#cc79a7", "D"), ("#e69f00", "v"), ("#56b4e9", "P"))
POINTS = {"linestyle": "none"}
WIDTH = 5.4  # inches
LINE = 0.2  # height of a line of labels in inches


def draw_all(results: dict, old: dict | None = None) -> dict[str, tuple[str, str]]:
    """The figures for which there are measurements, by name: the SVG and its caption."""
    measurements = [m for m in results["rows"] if m["mode"] == "call" and "missing" not in m]
    result = {"speedups": (_speedups(measurements), SPEEDUPS), "roof": (_roof(measurements), ROOF)}
    result |= {f"growth-{axis}": (_growth(measurements, axis), GROWTH) for axis in ("N", "C", "S", "depth")}
    result["memory"] = _memory(measurements), MEMORY
    if old is not None:
        result["changes"] = _changes(old, results), CHANGES
    return {name: (svg, caption) for name, (svg, caption) in result.items() if svg is not None}


def _svg(height: float, draw: Callable[[Axes], None]) -> str:
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": "bnkern"}):
        figure = Figure(figsize=(WIDTH, height))
        draw(figure.subplots())
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    return stream.getvalue()


def _legend(axes: Axes) -> None:
    """Puts the legend above the axes, where it covers no point."""
    axes.figure.legend(loc="outside upper left", ncols=2)  # two columns fit the width


SPEEDUPS = (
    "Batch norm + addition + ReLU, forward and backward through autograd: how many times as fast as the better of "
    "torch's two eager forms (medians of the rounds' ratios). Right of the line the provider is faster than eager."
)


def _speedups(measurements: list[dict]) -> str | None:
    chosen = [m for m in measurements if m["bench"] == "batch_norm" and m["op"] == FUSED]
    cases = {case: {m["provider"]: m for m in group} for (case,), group in groups(chosen, _short).items()}
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
            places = [name for name, other in others if other == peer]
            colour, marker = SERIES[k]
            values = [cases[name][peer]["speedup"]["best"] for name in places]
            axes.plot(values, places, **POINTS, color=colour, marker=marker, label=peer)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}x")
        axes.set_xlabel(f"times the better eager form\n(bnkern's geometric mean: {geometric_mean(ours):.2f}x)")
        _legend(axes)

    return _svg(1.1 + LINE * len(cases), draw)


def _short(measurement: dict) -> str:
    layout = {"channels_last": "NHWC", "nchw": "NCHW"}.get(measurement["layout"], measurement["layout"])
    return f"{measurement['shape']} {layout} {measurement['dtype']}"


ROOF = (
    "The bandwidth of each phase, computed from the minimum of bytes that it must move, as a share of the bandwidth of "
    "a copy of 256 MiB in the same rounds. A tensor that stays in the caches may exceed 100 %."
)


def _roof(measurements: list[dict]) -> str | None:
    chosen = [m for m in measurements if m["bench"] in PHASES and m["provider"] == "bnkern"]
    if not chosen:
        return None
    phases = groups(chosen, lambda m: m["bench"])

    def draw(axes: Axes) -> None:
        axes.axhline(100, color=INK, linewidth=1, label="copy")
        for k, phase in enumerate(PHASES):
            group = phases.get((phase,), [])
            sizes = [
                m["tensor_bytes"] / 1e6 * 1.12 ** (k - 1.5) for m in group
            ]  # shifted, so that the markers do not overlap
            shares = [100 * m["share_of_copy"] for m in group]
            colour, marker = SERIES[k]
            axes.plot(sizes, shares, **POINTS, color=colour, marker=marker, label=phase)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_ylim(bottom=0)
        axes.set_xlabel("size of one tensor, MB")
        axes.set_ylabel("% of the copy's bandwidth")
        _legend(axes)

    return _svg(3.6, draw)


GROWTH = (
    "Time of forward and backward over the size of one axis, the others fixed; both scales are logarithmic. A line of "
    "slope one means that time is proportional to the work. At the left the fixed cost of a call dominates."
)


def _growth(measurements: list[dict], axis: str) -> str | None:
    drawn = ("bnkern", "eager in place", "no norm") if axis == "depth" else ("bnkern", "eager in place")
    chosen = [m for m in measurements if m.get("axis") == axis and m["provider"] in drawn]
    series = groups(chosen, lambda m: f"{m['provider']} {m['layout']}")
    if not series:
        return None

    def draw(axes: Axes) -> None:
        for (colour, marker), ((provider,), group) in zip(SERIES, series.items(), strict=False):
            group.sort(key=lambda m: m["value"])
            sizes, low, high = ([m[key] for m in group] for key in ("value", "p20_ms", "p80_ms"))
            axes.fill_between(sizes, low, high, color=colour, alpha=0.2, linewidth=0)
            axes.plot(sizes, [m["median_ms"] for m in group], color=colour, marker=marker, label=provider)
        values = sorted({m["value"] for group in series.values() for m in group})
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks(values, [str(value) for value in values])
        axes.minorticks_off()
        axes.set_xlabel(f"{axis}")
        axes.set_ylabel("ms")
        _legend(axes)

    return _svg(3.2, draw)


MEMORY = (
    "Memory that autograd keeps for the backward of a whole network, without the parameters, and the peak of memory "
    "during one training step."
)


def _memory(measurements: list[dict]) -> str | None:
    chosen = [m for m in measurements if m["bench"] == "memory_of_networks"]
    if not chosen:
        return None

    def draw(axes: Axes) -> None:
        names = [f"{m['op']}, {m['provider']}" for m in chosen][::-1]
        for (colour, marker), (key, label) in zip(
            SERIES, {"saved_bytes": "kept for backward", "peak_bytes": "peak of a step"}.items(), strict=False
        ):
            results = [(name, m[key] / 1e6) for name, m in zip(names, chosen[::-1], strict=True) if m.get(key)]
            axes.plot(
                [v for _, v in results], [n for n, _ in results], **POINTS, color=colour, marker=marker, label=label
            )
        axes.set_xlim(left=0)
        axes.set_xlabel("MB")
        _legend(axes)

    return _svg(1.1 + LINE * len(chosen), draw)


CHANGES = (
    "Medians over those of the other file, divided by the drift of each case's peers. Shown are the measurements that "
    "changed by more than the noise (the band), at most the forty largest changes. Left of the line is faster."
)


def _changes(old: dict, new: dict) -> str | None:
    changes, noise = compare(old, new)
    beyond = sorted((c for c in changes if c.beyond(noise) and not c.is_peer), key=lambda c: c.factor)[-40:]
    if not beyond:
        return None

    def draw(axes: Axes) -> None:
        axes.axvline(1, color=INK, linewidth=1)
        axes.axvspan(1 / noise, noise, color=INK, alpha=0.12, linewidth=0)
        names = [f"{c.measurement['bench']} {c.measurement['op']}\n{_short(c.measurement)}" for c in beyond]
        for (colour, marker), label, slower in zip(SERIES, ("faster", "slower"), (False, True), strict=False):
            results = [(c.times, name) for c, name in zip(beyond, names, strict=True) if (c.times > 1) == slower]
            axes.plot(
                [t for t, _ in results], [n for _, n in results], **POINTS, color=colour, marker=marker, label=label
            )
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:.2f}x")
        axes.set_xlabel("new median over old")
        _legend(axes)

    return _svg(1.1 + 2 * LINE * len(beyond), draw)
