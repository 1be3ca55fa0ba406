"""Compares two results files: which measurements became slower or faster by more than the noise.

A case has a median in each run, and a range p20 to p80 of its rounds. The state of the machine also differs between two
runs: other processes, clocks and caches. The code of the peers is the same in both runs. So the median change of the
peers of a case is attributed to the machine (``drift``), and the change of each measurement is divided by it. The
change of each peer is divided by that of the other peers of its case. What remains is the difference between two runs
of the same code. The ``noise`` is the factor that 95 % of these remainders stay within. A measurement counts as changed
if its two ranges do not overlap and its medians differ by more than the noise and by more than LEAST.
"""

from collections.abc import Iterator
from statistics import median
from typing import NamedTuple

import numpy as np

from benchmarks.report.tables import case_of, header, line
from benchmarks.tools.measurements import key

LEAST = 1.03
WITHIN = 0.95
# Providers whose code is not part of bnkern, by the start of their names.
PEERS = ("eager", "compile", "copy", "hooks on torch", "unprobed torch", "inplace_abn", "attorch", "FlagGems", "Apex")


class Change(NamedTuple):
    """One measurement in both runs."""

    measurement: dict  # of the new run
    times: float  # the new median over the old one, without drift
    drift: float  # the median change of the peers of the same case; 1 without peers
    disjoint: bool  # whether the ranges do not overlap

    @property
    def is_peer(self) -> bool:
        return self.measurement["provider"].startswith(PEERS)

    @property
    def factor(self) -> float:
        """The change as a factor of at least 1, in either direction."""
        return max(self.times, 1 / self.times)

    def beyond(self, noise: float) -> bool:
        """Whether the measurement counts as changed."""
        return self.disjoint and self.factor > max(noise, LEAST)


def compare(old: dict, new: dict) -> tuple[list[Change], float]:
    """Every measurement with a time in both files, and the noise (1 without peers)."""
    before, after = ({key(m): m for m in results["rows"] if "median_ms" in m} for results in (old, new))
    same_peers = old["environment"]["versions"]["torch"] == new["environment"]["versions"]["torch"]
    ratios: dict[tuple, dict[str, float]] = {}
    for *case, provider in before.keys() & after.keys():
        if same_peers and provider.startswith(PEERS):
            old_ms, new_ms = (measurements[*case, provider]["median_ms"] for measurements in (before, after))
            ratios.setdefault(tuple(case), {})[provider] = new_ms / old_ms
    changes = []
    for (*case, provider), measurement in after.items():
        if (*case, provider) in before:
            others = [ratio for peer, ratio in ratios.get(tuple(case), {}).items() if peer != provider]
            changes.append(_change(before[*case, provider], measurement, median(others) if others else 1.0))
    control = [change.factor for change in changes if change.is_peer and same_peers]
    return changes, float(np.quantile(control, WITHIN)) if control else 1.0


def _change(old: dict, new: dict, drift: float) -> Change:
    disjoint = new["p20_ms"] / drift > old["p80_ms"] or new["p80_ms"] / drift < old["p20_ms"]
    return Change(new, new["median_ms"] / old["median_ms"] / drift, drift, disjoint)


def markdown(old: dict, new: dict) -> Iterator[str]:
    """The comparison in sentences, and a table of the changes."""
    changes, noise = compare(old, new)
    ours = [change for change in changes if not change.is_peer]
    beyond = sorted((change for change in ours if change.beyond(noise)), key=lambda change: -change.times)
    slower = sum(change.times > 1 for change in beyond)
    yield f"Compared with {_run(old)}; this is {_run(new)}."
    if old["environment"]["devices"] != new["environment"]["devices"]:
        yield "**The machines differ.** This may explain the changes."
    yield f"Of {len(ours)} measurements of bnkern in both files, {slower} became slower and"
    yield f"{len(beyond) - slower} faster beyond the noise, a factor of {noise:.2f}. Of the {len(changes) - len(ours)}"
    yield f"measurements of peers, whose code is the same, {WITHIN:.0%} changed by less, after division by the change"
    yield "of the other peers of their case."
    missing = len({key(m) for m in old["rows"]} - {key(m) for m in new["rows"]})
    if missing:
        yield f"{missing} measurements of the old file are not in the new file."
    yield ""
    if beyond:
        yield from header("measurement", "new over old", "ms, old", "ms, new", "drift", "")
        before = {key(m): m for m in old["rows"]}
        for c in beyond:
            old_ms = before[key(c.measurement)]["median_ms"]
            name = f"{c.measurement['bench']} {case_of(c.measurement)}, {c.measurement['provider']}"
            verdict = "slower" if c.times > 1 else "faster"
            yield line(
                name, f"{c.times:.2f}", f"{old_ms:.3g}", f"{c.measurement['median_ms']:.3g}", f"{c.drift:.2f}", verdict
            )


def _run(results: dict) -> str:
    environment = results["environment"]
    changed = " with uncommitted changes" if environment["uncommitted changes"] else ""
    return f"{environment['date'][:10]}, commit {environment['commit'][:10]}{changed}"
