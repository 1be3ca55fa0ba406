"""Two results files against each other: what became slower or faster, beyond what noise explains.

The same case in two runs is two medians, each with the range p20 to p80 of its rounds. Two runs also meet another
machine each: other processes, clocks, caches. Peers tell: their code is the same in both runs, so what their median
changed by in a case is the machine's doing (``drift``), and ours is divided by it. A case counts as changed where then
the ranges do not overlap and the medians lie at least LEAST apart. The same test over the peers themselves, each
corrected by the others of its case, says how often it cries wolf.
"""

from collections.abc import Iterator
from statistics import median
from typing import NamedTuple

from benchmarks.rows import key
from benchmarks.tables import case_of, header, line

LEAST = 0.03
# Rows whose code is none of ours.
PEERS = ("eager", "compile", "copy", "hooks on torch", "unprobed torch", "inplace_abn", "attorch", "FlagGems", "Apex")


class Change(NamedTuple):
    """One row in both runs."""

    row: dict  # the new one
    times: float  # the new median over the old one, without drift
    drift: float  # the machine's, by the peers of the same case; 1 where there are none
    beyond: bool  # the noise

    @property
    def is_peer(self) -> bool:
        return self.row["provider"].startswith(PEERS)


def compare(old: dict, new: dict) -> list[Change]:
    """Every row that both files have measured."""
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
    return changes


def _change(old: dict, new: dict, drift: float) -> Change:
    times = new["median_ms"] / old["median_ms"] / drift
    apart = new["p20_ms"] / drift > old["p80_ms"] or new["p80_ms"] / drift < old["p20_ms"]
    return Change(new, times, drift, apart and abs(times - 1) >= LEAST)


def markdown(old: dict, new: dict) -> Iterator[str]:
    """What the comparison says, in words and a table of what changed."""
    changes = compare(old, new)
    ours, peers = ([c for c in changes if c.is_peer == is_peer] for is_peer in (False, True))
    beyond = sorted((c for c in ours if c.beyond), key=lambda c: -c.times)
    slower = sum(c.times > 1 for c in beyond)
    yield f"Against {_run(old)}; this is {_run(new)}."
    if old["environment"]["devices"] != new["environment"]["devices"]:
        yield "**The machines differ.** Changes may be theirs."
    yield f"Of {len(ours)} rows of ours in both, {slower} became slower and {len(beyond) - slower} faster beyond the"
    yield f"noise: ranges p20 to p80 apart and medians {LEAST:.0%} or more, after the drift of each case's peers is"
    yield f"taken out. The same test finds a change in {sum(c.beyond for c in peers)} of the {len(peers)} peers' rows,"
    yield "whose code is the same: so often it is mistaken."
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
