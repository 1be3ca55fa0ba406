"""The rule of a device for one kernel or two (bnkern/backends/cuda.py), from the measurements of bench_strategies.py.

The rule is one size: a tensor of at least so many bytes is served by one kernel. It is the size with the least loss
over all measured calls: forward and backward, both layouts, warm and cold. The loss of a call is its time by the rule
over the time of its faster strategy, and losses are joined by their geometric mean. A loss well above 1 means that one
size is not enough, and that the rule should depend on the layout or the call too.

The table also has the number of clusters that the device runs at once, so that the bits of its results do not depend on
a query.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import geometric_mean
from typing import NamedTuple

from benchmarks import ROOT
from benchmarks.cases.strategies import NEVER, ONE, TWO

TABLE = ROOT / "bnkern" / "backends" / "cuda_rules.json"


class Pair(NamedTuple):
    """One call by both strategies."""

    size: int  # bytes of one tensor
    one: float
    two: float
    name: str


class Rule(NamedTuple):
    single_read_from: int
    loss: float
    pairs: list[Pair]


def pairs(measurements: Iterable[dict]) -> list[Pair]:
    """The calls of which both strategies were measured in a graph."""
    times: dict[tuple, dict[str, dict]] = {}
    for m in measurements:
        if m["bench"] == "strategies" and m["mode"] == "graph" and "median_ms" in m:
            times.setdefault((m["op"], m["shape"], m["layout"], m["dtype"]), {})[m["provider"]] = m
    return [
        Pair(both[ONE]["tensor_bytes"], both[ONE]["median_ms"], both[TWO]["median_ms"], " ".join(case))
        for case, both in times.items()
        if {ONE, TWO} <= both.keys()
    ]


def loss(single_read_from: int, measured: list[Pair]) -> float:
    return geometric_mean((p.one if p.size >= single_read_from else p.two) / min(p.one, p.two) for p in measured)


def best(measured: list[Pair]) -> Rule:
    """The rule with the least loss. Of equal ones it is the smallest size."""
    sizes = [0, *sorted({p.size for p in measured})[1:], NEVER]
    return min((Rule(size, loss(size, measured), measured) for size in sizes), key=lambda rule: rule.loss)


def table_with(model: str, rule: Rule, source: str, clusters: Sequence[int] | None, table: Path = TABLE) -> str:
    """The text of the committed table with the rule of a device model, and its number of clusters if it is known."""
    others = json.loads(table.read_text())
    entry = {
        "single_read_from": rule.single_read_from,
        "source": f"{source}: {len(rule.pairs)} calls, {rule.loss:.3f} times the time of each call's faster strategy",
        "clusters": clusters,
    }
    return json.dumps(dict(sorted((others | {model: entry}).items())), indent=1) + "\n"
