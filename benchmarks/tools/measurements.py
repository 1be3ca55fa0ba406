"""From times to rows, and what the design asks of them.

A row is one provider in one case: the labels ``bench op shape layout dtype size tensor_bytes mode provider``; the
times ``median_ms p20_ms p80_ms rounds``; ``speedup`` over each eager form, and over the fastest of them as "best";
``times`` the unprobed steps, for steps that record;
where bytes are known ``bytes`` (the least) and ``phased_bytes``, and by the least ``gb_per_s`` and ``share_of_copy``;
for whole batch norms and convolutions ``error``, relative to float64; for records ``cost``, times the same call
without; for batches of images ``images``, how many. A provider that could not be had has ``missing`` instead: why.
"""

import json
from collections.abc import Callable, Iterable
from statistics import geometric_mean

from benchmarks.tools.timing import CACHED_BYTES, Comparison

FORMAT = 1  # of the results file
PHASES = ("moments", "normalize", "grad_sums", "grad_input")
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
    for base in (other for other in comparison.samplers if other.startswith("unprobed")):
        row.setdefault("times", {})[base] = 1 / comparison.ratio(base, name)
    if "bytes" in row:
        row["gb_per_s"] = row["bytes"] / row["median_ms"] / 1e6
    if "copy" in comparison.samplers:
        row["share_of_copy"] = row["bytes"] / moved("copy")["bytes"] * comparison.ratio("copy", name)
    return row


def targets(rows: list[dict]) -> list[dict]:
    """What the design asks for on two CPU cores, what was measured, and whether it holds. Only the measured ones."""
    found = []

    def ask(name: str, bar: float, values: Iterable[float], combine: Callable, at_most: bool = False) -> None:
        values = list(values)
        if values:
            value = combine(values)
            holds = value <= bar if at_most else value >= bar
            found.append({"name": name, "bar": bar, "value": value, "cases": len(values), "holds": holds})

    ours = [row for row in rows if row["provider"].startswith("bnkern") and row["mode"] == "call"]
    against = [row for row in ours if "speedup" in row]  # not where all eager forms are missing
    for op, mean_bar, least_bar in ((FUSED, 4.0, 1.5), ("bn", 1.5, 1.0)):
        speedups = [row["speedup"] for row in against if row["bench"] == "batch_norm" and row["op"] == op]
        for form in speedups[0] if speedups else ():
            over = f"{op} forward + backward over {'the better eager form' if form == 'best' else form}"
            ask(f"{over}, geometric mean", mean_bar, (s[form] for s in speedups), geometric_mean)
            ask(f"{over}, slowest case", least_bar, (s[form] for s in speedups), min)
    overhead = [row["speedup"]["best"] for row in against if row["bench"] == "overhead"]
    ask("fixed cost of a fused call over the better eager form, slowest case", 1.0, overhead, min)
    for phase in PHASES:
        large = [row for row in ours if row["bench"] == phase and row["tensor_bytes"] > CACHED_BYTES]
        ask(f"{phase} past the caches, share of copy bandwidth, least", 0.8, (r["share_of_copy"] for r in large), min)
    for depth in (20, 110):  # ours, too, in its better layout
        steps = [r["speedup"]["best"] for r in against if (r["bench"], r["op"]) == ("step", f"resnet{depth}")]
        ask(f"ResNet-{depth} training step over eager in its better layout", 1.2, steps and [max(steps)], max)
    times = {row["provider"]: row["times"] for row in rows if "times" in row}
    for provider, bar in (
        ("recorded", 1.05),
        ("recorded: sum and abs_sum", 1.35),
        ("recorded: all four sums", 1.6),
        ("recorded: signs and counts", 1.15),
    ):
        what = provider.removeprefix("recorded").removeprefix(": ") or "all channel quantities"
        cost = [times[provider]["unprobed"]] if provider in times else []
        ask(f"{what} at every layer, step over the unprobed one, at most", bar, cost, max, at_most=True)
    if "hooks on torch" in times:
        hooks, ours = times["hooks on torch"]["unprobed torch"] - 1, times["recorded"]["unprobed"] - 1
        ask("overhead of hooks over that of recording", 10, [hooks / max(ours, 1e-3)], max)
    return found


# ------------------------------------------------------------------------------------------------------- the file


def key(row: dict) -> tuple[str, ...]:
    """What makes a row the same row in two files."""
    return tuple(row[name] for name in ("bench", "op", "shape", "layout", "dtype", "mode", "provider"))


def merged(parts: list[dict]) -> dict:
    """Files of one machine and commit as one; of a row that several have, the last. ValueError where they differ."""
    first = parts[0]
    for part in parts[1:]:
        for what in ("commit", "devices", "versions", "threads", "native module"):
            if part["environment"][what] != first["environment"][what]:
                raise ValueError(
                    f"the files differ in {what}: {first['environment'][what]}, {part['environment'][what]}"
                )
    found = {key(row): row for part in parts for row in part["rows"]}
    together = first | {"rows": list(found.values()), "quick": any(part["quick"] for part in parts)}
    together["environment"] = first["environment"] | {
        "uncommitted changes": any(part["environment"]["uncommitted changes"] for part in parts),
        "load average at end": parts[-1]["environment"]["load average at end"],
    }
    return with_targets(together)


def with_targets(results: dict) -> dict:
    """The same with its targets judged anew. They are stated for two CPU cores."""
    stated = results["environment"]["device"] == "cpu" and not results["quick"]
    return results | {"targets": targets(results["rows"]) if stated else []}


def dump(results: dict) -> str:
    """The file's text: a line for each row, so that two files can be told apart by eye."""
    rows = ",\n  ".join(json.dumps(row) for row in results["rows"])
    rest = json.dumps({name: value for name, value in results.items() if name != "rows"}, indent=1)
    return f'{rest[:-2]},\n "rows": [\n  {rows}\n ]\n}}\n'
