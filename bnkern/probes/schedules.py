"""Schedules: functions that decide, on the host or on the device, which steps are recorded.

A schedule is called with the number of a step (0, 1, ...) and the loss of the previous step (None before the first).
Its method ``on_device`` computes the same from tensors without waiting for the device, as a captured graph needs it.
Any function of (step, loss) is a schedule. One without ``on_device`` cannot be used in a captured graph. The classes
have lower-case names, because they are used like functions.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class every:
    """Records the steps ``start``, ``start + n``, ``start + 2n``, ..."""

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
    """Records the given steps."""

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
    """Records step 0 and ``per_decade`` steps in each power of ten up to ``until``, evenly spaced in the logarithm."""
    if per_decade < 1:
        raise ValueError(f"log_spaced: per_decade must be at least 1, got {per_decade}")
    count = math.ceil(per_decade * math.log10(max(until, 2))) + 1
    return steps([0, *(step for k in range(count) if (step := round(10 ** (k / per_decade))) <= until)])


@dataclass(frozen=True)
class while_loss:
    """Records the first step, and steps that follow a loss above ``above`` or a loss that is not a number."""

    above: float

    def __call__(self, step: int, loss: float | None = None) -> bool:
        return loss is None or not loss <= self.above

    def on_device(self, step: Tensor, loss: Tensor | None) -> Tensor:
        return torch.ones_like(step, dtype=torch.bool) if loss is None else ~(loss <= self.above)
