"""A results file as tables in Markdown: one renderer for each kind of benchmark."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator

from benchmarks.tools.measurements import FUSED, PHASES

CALLS = (*PHASES, "forward", "backward")
WRONG = 10  # times eager's error


def markdown(results: dict) -> str:
    """All tables of a results file."""
    lines = list(environment(results))
    for title, table in sections(results):
        lines += [f"### {title}", "", *table, ""]
    return "\n".join(lines).rstrip() + "\n"


def sections(results: dict) -> Iterator[tuple[str, list[str]]]:
    """Titles and the lines under them."""
    for (table, mode), rows in groups(results["rows"], _table, lambda row: row["mode"]).items():
        yield table + (f", {mode}" if mode != "call" else ""), list(_RENDER[table](rows))
    if results["targets"]:
        yield "Targets", list(_targets(results["targets"]))


def _table(row: dict) -> str:
    named = {
        "batch_norm": "Whole batch norms",
        "overhead": "The fixed cost of a call",
        "host_time": "The host's part of a call on a GPU, launches left out",
        "conv2d": "Convolutions",
        "step": "Training steps",
        "loop": "Training steps of the loop",
        "graph": "Training steps of the loop as one CUDA graph",
        "replicas": "Several runs on one GPU",
        "models": "Converted models",
        "strategies": "Strategies",
        "optimizer": "The optimiser's update",
        "memory": "Memory of layers",
        "memory_of_networks": "Memory of networks",
        "augment": "Batches of images",
        "records": "Records",
        "conv_grad_signs": "Signs of a convolution's weight gradient",
    }
    if "axis" in row:
        return "Growth"
    return "Recording" if "times" in row else named.get(row["bench"], "Phases")


def groups(rows: list[dict], *keys: Callable[[dict], str]) -> dict[tuple, list[dict]]:
    """The rows by what the keys give, in the order that these come first."""
    found = defaultdict(list)
    for row in rows:
        found[tuple(key(row) for key in keys)].append(row)
    return found


def case_of(row: dict) -> str:
    """Operation, shape, layout and dtype."""
    return f"{row['op']} {row['shape']} {row['layout']} {row['dtype']}"


def environment(results: dict) -> Iterator[str]:
    """Where and of what the rows were measured."""
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
    errors = "; the largest relative error of y and the gradients against float64" if "error" in rows[0] else ""
    yield f"Forward and backward in ms, median (p20 to p80){errors}."
    yield ""
    rows = sorted(rows, key=lambda row: row["op"] != FUSED)  # the fused operation first, and it has all providers
    there = {row["provider"] for row in rows if "missing" not in row}
    providers = [name for name in dict.fromkeys(row["provider"] for row in rows) if name in there]
    yield from header("case", *providers, "bnkern over the better eager form")
    for (case,), group in groups(rows, case_of).items():
        cells = {row["provider"]: row for row in group}
        trusted = max(cells["eager"].get("error", {"": math.inf}).values()) if "eager" in cells else math.inf
        times = [_time(cells[name], trusted) if name in cells else "" for name in providers]
        speedup = cells["bnkern"].get("speedup", {}).get("best")
        yield line(case, *times, f"{speedup:.2f}x" if speedup else "")
    absent = {row["provider"]: row["missing"] for row in rows if row["provider"] not in there}
    if absent:
        yield ""
        yield "Missing: " + "; ".join(f"{name} ({why})" for name, why in absent.items()) + "."


def _phases(rows: list[dict]) -> Iterator[str]:
    yield "Least bytes by the formulas of benchmarks/cases/traffic.py; the copy is of the same rounds."
    yield ""
    yield from header("call", "case", "MB", "ms (p20 to p80)", "GB/s", "copy GB/s", "share of copy")
    pairs = groups(rows, lambda row: row["bench"], case_of)
    for bench, case in sorted(pairs, key=lambda key: CALLS.index(key[0])):
        ours, copy = pairs[bench, case]
        fresh = ", fresh outputs" if ours.get("outputs") == "fresh" else ""
        rates = f"{ours['gb_per_s']:.1f}", f"{copy['gb_per_s']:.1f}", f"{ours['share_of_copy']:.0%}"
        yield line(bench, case, f"{ours['bytes'] / 1e6:.1f}", _time(ours) + fresh, *rates)


def _records(rows: list[dict]) -> Iterator[str]:
    yield "A call with all its records, in ms, median (p20 to p80), and how many times the same call without them."
    yield ""
    yield from header("case", "ms", "without", "cost")
    for (case,), (ours, without) in groups(rows, case_of).items():
        yield line(case, _time(ours), _time(without), f"{ours['cost']:.2f}x")


def _steps(rows: list[dict]) -> Iterator[str]:
    yield "In milliseconds, median (p20 to p80)."
    yield ""
    yield from header("network", "provider", "ms", "over the best eager one")
    for row in rows:
        speedup = f"{row['speedup']['best']:.2f}x" if "speedup" in row else ""
        yield line(row["op"], row["provider"], _time(row), speedup)


def _graphs(rows: list[dict]) -> Iterator[str]:
    yield "A replay in milliseconds, median (p20 to p80); thousands of training images a second."
    yield ""
    yield from header("network", "dtype", "provider", "ms", "1000 images/s", "over the best eager one")
    for row in rows:
        rate = f"{row['images'] / row['median_ms']:.1f}" if "images" in row else ""
        speedup = f"{row['speedup']['best']:.2f}x" if "speedup" in row else ""
        yield line(row["op"], row["dtype"], row["provider"], _time(row), rate, speedup)


def _strategies(rows: list[dict]) -> Iterator[str]:
    yield "In microseconds, medians."
    yield ""
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    yield from header("case", *providers)
    for (case,), group in groups(rows, case_of).items():
        times = {row["provider"]: row for row in group}
        cells = [f"{1e3 * times[name]['median_ms']:.1f}" if "median_ms" in times[name] else "" for name in providers]
        yield line(case, *cells)


def _recording(rows: list[dict]) -> Iterator[str]:
    yield "A training step in milliseconds, median (p20 to p80), and how many times the unprobed step's it takes."
    yield ""
    yield from header("what", "provider", "ms", "times unprobed")
    for row in rows:
        base = "unprobed torch" if "torch" in row["provider"] else "unprobed"
        yield line(row["op"], row["provider"], _time(row), f"{row['times'][base]:.2f}x")


def _batches(rows: list[dict]) -> Iterator[str]:
    yield "A batch of images in milliseconds, median (p20 to p80); thousands of images a second."
    yield ""
    yield from header("case", "provider", "ms", "1000 images/s", "over the best eager form")
    for row in rows:
        rate, speedup = "", ""
        if "speedup" in row:
            rate, speedup = f"{row['images'] / row['median_ms']:.0f}", f"{row['speedup']['best']:.2f}x"
        yield line(case_of(row), row["provider"], _time(row), rate, speedup)


def _grad_signs(rows: list[dict]) -> Iterator[str]:
    yield "What is wanted, in milliseconds, median (p20 to p80); beside torch's weight gradient alone."
    yield ""
    yield from header(
        "case", "bnkern", "torch's gradient", "by identities", "over the gradient", "identities over bnkern"
    )
    for (case,), group in groups(rows, case_of).items():
        ours, *peers = group
        ratios = ours["speedup"]
        over = f"{1 / ratios['eager gradient']:.2f}x", f"{ratios['eager identities']:.2f}x"
        yield line(case, _time(ours), *map(_time, peers), *over)


def _growth(rows: list[dict]) -> Iterator[str]:
    yield "Forward and backward, or a training step, in ms, median (p20 to p80), as one axis grows; and how many times"
    yield "the step before it: in proportion to the work, four times for N, C and S."
    yield ""
    yield from header("axis", "value", "case", "provider", "ms", "times the one before")
    curves = groups(rows, lambda r: r["axis"], lambda r: r["layout"], lambda r: r["provider"])
    for (axis, _, provider), curve in curves.items():
        before = None
        for row in sorted(curve, key=lambda r: r["value"]):
            times = f"{row['median_ms'] / before:.2f}x" if before else ""
            yield line(axis, str(row["value"]), case_of(row), provider, _time(row), times)
            before = row["median_ms"]


def _layers(rows: list[dict]) -> Iterator[str]:
    yield "Bytes that autograd keeps for the backward of the layer alone, for each element of the input. In a network"
    yield "the next convolution keeps y as well, and what eager's ReLU keeps of it costs nothing more."
    yield ""
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    yield from header("case", *providers)
    for (case,), group in groups(rows, case_of).items():
        kept = {row["provider"]: f"{row['saved_bytes'] / math.prod(row['size']):.2f}" for row in group}
        yield line(case, *(kept.get(name, "") for name in providers))


def _networks(rows: list[dict]) -> Iterator[str]:
    yield "MB that autograd keeps for the backward of a whole network, and the peak of a training step beyond what is"
    yield "held before it; fp32, channels_last, each in a process of its own."
    yield ""
    yield from header("network", "provider", "images", "kept", "peak")
    for row in rows:
        images = " x ".join(map(str, row["size"]))
        cells = [row["missing"], ""] if "missing" in row else [
            f"{row[key] / 1e6:.0f}" for key in ("saved_bytes", "peak_bytes")
        ]  # fmt: skip
        yield line(row["op"], row["provider"], images, *cells)


_RENDER = {
    "Growth": _growth,
    "The optimiser's update": _steps,
    "Memory of layers": _layers,
    "Memory of networks": _networks,
    "Whole batch norms": _batch_norms,
    "The fixed cost of a call": _batch_norms,
    "The host's part of a call on a GPU, launches left out": _batch_norms,
    "Convolutions": _batch_norms,
    "Phases": _phases,
    "Training steps": _steps,
    "Training steps of the loop": _steps,
    "Training steps of the loop as one CUDA graph": _graphs,
    "Several runs on one GPU": _graphs,
    "Converted models": _steps,
    "Strategies": _strategies,
    "Recording": _recording,
    "Records": _records,
    "Batches of images": _batches,
    "Signs of a convolution's weight gradient": _grad_signs,
}


def _targets(found: list[dict]) -> Iterator[str]:
    yield from header("target", "", "asked", "measured", "cases")
    for target in found:
        verdict = "holds" if target["holds"] else "missed"
        yield line(target["name"], verdict, f"{target['bar']:g}", f"{target['value']:.2f}", str(target["cases"]))


def _time(row: dict, trusted: float = math.inf) -> str:
    """A row's time, and its largest error, called wrong where it is many times the trusted one."""
    if "missing" in row:
        return f"missing: {row['missing']}"
    error = max(row.get("error", {"": 0.0}).values())
    said = f"; {error:.0e}" if "error" in row else ""
    wrong = " **wrong**" if not error <= WRONG * trusted else ""
    return f"{row['median_ms']:.3g} ({row['p20_ms']:.3g} to {row['p80_ms']:.3g}){said}{wrong}"


def header(*names: str) -> list[str]:
    """The head of a table whose columns after the first are numbers."""
    return [line(*names), line(*["---"] + ["---:"] * (len(names) - 1))]


def line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
