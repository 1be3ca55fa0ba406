"""The words in which an experiment is written down: :class:`Spec`, :class:`Run`, :class:`Claim` and its checks."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Run:
    """One configuration, repeated for seeds 0, 1, ...: what to build, what to feed it, what to measure."""

    label: str  # names the run's folder
    procedure: str  # the function of experiments/measure.py that does it
    quantities: tuple[str, ...]  # and what that measures, a file of probes/ each
    layers: tuple[int, ...]  # in the paper's numbering
    norm: str
    depth: int = 110
    shortcut: str = "projection"
    kernels: str = "bnkern"
    batch: int = 128
    seeds: int = 10


@dataclass(frozen=True)
class Check:
    """When a number counts as the paper's: ``text`` for the reader, ``holds`` for the number."""

    text: str
    holds: Callable[[float], bool]


def within_factor(paper: float, factor: float) -> Check:
    """At most ``factor`` times larger or smaller than the paper's."""
    return Check(f"within {factor:g}x of the paper's", lambda ours: paper / factor <= ours <= paper * factor)


def within(paper: float, distance: float) -> Check:
    """At most ``distance`` from the paper's."""
    return Check(f"within {distance:g} of the paper's", lambda ours: abs(ours - paper) <= distance)


def between(low: float, high: float) -> Check:
    """From ``low`` to ``high``."""
    return Check(f"{low:g} to {high:g}", lambda ours: low <= ours <= high)


def above(low: float) -> Check:
    """More than ``low``."""
    return Check(f"above {low:g}", lambda ours: ours > low)


@dataclass(frozen=True)
class Claim:
    """One number of the paper and ours.

    ``ours`` takes the experiment's results (experiments/results.py) and gives one number a seed; their mean,
    arithmetic or geometric, is checked. Without a check the numbers are only shown.
    """

    text: str
    ours: Callable[[object], list[float]]
    paper: float | None = None
    check: Check | None = None
    mean: str = "arithmetic"


@dataclass(frozen=True)
class Spec:
    """One figure or table of the paper."""

    title: str
    of: str  # its place in the paper
    order: float  # its place in the report
    shows: str  # what the paper shows
    method: str  # what exactly is computed, and what is done otherwise than there, if anything
    claims: tuple[Claim, ...]
    runs: tuple[Run, ...]  # at the paper's scale
    smaller: dict[str, dict] = field(default_factory=dict)  # fields of Run that other scales change
    paper: dict = field(default_factory=dict)  # the paper's values, for the tables and the figure
    remark: str = ""  # what came out otherwise than expected, or beyond the paper

    def scale(self, asked: str) -> str:
        """The scale that serves ``asked``: the paper's own, where nothing is made smaller for it."""
        return asked if asked in self.smaller else "paper"

    def at(self, scale: str) -> tuple[Run, ...]:
        """The runs at one scale."""
        return tuple(replace(run, **self.smaller.get(scale, {})) for run in self.runs)
