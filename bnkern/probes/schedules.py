"""When to record: functions of the step, decided on the host, or on the device from a counter that lives there.

A schedule is called with a step's number (0, 1, ...) and the loss of the step before (None before the first).
``on_device`` says the same of tensors without asking the device, so that a captured graph may decide for itself.
Any function of (step, loss) is a schedule; one without ``on_device`` cannot serve in a captured graph. The names are
those of functions because they are used like some.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class every:
    """Steps ``start``, ``start + n``, ``start + 2n``, ..."""

    n: int = 1
    start: int = 0

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"every: n must be at least 1, got {self.n}")

    def __call__(self, step: int, loss: float | None = None) -> bool:
        return step >= self.start and (step - self.start) % self.n == 0

    def on_device(self, step: Tensor, loss: Tensor | None) -> Tensor:
        return (step >= self.start) & ((step - self.start) % self.n == 0)


class steps:
    """The steps listed."""

    def __init__(self, chosen: Sequence[int]) -> None:
        self.chosen = frozenset(int(step) for step in chosen)
        self._listed: dict[torch.device, Tensor] = {}

    def __call__(self, step: int, loss: float | None = None) -> bool:
        return step in self.chosen

    def on_device(self, step: Tensor, loss: Tensor | None) -> Tensor:
        if step.device not in self._listed:
            self._listed[step.device] = torch.tensor(sorted(self.chosen), device=step.device)
        return (self._listed[step.device] == step).any()


def log_spaced(per_decade: int = 10, until: int = 10**7) -> steps:
    """Step 0 and ``per_decade`` steps in each power of ten, evenly spaced in the logarithm, up to ``until``."""
    if per_decade < 1:
        raise ValueError(f"log_spaced: per_decade must be at least 1, got {per_decade}")
    count = math.ceil(per_decade * math.log10(max(until, 2))) + 1
    return steps([0, *(step for k in range(count) if (step := round(10 ** (k / per_decade))) <= until)])


@dataclass(frozen=True)
class while_loss:
    """Steps that follow a loss above ``above`` (or one that is not a number); the first step too."""

    above: float

    def __call__(self, step: int, loss: float | None = None) -> bool:
        return loss is None or not loss <= self.above

    def on_device(self, step: Tensor, loss: Tensor | None) -> Tensor:
        return torch.ones_like(step, dtype=torch.bool) if loss is None else ~(loss <= self.above)
