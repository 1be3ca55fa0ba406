"""What a quantity is: which layers it serves, how it listens, how ranks merge, what a reader gets."""

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor, nn

Arrays = dict[str, np.ndarray]


class Handle(Protocol):
    """What ends an observation."""

    remove: Callable[[], None]


class RecorderProtocol(Protocol):
    """What a quantity may ask of the recording it takes part in: :class:`bnkern.probes.recorder.Recorder` explains."""

    active: bool

    def is_recording(self, module: nn.Module) -> bool: ...

    def slot(
        self, quantity: "Quantity", layer: str, call: int, shape: tuple[int, ...], device: torch.device
    ) -> Tensor: ...

    def tap(self, layer: str, module: nn.Module, quantity: Any) -> Handle: ...

    def on_gradient(
        self,
        layer: str,
        module: nn.Module,
        quantity: "Quantity",
        shape: tuple[int, ...] | None,
        measure: Callable[..., None],
    ) -> Any: ...

    def on_forward(self, module: nn.Module, callback: Callable[[tuple, dict, Any], object]) -> Any: ...

    def reserve(self, quantity: "Quantity", layer: str, shape: tuple[int, ...], device: torch.device) -> None: ...

    def at_step(self, measure: Callable[[], None]) -> Handle: ...

    def call_of(self, layer: str, observer: object) -> int: ...


QUANTITIES: dict[str, type["Quantity"]] = {}  # by name; a class enters when it is defined


class Quantity:
    """Something to record about layers. ``layers`` are patterns of module names (``fnmatch``: "blocks.*.conv1")."""

    name: ClassVar[str]
    rows: tuple[str, ...]  # of the class, unless options choose among them
    by_default: ClassVar[str] = "*"  # the layers taken where none are named

    def __init_subclass__(cls) -> None:
        if "name" in vars(cls):
            QUANTITIES[cls.name] = cls

    def __init__(self, layers: str | Iterable[str] | None = None) -> None:
        chosen = self.by_default if layers is None else layers
        self.layers = (chosen,) if isinstance(chosen, str) else tuple(chosen)

    def wants(self, layer: str) -> bool:
        """Whether the name of the layer matches a pattern."""
        return any(fnmatchcase(layer, pattern) for pattern in self.layers)

    def options(self) -> dict[str, object]:
        """The constructor's arguments, as JSON has them: what :func:`make` needs to read a file."""
        return {"layers": list(self.layers)}

    def concerns(self, module: nn.Module) -> bool:
        """Whether one would ask this quantity of such a module at all."""
        raise NotImplementedError

    def refuses(self, module: nn.Module) -> str | None:
        """Why a module that it concerns cannot be served, or None."""
        return None

    def attach(self, recorder: RecorderProtocol, layer: str, module: nn.Module) -> list:
        """Listen to the module; returns handles with ``remove()``."""
        raise NotImplementedError

    def merge(self, ranks: np.ndarray) -> np.ndarray:
        """Records [ranks, steps, rows, ...] of equal steps of the ranks of a distributed run as those of the whole."""
        return ranks.sum(0)

    def derive(self, values: np.ndarray) -> Arrays:
        """Named arrays [steps, ...] from records [steps, rows, ...]."""
        return {row: values[:, k] for k, row in enumerate(self.rows)}


def ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a / b, NaN where both are 0, without a warning."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return a / b
