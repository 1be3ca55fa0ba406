"""The activations that batch norm computes in the same pass: value and gradient of each, in torch.

An activation is the identity where z > 0 or z is NaN, and linear where z <= 0. The backward therefore needs only one
bit of each z: whether z is positive or NaN. The kernels have the same list in the same order: ``csrc/params.h`` names
the activations, and ``csrc/cpu/activation.h``, ``csrc/cuda/device.h`` and ``backends/triton/common.py`` compute them.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Activation(NamedTuple):
    """y = value(z); dL/dz = gradient(dL/dy, positive), with positive = not (z <= 0)."""

    value: Callable[[Tensor], Tensor]
    gradient: Callable[[Tensor, Tensor], Tensor]


ACTIVATIONS = {
    "relu": Activation(torch.relu, lambda dy, positive: dy.where(positive, 0)),
}
_CODES = {name: code for code, name in enumerate(ACTIVATIONS, start=1)}


def code(act: str | None) -> int:
    """The number of an activation in the kernels, or 0 for None."""
    return 0 if act is None else _CODES[act]


def check(name: str, act: str | None) -> None:
    """Raises a ValueError if the activation does not exist. The message begins with ``name``."""
    if act is not None and act not in ACTIVATIONS:
        names = " or ".join(f'"{allowed}"' for allowed in ACTIVATIONS)
        raise ValueError(f"{name}: act must be None or {names}, got {act!r}")
