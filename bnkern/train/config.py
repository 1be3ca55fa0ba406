"""The settings of a training run, one frozen :class:`Config`, and the paper's runs by name.

A Config has everything that decides the numbers of a run. Two runs with equal configs on equal machines are therefore
the same run. Sources: "the paper" is Bjorck et al., "Understanding Batch Normalization", 2018; He et al. is "Deep
residual learning for image recognition", 2015.
"""

import dataclasses
import difflib
import json
import math
from dataclasses import dataclass, fields

from .resnet import check_options

PRECISIONS = ("fp32", "tf32", "bf16", "fp64")


@dataclass(frozen=True)
class Config:
    """The settings of one run. A wrong value raises a TypeError or ValueError that names it.

    The learning rate is ``lr``, multiplied by ``drop_factor`` at every drop. Drops are at the shares ``drops`` of all
    steps. With ``plateau`` > 0 there is a drop instead whenever the loss of an epoch (of the validation images if there
    are any, otherwise of training) has not fallen by 0.01 % for more than ``plateau`` epochs. The first ``warmup``
    steps use ``warmup_lr``.
    """

    name: str  # of the run and, with the seed, of its folder
    seed: int = 0  # of the parameters and the batches

    # the network, see resnet.ResNet
    depth: int = 110
    norm: str = "batch"
    shortcut: str = "projection"
    init: str = "xavier_normal"
    kernels: str = "bnkern"

    data: str = "cifar10"  # or "synthetic": the source of the images, as in Cifar10.source
    augment: bool = True  # 4 pixels of padding, random crop and flip
    validation: int = 0  # number of training images for validation, the same for every seed

    # the recipe: SGD on the mean cross-entropy
    epochs: int = 165
    batch: int = 128  # images of all processes together
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    drops: tuple[float, ...] = (0.5, 0.75)
    drop_factor: float = 0.1
    plateau: int = 0  # epochs without improvement before a drop; 0: drops at fixed times
    warmup: int = 0  # steps
    warmup_lr: float = 0.01

    # how it is computed
    precision: str = "fp32"  # "tf32": fp32 with TF32 products on a GPU; "bf16": autocast, parameters in fp32; "fp64"
    channels_last: bool = False
    compile: bool = False  # whether the network is compiled by torch.compile
    graph: bool = True  # whether one GPU runs the step as one CUDA graph, unless probes decide on the host
    deterministic: bool = False  # use deterministic algorithms only, so that resuming changes no bit

    # what is written, and when. Metrics and checkpoints are also written at the end of every epoch.
    log_every: int = 50  # steps between lines of metrics
    evaluate_every: int = 1  # epochs between evaluations; the last epoch is always evaluated
    checkpoint_every: int = 0  # steps between checkpoints; 0: only at the end of every epoch

    def __post_init__(self) -> None:
        for field in fields(self):
            object.__setattr__(self, field.name, _typed(field.name, getattr(self, field.name), field.type))  # type: ignore[arg-type]
        if not self.name or "/" in self.name or self.name.startswith("."):
            raise ValueError(f"name must be usable as a folder: not empty, no slash, no leading dot; got {self.name!r}")
        check_options(self.depth, self.norm, self.shortcut, self.kernels, self.init)
        _check("data", self.data, self.data in ("cifar10", "synthetic"), "cifar10 or synthetic")
        _check("precision", self.precision, self.precision in PRECISIONS, " or ".join(PRECISIONS))
        for name in ("epochs", "batch", "log_every", "evaluate_every"):
            _check(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        for name in ("seed", "validation", "plateau", "warmup", "checkpoint_every", "weight_decay"):
            _check(name, getattr(self, name), getattr(self, name) >= 0, "not negative")
        for name in ("lr", "warmup_lr"):
            _check(name, getattr(self, name), 0 < getattr(self, name) < math.inf, "above 0 and finite")
        _check("momentum", self.momentum, 0 <= self.momentum < 1, "from 0 to below 1")
        _check("drop_factor", self.drop_factor, 0 < self.drop_factor <= 1, "above 0, at most 1")
        rising = list(self.drops) == sorted(self.drops) and all(0 < drop < 1 for drop in self.drops)
        _check("drops", self.drops, rising, "rising shares of the run between 0 and 1")

    @property
    def title(self) -> str:
        """Name and seed, the name of the run's folder."""
        return f"{self.name}-seed{self.seed}"

    def replace(self, **changes: object) -> "Config":
        """Returns the same settings with ``changes``."""
        return from_dict(self.to_dict() | changes)

    def to_dict(self) -> dict:
        """Returns the settings as values that JSON preserves."""
        return dataclasses.asdict(self) | {"drops": list(self.drops)}


def from_dict(values: dict) -> Config:
    """Returns the Config for a result of :meth:`Config.to_dict`. Values that equal the default may be missing."""
    names = [field.name for field in fields(Config)]
    for name in values:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1, cutoff=0)[0]
            raise ValueError(f"a run has no setting {name!r}; did you mean {near!r}? There are: {', '.join(names)}")
    if "name" not in values:
        raise ValueError("a run needs a name")
    return Config(**values)


def parse(name: str, text: str) -> object:
    """Returns the value of a setting given on a command line: plain text if the setting is text, else JSON."""
    kinds = {field.name: field.type for field in fields(Config)}
    if kinds.get(name) is str:
        return text
    try:
        return json.loads(text)
    except ValueError:
        return text  # Config raises the error


def learning_rate(config: Config, step: int, steps: int, lowered: int = 0) -> float:
    """Returns the learning rate of step 0 .. ``steps`` - 1. ``lowered`` counts the drops of the plateau rule."""
    if step < config.warmup:
        return config.warmup_lr
    drops = lowered if config.plateau else sum(step >= round(drop * steps) for drop in config.drops)
    return config.lr * config.drop_factor**drops


def _typed(name: str, value: object, kind: type) -> object:
    if kind is float and type(value) is int:
        return float(value)
    if kind not in (str, int, float, bool):  # the only tuple among the settings, a list in JSON
        if not isinstance(value, list | tuple) or not all(type(v) in (int, float) for v in value):
            raise TypeError(f"{name} must be a list of numbers, got {value!r}")
        return tuple(float(v) for v in value)
    if type(value) is not kind:
        raise TypeError(f"{name} must be {kind.__name__}, got {value!r}")
    return value


def _check(name: str, value: object, holds: bool, must: str) -> None:
    if not holds:
        raise ValueError(f"{name} must be {must}, got {value!r}")


# ------------------------------------------------------------------------------------------------ the paper's runs

SEEDS = 5  # runs of each, seeds 0 .. 4, as in the paper's Figure 1


def _presets() -> dict[str, Config]:
    runs = [
        # Figure 1: 165 epochs at lr 0.1, eight times as many at 0.003, and about 2,400 at 0.0001
        Config("fig1-batch-0.1", lr=0.1, epochs=165),
        Config("fig1-batch-0.003", lr=0.003, epochs=1320),
        Config("fig1-batch-0.0001", lr=0.0001, epochs=2400),
        Config("fig1-none-0.0001", norm="none", lr=0.0001, epochs=2400),
        # Section 4 and Appendix E. The paper gives no number of epochs. Twice the number for lr 0.1 is our choice.
        Config("final-0.03", norm="final", lr=0.03, epochs=330),
        # Beyond the paper: no normalisation, and an initialisation that is designed for such networks
        Config("fixup-0.1", norm="none", init="fixup", lr=0.1, epochs=165),
    ]
    # Appendix K repeats Figure 1 with other norms and the same epochs. Which norms is inferred.
    for norm in ("layer", "group", "instance"):
        runs += [Config(f"{norm}-{lr:g}", norm=norm, lr=lr, epochs=e) for lr, e in ((0.1, 165), (0.003, 1320))]
        runs.append(Config(f"{norm}-0.0001", norm=norm, lr=0.0001, epochs=2400))
    return {run.name: run for run in runs}


PRESETS = _presets()


def preset(name: str, epochs_factor: float = 1.0, /, **changes: object) -> Config:
    """Returns a run of the paper with ``changes``, its epochs times ``epochs_factor`` (rounded, at least 1)."""
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0)[0]
        raise ValueError(f"no preset {name!r}; did you mean {near!r}? There are: {', '.join(PRESETS)}")
    run = PRESETS[name]
    return run.replace(**{"epochs": max(1, round(run.epochs * epochs_factor))} | changes)


LAPTOP = 10 / 165  # of the paper's epochs: 10 at lr 0.1, 80 at 0.003, 145 at 0.0001


def laptop(name: str, /, **changes: object) -> Config:
    """Returns the preset for two CPU cores: ResNet-20 in channels_last, with the epochs times :data:`LAPTOP`.

    With so few epochs the low learning rates are under-trained, and so is the high one.
    """
    return preset(name, LAPTOP, **{"name": f"{name}-laptop", "depth": 20, "channels_last": True} | changes)
