"""Two results files against each other: what became slower or faster, beyond what noise explains.

The same case in two runs is two medians, each with the range p20 to p80 of its rounds. Two runs also meet another
machine each: other processes, clocks, caches. Peers tell: their code is the same in both runs, so what their median
changed by in a case is the machine's doing (``drift``), and ours is divided by it. What is left of the peers' own
changes, each divided by what the others of its case changed by, is how far two runs of the same code lie apart: the
``noise``, as the factor that 95 % of them stay within. A row counts as changed where its ranges do not overlap, and its
medians lie further apart than the noise, and than LEAST.
"""

from collections.abc import Iterator
from statistics import median
from typing import NamedTuple

import numpy as np

from benchmarks.report.tables import case_of, header, line
from benchmarks.tools.measurements import key

LEAST = 1.03
WITHIN = 0.95
# Rows whose code is none of ours.
PEERS = ("eager", "compile", "copy", "hooks on torch", "unprobed torch", "inplace_abn", "attorch", "FlagGems", "Apex")


class Change(NamedTuple):
    """One row in both runs."""

    row: dict  # the new one
    times: float  # the new median over the old one, without drift
    drift: float  # the machine's, by the peers of the same case; 1 where there are none
    apart: bool  # the ranges

    @property
    def is_peer(self) -> bool:
        return self.row["provider"].startswith(PEERS)

    @property
    def factor(self) -> float:
        """How far the medians lie apart, in either direction."""
        return max(self.times, 1 / self.times)

    def beyond(self, noise: float) -> bool:
        """Whether this is a change."""
        return self.apart and self.factor > max(noise, LEAST)


def compare(old: dict, new: dict) -> tuple[list[Change], float]:
    """Every row that both files have measured, and the noise (1 where there are no peers to tell)."""
    before, after = ({key(row): row for row in results["rows"] if "median_ms" in row} for results in (old, new))
    same_peers = old["environment"]["versions"]["torch"] == new["environment"]["versions"]["torch"]
    ratios: dict[tuple, dict[str, float]] = {}
    for *case, provider in before.keys() & after.keys():
        if same_peers and provider.startswith(PEERS):
            was, now = (rows[*case, provider]["median_ms"] for rows in (before, after))
            ratios.setdefault(tuple(case), {})[provider] = now / was
    changes = []
    for (*case, provider), row in after.items():
        if (*case, provider) in before:
            others = [ratio for peer, ratio in ratios.get(tuple(case), {}).items() if peer != provider]
            changes.append(_change(before[*case, provider], row, median(others) if others else 1.0))
    control = [change.factor for change in changes if change.is_peer and same_peers]
    return changes, float(np.quantile(control, WITHIN)) if control else 1.0


def _change(old: dict, new: dict, drift: float) -> Change:
    apart = new["p20_ms"] / drift > old["p80_ms"] or new["p80_ms"] / drift < old["p20_ms"]
    return Change(new, new["median_ms"] / old["median_ms"] / drift, drift, apart)


def markdown(old: dict, new: dict) -> Iterator[str]:
    """What the comparison says, in words and a table of what changed."""
    changes, noise = compare(old, new)
    ours = [change for change in changes if not change.is_peer]
    beyond = sorted((change for change in ours if change.beyond(noise)), key=lambda change: -change.times)
    slower = sum(change.times > 1 for change in beyond)
    yield f"Against {_run(old)}; this is {_run(new)}."
    if old["environment"]["devices"] != new["environment"]["devices"]:
        yield "**The machines differ.** Changes may be theirs."
    yield f"Of {len(ours)} rows of ours in both, {slower} became slower and {len(beyond) - slower} faster beyond"
    yield f"the noise. That is a factor of {noise:.2f}: within it lie {WITHIN:.0%} of the {len(changes) - len(ours)}"
    yield "rows of peers, whose code is the same, when what the others of their case changed by is taken out."
    gone = len({key(row) for row in old["rows"]} - {key(row) for row in new["rows"]})
    if gone:
        yield f"{gone} rows of the old file are not in the new one."
    yield ""
    if beyond:
        yield from header("row", "times the old", "ms, was", "ms", "drift", "")
        before = {key(row): row for row in old["rows"]}
        for c in beyond:
            was = before[key(c.row)]["median_ms"]
            name = f"{c.row['bench']} {case_of(c.row)}, {c.row['provider']}"
            verdict = "slower" if c.times > 1 else "faster"
            yield line(name, f"{c.times:.2f}", f"{was:.3g}", f"{c.row['median_ms']:.3g}", f"{c.drift:.2f}", verdict)


def _run(results: dict) -> str:
    found = results["environment"]
    changed = " with uncommitted changes" if found["uncommitted changes"] else ""
    return f"{found['date'][:10]}, commit {found['commit'][:10]}{changed}"
