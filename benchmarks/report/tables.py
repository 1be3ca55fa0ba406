"""A results file as tables in Markdown, with one renderer for each kind of benchmark."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator

from benchmarks.tools.measurements import FUSED, PHASES

CALLS = (*PHASES, "forward", "backward")
WRONG = 10  # a result is called wrong if its error is more than this many times eager's


def markdown(results: dict) -> str:
    """All tables of a results file."""
    lines = list(environment(results))
    for title, table in sections(results):
        lines += [f"### {title}", "", *table, ""]
    return "\n".join(lines).rstrip() + "\n"


def sections(results: dict) -> Iterator[tuple[str, list[str]]]:
    """The title and the lines of each section."""
    for (table, mode), measurements in groups(results["rows"], _table, lambda m: m["mode"]).items():
        yield table + (f", {mode}" if mode != "call" else ""), list(_RENDER[table](measurements))
    if results["targets"]:
        yield "Targets", list(_targets(results["targets"]))


def _table(measurement: dict) -> str:
    named = {
        "batch_norm": "Whole batch norms",
        "overhead": "The fixed cost of a call",
        "host_time": "The host's part of a call on a GPU, launches left out",
        "conv2d": "Convolutions",
        "block": "Convolutions",
        "cudnn": "cuDNN's convolutions",
        "conv_norm": "Convolutions with batch norm inside",
        "step": "Training steps",
        "inference": "Inference",
        "loop": "Training steps of the loop",
        "graph": "Training steps of the loop as one CUDA graph",
        "compiled_graph": "Training steps as one CUDA graph, beside torch.compile",
        "replicas": "Several runs on one GPU",
        "models": "Converted models",
        "strategies": "Strategies",
        "optimizer": "The optimiser's update",
        "memory": "Memory of layers",
        "memory_of_networks": "Memory of networks",
        "augment": "Batches of images",
        "records": "Records",
        "conv_grad_signs": "Signs of a convolution's weight gradient",
        "channel_quantities": "Recording",
        "flight_recorder": "Recording",
        "weight_gradient_signs": "Recording",
        "recorded_graph": "Recording",
    }
    if "axis" in measurement:
        return "Growth"
    return "Recording" if "times" in measurement else named.get(measurement["bench"], "Phases")


def groups(measurements: list[dict], *keys: Callable[[dict], str]) -> dict[tuple, list[dict]]:
    """The measurements by the values of the keys, in the order of their first occurrence."""
    grouped = defaultdict(list)
    for measurement in measurements:
        grouped[tuple(key(measurement) for key in keys)].append(measurement)
    return grouped


def case_of(measurement: dict) -> str:
    """The operation, shape, layout and dtype of a measurement."""
    return f"{measurement['op']} {measurement['shape']} {measurement['layout']} {measurement['dtype']}"


def environment(results: dict) -> Iterator[str]:
    """The machine, the commit and the versions that were measured."""
    env = results["environment"]
    if results["quick"]:
        yield from ("This is a quick run. Its times have no meaning.", "")
    devices = [name for kind, name in env["devices"].items() if kind == "cpu" or ":" in kind]
    changed = " with uncommitted changes" if env["uncommitted changes"] else ""
    load = f"{env['load average at start']:.1f} at the start, {env['load average at end']:.1f} at the end"
    kernels = env["native module"].get("cpu kernels", "not built")
    yield f"Measured {env['date']} on {'; '.join(devices)}; load average {load};"
    yield f"commit {env['commit']}{changed}, backend {env['backend']} (native CPU kernels: {kernels}),"
    yield f"torch {env['versions']['torch']} ({env['torch isa']})."
    yield ""


def _batch_norms(measurements: list[dict]) -> Iterator[str]:
    errors = "; the largest relative error of y and the gradients against float64" if "error" in measurements[0] else ""
    yield f"Forward and backward in ms, median (p20 to p80){errors}."
    yield ""
    measurements = sorted(
        measurements, key=lambda m: m["op"] != FUSED
    )  # the fused operation first, because it has all providers
    available = {m["provider"] for m in measurements if "missing" not in m}
    providers = [name for name in dict.fromkeys(m["provider"] for m in measurements) if name in available]
    yield from header("case", *providers, "bnkern over the better eager form")
    for (case,), group in groups(measurements, case_of).items():
        cells = {m["provider"]: m for m in group}
        eager_error = max(cells["eager"].get("error", {"": math.inf}).values()) if "eager" in cells else math.inf
        times = [_time(cells[name], eager_error) if name in cells else "" for name in providers]
        speedup = cells["bnkern"].get("speedup", {}).get("best")
        yield line(case, *times, f"{speedup:.2f}x" if speedup else "")
    yield from _absent(measurements)


def _absent(measurements: list[dict]) -> Iterator[str]:
    """A line on the providers without any time, and the reasons."""
    available = {m["provider"] for m in measurements if "missing" not in m}
    absent = {m["provider"]: m["missing"] for m in measurements if m["provider"] not in available}
    if absent:
        yield ""
        yield "Missing: " + "; ".join(f"{name} ({why})" for name, why in absent.items()) + "."


def _phases(measurements: list[dict]) -> Iterator[str]:
    yield "MB is the minimum by the formulas of benchmarks/cases/traffic.py; the copy ran in the same rounds."
    yield ""
    yield from header("call", "case", "MB", "ms (p20 to p80)", "GB/s", "copy GB/s", "share of copy")
    pairs = groups(measurements, lambda m: m["bench"], case_of)
    for bench, case in sorted(pairs, key=lambda key: CALLS.index(key[0])):
        ours, copy = pairs[bench, case]
        fresh = ", fresh outputs" if ours.get("outputs") == "fresh" else ""
        rates = f"{ours['gb_per_s']:.1f}", f"{copy['gb_per_s']:.1f}", f"{ours['share_of_copy']:.0%}"
        yield line(bench, case, f"{ours['bytes'] / 1e6:.1f}", _time(ours) + fresh, *rates)


def _records(measurements: list[dict]) -> Iterator[str]:
    yield "A call with all its records in ms, median (p20 to p80); cost is its time over that of a call without."
    yield ""
    yield from header("case", "ms", "without", "cost")
    for (case,), (ours, without) in groups(measurements, case_of).items():
        yield line(case, _time(ours), _time(without), f"{ours['cost']:.2f}x")


def _steps(measurements: list[dict]) -> Iterator[str]:
    yield "In milliseconds, median (p20 to p80)."
    yield ""
    yield from header("network", "provider", "ms", "over the best eager form")
    for measurement in measurements:
        speedup = f"{measurement['speedup']['best']:.2f}x" if "speedup" in measurement else ""
        yield line(measurement["op"], measurement["provider"], _time(measurement), speedup)


def _graphs(measurements: list[dict]) -> Iterator[str]:
    yield "A replay in milliseconds, median (p20 to p80); thousands of training images a second."
    yield ""
    yield from header("network", "dtype", "provider", "ms", "1000 images/s", "over the best eager form")
    for measurement in measurements:
        rate = f"{measurement['images'] / measurement['median_ms']:.1f}" if "images" in measurement else ""
        speedup = f"{measurement['speedup']['best']:.2f}x" if "speedup" in measurement else ""
        yield line(measurement["op"], measurement["dtype"], measurement["provider"], _time(measurement), rate, speedup)


def _strategies(measurements: list[dict]) -> Iterator[str]:
    yield "In microseconds, medians."
    yield ""
    providers = list(dict.fromkeys(m["provider"] for m in measurements))
    yield from header("case", *providers)
    for (case,), group in groups(measurements, case_of).items():
        times = {m["provider"]: m for m in group}
        cells = [f"{1e3 * times[name]['median_ms']:.1f}" if "median_ms" in times[name] else "" for name in providers]
        yield line(case, *cells)


def _recording(measurements: list[dict]) -> Iterator[str]:
    yield "A training step in milliseconds, median (p20 to p80), and its time over that of the unprobed step."
    yield ""
    yield from header("what", "provider", "ms", "times unprobed")
    for measurement in measurements:
        base = "unprobed torch" if "torch" in measurement["provider"] else "unprobed"
        times = (_time(measurement), f"{measurement['times'][base]:.2f}x") if "times" in measurement else ("", "")
        yield line(measurement["op"], measurement["provider"], *times)
    yield from _absent(measurements)


def _batches(measurements: list[dict]) -> Iterator[str]:
    yield "A batch of images in milliseconds, median (p20 to p80); thousands of images a second."
    yield ""
    yield from header("case", "provider", "ms", "1000 images/s", "over the best eager form")
    for measurement in measurements:
        rate, speedup = "", ""
        if "speedup" in measurement:
            rate, speedup = (
                f"{measurement['images'] / measurement['median_ms']:.0f}",
                f"{measurement['speedup']['best']:.2f}x",
            )
        yield line(case_of(measurement), measurement["provider"], _time(measurement), rate, speedup)


def _grad_signs(measurements: list[dict]) -> Iterator[str]:
    yield "The requested sums in milliseconds, median (p20 to p80), and torch's weight gradient alone."
    yield ""
    yield from header(
        "case", "bnkern", "torch's gradient", "by identities", "over the gradient", "identities over bnkern"
    )
    for (case,), group in groups(measurements, case_of).items():
        ours, *peers = group
        ratios = ours["speedup"]
        over = f"{1 / ratios['eager gradient']:.2f}x", f"{ratios['eager identities']:.2f}x"
        yield line(case, _time(ours), *map(_time, peers), *over)


def _growth(measurements: list[dict]) -> Iterator[str]:
    yield "Forward and backward, or a training step, in ms, median (p20 to p80), as one axis grows, and the time over"
    yield "that of the previous size. For N, C and S the work grows by a factor of four."
    yield ""
    yield from header("axis", "value", "case", "provider", "ms", "over the previous size")
    curves = groups(measurements, lambda m: m["axis"], lambda m: m["layout"], lambda m: m["provider"])
    for (axis, _, provider), curve in curves.items():
        before = None
        for measurement in sorted(curve, key=lambda m: m["value"]):
            times = f"{measurement['median_ms'] / before:.2f}x" if before else ""
            yield line(axis, str(measurement["value"]), case_of(measurement), provider, _time(measurement), times)
            before = measurement["median_ms"]


def _layers(measurements: list[dict]) -> Iterator[str]:
    yield "Bytes that autograd keeps for the backward of the layer alone, per element of the input. In a network the"
    yield "next convolution keeps y as well, so that eager's ReLU, which also keeps y, needs no further memory."
    yield ""
    providers = list(dict.fromkeys(m["provider"] for m in measurements))
    yield from header("case", *providers)
    for (case,), group in groups(measurements, case_of).items():
        kept = {m["provider"]: f"{m['saved_bytes'] / math.prod(m['size']):.2f}" for m in group}
        yield line(case, *(kept.get(name, "") for name in providers))


def _networks(measurements: list[dict]) -> Iterator[str]:
    yield "MB that autograd keeps for the backward of a whole network, and the growth of memory to the peak of a"
    yield "training step; fp32, channels_last, each in a separate process."
    yield ""
    yield from header("network", "provider", "images", "kept", "peak")
    for measurement in measurements:
        images = " x ".join(map(str, measurement["size"]))
        cells = [measurement["missing"], ""] if "missing" in measurement else [
            f"{measurement[key] / 1e6:.0f}" for key in ("saved_bytes", "peak_bytes")
        ]  # fmt: skip
        yield line(measurement["op"], measurement["provider"], images, *cells)


_RENDER = {
    "Growth": _growth,
    "The optimiser's update": _steps,
    "Memory of layers": _layers,
    "Memory of networks": _networks,
    "Whole batch norms": _batch_norms,
    "The fixed cost of a call": _batch_norms,
    "The host's part of a call on a GPU, launches left out": _batch_norms,
    "Convolutions": _batch_norms,
    "cuDNN's convolutions": _strategies,
    "Convolutions with batch norm inside": _strategies,
    "Phases": _phases,
    "Training steps": _steps,
    "Inference": _steps,
    "Training steps of the loop": _steps,
    "Training steps of the loop as one CUDA graph": _graphs,
    "Training steps as one CUDA graph, beside torch.compile": _graphs,
    "Several runs on one GPU": _graphs,
    "Converted models": _steps,
    "Strategies": _strategies,
    "Recording": _recording,
    "Records": _records,
    "Batches of images": _batches,
    "Signs of a convolution's weight gradient": _grad_signs,
}


def _targets(targets: list[dict]) -> Iterator[str]:
    yield from header("target", "", "asked", "measured", "cases")
    for target in targets:
        verdict = "holds" if target["holds"] else "missed"
        yield line(target["name"], verdict, f"{target['bar']:g}", f"{target['value']:.2f}", str(target["cases"]))


def _time(measurement: dict, eager_error: float = math.inf) -> str:
    """The time and the largest error of a measurement, marked as wrong if the error is many times eager's."""
    if "missing" in measurement:
        return f"missing: {measurement['missing']}"
    error = max(measurement.get("error", {"": 0.0}).values())
    text = f"; {error:.0e}" if "error" in measurement else ""
    wrong = " **wrong**" if not error <= WRONG * eager_error else ""
    return f"{measurement['median_ms']:.3g} ({measurement['p20_ms']:.3g} to {measurement['p80_ms']:.3g}){text}{wrong}"


def header(*names: str) -> list[str]:
    """The head of a table whose columns after the first are numbers."""
    return [line(*names), line(*["---"] + ["---:"] * (len(names) - 1))]


def line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
