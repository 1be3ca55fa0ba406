"""The classes in which an experiment is described: :class:`Spec`, :class:`Run`, :class:`Claim` and its checks."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

# From the cheapest to the paper's own. Claims are judged only at "reduced" and "full". The other scales show that
# every procedure runs.
SCALES = ("smoke", "quick", "reduced", "full")
JUDGED = ("reduced", "full")

TRAINING = (
    "training",
    "rates",
    "layer_products",
    "norm_noise",
)  # procedures that train, with the settings of bnkern.train
PRECISIONS = ("fp32", "bf16")  # of training. The paper does not state its own; other measurements choose theirs
LAYOUTS = ("channels_last", "contiguous")  # of activations in training. They differ in speed and in rounding


@dataclass(frozen=True)
class Run:
    """One configuration, repeated for seeds 0, 1, ...: the network, its input, and the measured quantities."""

    label: str  # names the run's folder
    procedure: str  # the file of experiments/procedures/ that measures
    norm: str = "batch"
    quantities: tuple[str, ...] = ()  # what to measure, if the procedure has a choice
    layers: tuple[int, ...] = ()  # in the paper's numbering
    depth: int = 110
    shortcut: str = "projection"
    init: str = "xavier_normal"
    kernels: str = "bnkern"
    batch: int = 128
    seeds: int = 10
    options: dict = field(default_factory=dict)  # of the procedure: numbers, strings and lists of them

    def but(self, **changes: object) -> "Run":
        """The same run with ``changes``: of fields, and of ``options`` for every other name."""
        fields: dict[str, Any] = {name: value for name, value in changes.items() if name in self.__dataclass_fields__}
        options = {name: value for name, value in changes.items() if name not in fields}
        return replace(self, **fields | {"options": self.options | fields.get("options", {}) | options})


def shortened(depth: int, factor: float, **changes: object) -> Callable[[Run], dict]:
    """Changes to training runs, for a smaller scale: their epochs times ``factor``, rounded, at least 1."""
    return lambda run: {"depth": depth, "epochs": max(1, round(run.options["epochs"] * factor)), **changes}


# Scale "reduced" of what trains: so few images that every network can fit them, as all do in the paper, and no crops
# and flips. Epochs by learning rate, so that networks with batch norm end above 99 % train accuracy. Trials with
# ResNet-110: at 0.1, 100 epochs ended at 39, 85 and 99.9 % (three seeds), which is too few. With 300 epochs one seed
# passed 99 % at epoch 151. At 0.003 it passed 99 % at epoch 58, and at a constant 0.0001 at epoch 507, before the first
# drop of the rate at 600.
REDUCED = {"images": 1280, "augment": False}
REDUCED_EPOCHS = {0.1: 300, 0.03: 300, 0.003: 200, 0.0001: 1200}


def reduced(**changes: object) -> Callable[[Run], dict]:
    """Changes to training runs for scale "reduced"; the rate decides the epochs."""
    return lambda run: {**REDUCED, "epochs": REDUCED_EPOCHS[run.options["lr"]], **changes}


# Scale "quick" of what trains, a demonstration of minutes. In a trial with ResNet-8 (seed 0) the network at 0.1 fitted
# 256 images at epoch 33 of 75 and ended at 36.0 % test accuracy. At 0.003 it ended at 96 % train accuracy after 150
# epochs (34.5 % test), and at 0.0001 at 36 % after 625 (23.3 %). So the lowest rate does not fit them in this time.
QUICK = {"depth": 8, "images": 256, "augment": False, "batch": 32, "seeds": 1}
QUICK_EPOCHS = {0.1: 75, 0.03: 75, 0.003: 200, 0.0001: 300}
QUICK_TEXT = (
    "A demonstration: ResNet-8 on the first 256 training images, batches of 32, without crops and flips. 75 epochs at "
    "0.1 and 0.03, 200 at 0.003 and 300 at 0.0001, one seed."
)


def quick(run: Run) -> dict:
    """Changes to training runs for scale "quick"; the rate decides the epochs."""
    return {**QUICK, "epochs": QUICK_EPOCHS[run.options["lr"]]}


def with_searches(trained: Callable[[Run], dict], steps: int, **search: Any) -> Callable[[Run], dict]:
    """The changes ``trained`` of training runs, and searches for the largest rate over ``steps`` steps."""

    def change(run: Run) -> dict:
        if run.procedure != "rates":
            return trained(run)
        return {**search, "images": steps * search.get("batch", run.batch)}

    return change


# The number of networks at scale full of what is measured before any step and takes seconds. The paper's figures may
# show a single network, and 100 networks are enough to say how unusual it is.
MANY = 100
FEWER = {"seeds": 10}  # at scale reduced
FEWER_TEXT = "10 networks instead of 100."


# Options of a search for the largest rate: from 1e-6 to 100, eight in each decade.
RATES = tuple(10 ** (k / 8) for k in range(-48, 17))
SEARCH = {"lrs": RATES, "search": True, "epochs": 1}


@dataclass(frozen=True)
class Check:
    """The condition that a number must meet: ``text`` for the reader, ``holds`` for the number."""

    text: str
    holds: Callable[[float], bool]


def within_factor(paper: float, factor: float) -> Check:
    """At most ``factor`` times larger or smaller than the paper's."""
    return Check(f"within a factor of {factor:g} of the paper's", lambda ours: paper / factor <= ours <= paper * factor)


def within(paper: float, distance: float) -> Check:
    """At most ``distance`` from the paper's."""
    return Check(f"within {distance:g} of the paper's", lambda ours: abs(ours - paper) <= distance)


def between(low: float, high: float) -> Check:
    """From ``low`` to ``high``."""
    return Check(f"{low:g} to {high:g}", lambda ours: low <= ours <= high)


def above(low: float) -> Check:
    """More than ``low``."""
    return Check(f"above {low:g}", lambda ours: ours > low)


def below(high: float) -> Check:
    """Less than ``high``."""
    return Check(f"below {high:g}", lambda ours: ours < high)


class Measured(Protocol):
    """The methods of an experiment's results that claims use. They are documented in experiments/results.py."""

    def each(self, quantity: str, layer: int | None = None, **config: object) -> list: ...

    def ratio(self, of: dict, to: dict) -> list: ...

    def difference(self, quantity: str, layer: int, after: int, **config: object) -> list: ...

    def slope(self, quantity: str, layers: tuple[int, ...], **config: object) -> list: ...

    def gap(self, quantity: str, first: str, second: str) -> list: ...

    def distance(
        self, paper: tuple[float, ...], error: float, quantity: str, layers: tuple, **config: object
    ) -> list: ...


def each(quantity: str, layer: int | None = None, **config: object) -> Callable[[Measured], list]:
    """``Claim.ours`` of one quantity: its value in each run."""
    return lambda results: results.each(quantity, layer, **config)


NETWORKS = {  # for the reader, by Run.norm or by the first part of a label
    "batch": "batch norm",
    "none": "no batch norm",
    "final": "one batch norm",
    "fixup": "Fixup",
    "layer": "layer norm",
    "group": "group norm",
    "instance": "instance norm",
    "affine": "affine layers",
}


def at_rate(label: str) -> str:
    """A label of a norm and a learning rate for the reader: "batch norm at lr 0.1"."""
    norm, _, rate = label.partition("-")
    return f"{NETWORKS[norm]} at lr {rate}"


@dataclass(frozen=True)
class Claim:
    """One number of the paper and ours.

    ``ours`` takes the experiment's results (experiments/results.py) and returns one number for each seed. Their
    arithmetic or geometric mean is checked. Without a check the numbers are only shown. If the claim is ``pooled``,
    ``ours`` returns one number that is computed from all seeds together.
    """

    text: str
    ours: Callable[[Measured], list]  # floats, or results.Value where a number may be a bound
    paper: float | None = None  # as the paper prints it, or as read off its figure; None if it gives no number
    check: Check | None = None
    mean: str = "arithmetic"
    given: str = ""  # how the paper gives this number, if not as Spec.given says
    pooled: bool = False


@dataclass(frozen=True)
class Spec:
    """One figure or table of the paper."""

    title: str
    of: str  # its place in the paper
    order: float  # its place in the report
    headline: str  # the text of the claim whose number stands in the report's first table
    shows: str  # what the paper shows
    method: str  # what is computed at scale "full", and how it differs from the paper
    claims: tuple[Claim, ...]
    runs: tuple[Run, ...]  # at scale "full": the paper's own settings, where the paper has the experiment
    # What other scales change (Run.but): the same for every run, or a function of it. None: nothing runs at that scale.
    smaller: dict[str, dict | Callable[[Run], dict] | None] = field(default_factory=dict)
    reduction: dict[str, str] = field(default_factory=dict)  # by scale: what ``smaller`` changes, for the reader
    # By scale, for all seeds, on two cores whose training step takes pace.REFERENCE. The minutes of `make reproduce`
    # have the ratios of a whole run on an EPYC (Zen 5) on 2026-11-29. That run took 15 minutes, about half of their
    # sum, and a training step there took about half of REFERENCE. Other numbers are estimates.
    minutes: dict[str, float] = field(default_factory=dict)
    images: bool = True  # whether it needs CIFAR-10
    paper: dict = field(default_factory=dict)  # the paper's values, for the tables and the figure
    remark: str = ""  # what came out otherwise than expected, or beyond the paper
    given: str = "printed"  # how the paper gives the claims' numbers: "printed", "read off" a figure, "derived" by us
    beyond: bool = False  # an experiment that the paper does not have
    thresholds: str = ""  # when the thresholds were set and from what, if not as report.READING says

    def scale(self, requested: str) -> str:
        """The scale that serves ``requested``: the next larger one that differs, or "full"."""
        larger = SCALES[SCALES.index(requested) :]
        return next((scale for scale in larger if scale in self.smaller), "full")

    def at(self, scale: str) -> tuple[Run, ...]:
        """The runs at one scale."""
        changes = self.smaller.get(scale, {})
        if changes is None:
            return ()
        return tuple(run.but(**(changes(run) if callable(changes) else changes)) for run in self.runs)
