"""Measurements: one provider in one case each. The targets of the design, and the results file.

A measurement is a dictionary with these entries:

- the labels ``bench op shape layout dtype size tensor_bytes mode provider``;
- the times ``median_ms p20_ms p80_ms rounds``;
- ``speedup`` over each eager form, and over the fastest of them as "best";
- ``times`` for a step that records: its time over that of each unprobed step;
- ``bytes`` (the minimum) and ``phased_bytes`` where they are known, and ``gb_per_s`` and ``share_of_copy``, both
  computed from ``bytes``;
- ``error`` for whole batch norms and convolutions, relative to float64;
- ``cost`` for records: the time over that of the same call without records;
- ``images`` for batches of images: their number.

A provider that is not available has the entry ``missing``, the reason, in place of the times. In the results file the
list of measurements is called "rows".
"""

import json
from collections.abc import Callable, Iterable
from statistics import geometric_mean

from benchmarks.tools.timing import CACHED_BYTES, Comparison

FORMAT = 1  # of the results file
PHASES = ("moments", "normalize", "grad_sums", "grad_input")
FUSED = "bn_add_relu"


def measured(comparison: Comparison, name: str, moved: Callable[[str], dict]) -> dict:
    """The measured part of a measurement. ``moved(name)`` returns the "bytes" of a call and related entries."""
    measurement = comparison.summary(name)._asdict()
    eager = [other for other in comparison.samplers if other.startswith("eager")]
    if eager:
        measurement["speedup"] = {other: comparison.ratio(other, name) for other in eager}
        best = min(eager, key=lambda other: comparison.summary(other).median_ms)
        measurement["speedup"]["best"] = measurement["speedup"][best]
    if "without records" in comparison.samplers:
        measurement["cost"] = comparison.ratio(name, "without records")
    measurement |= moved(name)
    for base in (other for other in comparison.samplers if other.startswith("unprobed")):
        measurement.setdefault("times", {})[base] = 1 / comparison.ratio(base, name)
    if "bytes" in measurement:
        measurement["gb_per_s"] = measurement["bytes"] / measurement["median_ms"] / 1e6
    if "copy" in comparison.samplers:
        measurement["share_of_copy"] = measurement["bytes"] / moved("copy")["bytes"] * comparison.ratio("copy", name)
    return measurement


def targets(measurements: list[dict]) -> list[dict]:
    """The targets of the design for two CPU cores that were measured: the value, and whether the target holds."""
    results = []

    def judge(name: str, bar: float, values: Iterable[float], combine: Callable, at_most: bool = False) -> None:
        values = list(values)
        if values:
            value = combine(values)
            holds = value <= bar if at_most else value >= bar
            results.append({"name": name, "bar": bar, "value": value, "cases": len(values), "holds": holds})

    ours = [m for m in measurements if m["provider"].startswith("bnkern") and m["mode"] == "call"]
    compared = [m for m in ours if "speedup" in m]  # only if an eager form was measured
    for op, mean_bar, least_bar in ((FUSED, 4.0, 1.5), ("bn", 1.5, 1.0)):
        speedups = [m["speedup"] for m in compared if m["bench"] == "batch_norm" and m["op"] == op]
        for form in speedups[0] if speedups else ():
            over = f"{op} forward + backward over {'the better eager form' if form == 'best' else form}"
            judge(f"{over}, geometric mean", mean_bar, (s[form] for s in speedups), geometric_mean)
            judge(f"{over}, slowest case", least_bar, (s[form] for s in speedups), min)
    overhead = [m["speedup"]["best"] for m in compared if m["bench"] == "overhead"]
    judge("fixed cost of a fused call over the better eager form, slowest case", 1.0, overhead, min)
    for phase in PHASES:
        large = [m for m in ours if m["bench"] == phase and m["tensor_bytes"] > CACHED_BYTES]
        judge(f"{phase} past the caches, share of copy bandwidth, least", 0.8, (r["share_of_copy"] for r in large), min)
    for depth in (20, 110):  # both sides in their better layout
        steps = [r["speedup"]["best"] for r in compared if (r["bench"], r["op"]) == ("step", f"resnet{depth}")]
        judge(f"ResNet-{depth} training step over eager in its better layout", 1.2, steps and [max(steps)], max)
    times = {m["provider"]: m["times"] for m in measurements if "times" in m}
    for provider, bar in (
        ("recorded", 1.05),
        ("recorded: norm_gradient_noise", 1.05),
        ("recorded: sum and abs_sum", 1.35),
        ("recorded: all four sums", 1.6),
        ("recorded: signs and counts", 1.15),
    ):
        quantity = provider.removeprefix("recorded").removeprefix(": ") or "all channel quantities"
        cost = [times[provider]["unprobed"]] if provider in times else []
        judge(f"{quantity} at every layer, step over the unprobed one, at most", bar, cost, max, at_most=True)
    if "hooks on torch" in times:
        hooks, ours = times["hooks on torch"]["unprobed torch"] - 1, times["recorded"]["unprobed"] - 1
        judge("overhead of hooks over that of recording", 10, [hooks / max(ours, 1e-3)], max)
    return results


# ------------------------------------------------------------------------------------------------------- the file


def key(measurement: dict) -> tuple[str, ...]:
    """The entries that identify a measurement in several files."""
    return tuple(measurement[name] for name in ("bench", "op", "shape", "layout", "dtype", "mode", "provider"))


def merged(parts: list[dict]) -> dict:
    """The files of one machine and commit as one. The last file wins. Raises ValueError if machine or commit differ."""
    first = parts[0]
    for part in parts[1:]:
        for name in ("commit", "devices", "versions", "threads", "native module"):
            if part["environment"][name] != first["environment"][name]:
                raise ValueError(
                    f"the files differ in {name}: {first['environment'][name]}, {part['environment'][name]}"
                )
    measurements = {key(m): m for part in parts for m in part["rows"]}
    result = first | {"rows": list(measurements.values()), "quick": any(part["quick"] for part in parts)}
    result["environment"] = first["environment"] | {
        "uncommitted changes": any(part["environment"]["uncommitted changes"] for part in parts),
        "load average at end": parts[-1]["environment"]["load average at end"],
    }
    return with_targets(result)


def with_targets(results: dict) -> dict:
    """The results with their targets judged again. The targets are stated for two CPU cores."""
    stated = results["environment"]["device"] == "cpu" and not results["quick"]
    return results | {"targets": targets(results["rows"]) if stated else []}


def dump(results: dict) -> str:
    """The file's text, with one line for each measurement, so that a diff of two files is readable."""
    measurements = ",\n  ".join(json.dumps(m) for m in results["rows"])
    rest = json.dumps({name: value for name, value in results.items() if name != "rows"}, indent=1)
    return f'{rest[:-2]},\n "rows": [\n  {measurements}\n ]\n}}\n'
