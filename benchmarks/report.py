"""From times to rows, and from rows to tables and targets.

A row is one provider in one case: the labels ``bench op shape layout dtype size tensor_bytes mode provider``; the
times ``median_ms p20_ms p80_ms rounds``; ``speedup`` over each eager form, and over the fastest of them as "best";
where bytes are known ``bytes`` (the least) and ``phased_bytes``, and by the least ``gb_per_s`` and ``share_of_copy``;
for whole batch norms ``error``, relative to float64; for records ``cost``, times the same call without them. A
provider that could not be had has ``missing`` instead: why.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from statistics import geometric_mean

from benchmarks.timing import CACHED_BYTES, Comparison

PHASES = ("moments", "normalize", "grad_sums", "grad_input")
CALLS = (*PHASES, "forward", "backward")
FUSED = "bn_add_relu"


def measured(comparison: Comparison, name: str, moved: Callable[[str], dict]) -> dict:
    """The measured part of a row. ``moved(name)`` gives the "bytes" of a call, and what else to say of them."""
    row = comparison.summary(name)._asdict()
    eager = [other for other in comparison.samplers if other.startswith("eager")]
    if eager:
        row["speedup"] = {other: comparison.ratio(other, name) for other in eager}
        best = min(eager, key=lambda other: comparison.summary(other).median_ms)
        row["speedup"]["best"] = row["speedup"][best]
    if "without records" in comparison.samplers:
        row["cost"] = comparison.ratio(name, "without records")
    row |= moved(name)
    if "bytes" in row:
        row["gb_per_s"] = row["bytes"] / row["median_ms"] / 1e6
    if "copy" in comparison.samplers:
        row["share_of_copy"] = row["bytes"] / moved("copy")["bytes"] * comparison.ratio("copy", name)
    return row


def targets(rows: list[dict]) -> list[dict]:
    """What the design asks for on two CPU cores, what was measured, and whether it holds. Only the measured ones."""
    found = []

    def ask(name: str, bar: float, values: Iterable[float], combine: Callable) -> None:
        values = list(values)
        if values:
            value = combine(values)
            found.append({"name": name, "bar": bar, "value": value, "cases": len(values), "holds": value >= bar})

    ours = [row for row in rows if row["provider"].startswith("bnkern") and row["mode"] == "call"]
    for op, mean_bar, least_bar in ((FUSED, 3.0, 1.5), ("bn", 1.5, 1.0)):
        speedups = [row["speedup"] for row in ours if row["bench"] == "batch_norm" and row["op"] == op]
        for form in speedups[0] if speedups else ():
            over = f"{op} forward + backward over {'the better eager form' if form == 'best' else form}"
            ask(f"{over}, geometric mean", mean_bar, (s[form] for s in speedups), geometric_mean)
            ask(f"{over}, slowest case", least_bar, (s[form] for s in speedups), min)
    for phase in PHASES:
        large = [row for row in ours if row["bench"] == phase and row["tensor_bytes"] > CACHED_BYTES]
        ask(f"{phase} past the caches, share of copy bandwidth, least", 0.6, (r["share_of_copy"] for r in large), min)
    steps = [row["speedup"]["best"] for row in ours if row["bench"] == "step"]
    ask("ResNet-20 training step over eager in its better layout", 1.2, steps[:1] and [max(steps)], max)
    return found


# ------------------------------------------------------------------------------------------------------- tables


def markdown(results: dict) -> str:
    """All tables of a results file."""
    tables = list(_environment(results))
    for (table, mode), rows in _groups(results["rows"], _table, lambda row: row["mode"]).items():
        tables += [f"### {table}" + (f", {mode}" if mode != "call" else ""), "", *_RENDER[table](rows), ""]
    if results["targets"]:
        tables += ["### Targets", "", *_targets(results["targets"])]
    return "\n".join(tables)


def _table(row: dict) -> str:
    tables = {"batch_norm": "Whole batch norms", "step": "Training steps", "records": "Records"}
    return tables.get(row["bench"], "Phases")


def _groups(rows: list[dict], *keys: Callable[[dict], str]) -> dict[tuple, list[dict]]:
    groups = defaultdict(list)
    for row in rows:
        groups[tuple(key(row) for key in keys)].append(row)
    return groups


def _case(row: dict) -> str:
    return f"{row['op']} {row['shape']} {row['layout']} {row['dtype']}"


def _environment(results: dict) -> Iterator[str]:
    found = results["environment"]
    if results["quick"]:
        yield from ("Quick run: these times mean nothing.", "")
    devices = [name for kind, name in found["devices"].items() if kind == "cpu" or ":" in kind]
    changed = " with uncommitted changes" if found["uncommitted changes"] else ""
    load = f"{found['load average at start']:.1f} at the start, {found['load average at end']:.1f} at the end"
    kernels = found["native module"].get("cpu kernels", "not built")
    yield f"Measured {found['date']} on {'; '.join(devices)}; load average {load};"
    yield f"commit {found['commit']}{changed}, backend {found['backend']} (native CPU kernels: {kernels}),"
    yield f"torch {found['versions']['torch']} ({found['torch isa']})."
    yield ""


def _batch_norms(rows: list[dict]) -> Iterator[str]:
    yield "Forward and backward in ms, median (p20 to p80); the largest relative error of y and the gradients."
    yield ""
    rows = sorted(rows, key=lambda row: row["op"] != FUSED)  # the fused operation first, and it has all providers
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    yield from _header("case", *providers, "bnkern over the better eager form")
    for (case,), group in _groups(rows, _case).items():
        cells = {row["provider"]: row for row in group}
        times = [_time(cells[name]) if name in cells else "" for name in providers]
        yield _line(case, *times, f"{cells['bnkern']['speedup']['best']:.2f}x")


def _phases(rows: list[dict]) -> Iterator[str]:
    yield "Least bytes by the formulas of benchmarks/traffic.py; the copy is of the same rounds."
    yield ""
    yield from _header("call", "case", "MB", "ms (p20 to p80)", "GB/s", "copy GB/s", "share of copy")
    groups = _groups(rows, lambda row: row["bench"], _case)
    for bench, case in sorted(groups, key=lambda key: CALLS.index(key[0])):
        ours, copy = groups[bench, case]
        fresh = ", fresh outputs" if ours["outputs"] == "fresh" else ""
        rates = f"{ours['gb_per_s']:.1f}", f"{copy['gb_per_s']:.1f}", f"{ours['share_of_copy']:.0%}"
        yield _line(bench, case, f"{ours['bytes'] / 1e6:.1f}", _time(ours) + fresh, *rates)


def _records(rows: list[dict]) -> Iterator[str]:
    yield "A call with all its records, in ms, median (p20 to p80), and how many times the same call without them."
    yield ""
    yield from _header("case", "ms", "without", "cost")
    for (case,), (ours, without) in _groups(rows, _case).items():
        yield _line(case, _time(ours), _time(without), f"{ours['cost']:.2f}x")


def _steps(rows: list[dict]) -> Iterator[str]:
    yield "A training step in milliseconds, median (p20 to p80)."
    yield ""
    yield from _header("network", "provider", "ms", "over the best eager step")
    for row in rows:
        speedup = f"{row['speedup']['best']:.2f}x" if "speedup" in row else ""
        yield _line(row["op"], row["provider"], _time(row), speedup)


_RENDER = {"Whole batch norms": _batch_norms, "Phases": _phases, "Training steps": _steps, "Records": _records}


def _targets(found: list[dict]) -> Iterator[str]:
    yield from _header("target", "asked", "measured", "cases", "")
    for target in found:
        verdict = "holds" if target["holds"] else "missed"
        yield _line(target["name"], f"{target['bar']:g}", f"{target['value']:.2f}", str(target["cases"]), verdict)


def _time(row: dict) -> str:
    if "missing" in row:
        return f"missing: {row['missing']}"
    error = f"; {max(row['error'].values()):.0e}" if "error" in row else ""
    return f"{row['median_ms']:.3g} ({row['p20_ms']:.3g} to {row['p80_ms']:.3g}){error}"


def _header(*names: str) -> list[str]:
    return [_line(*names), _line(*["---"] + ["---:"] * (len(names) - 1))]


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
