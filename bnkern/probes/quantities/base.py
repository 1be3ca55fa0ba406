"""The base class of quantities: which layers they record, how they are attached, merged and read."""

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor, nn

Arrays = dict[str, np.ndarray]


class Handle(Protocol):
    """Has a method that ends an observation."""

    remove: Callable[[], None]


class RecorderProtocol(Protocol):
    """The methods of a recording that a quantity may call, as :class:`bnkern.probes.attachment.Attachment` has them."""

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

    def before_forward(self, module: nn.Module, callback: Callable[[], None]) -> Any: ...

    def on_forward(self, module: nn.Module, callback: Callable[[tuple, dict, Any], object]) -> Any: ...

    def reserve(self, quantity: "Quantity", layer: str, shape: tuple[int, ...], device: torch.device) -> None: ...

    def at_step(self, measure: Callable[[], None]) -> Handle: ...

    def call_of(self, layer: str, observer: object) -> int: ...


QUANTITIES: dict[str, type["Quantity"]] = {}  # by name; the definition of a class adds it


class Quantity:
    """A quantity of layers to record. ``layers`` are patterns of module names (``fnmatch``: "blocks.*.conv1")."""

    name: ClassVar[str]
    rows: tuple[str, ...]  # an attribute of the class, unless options choose among the rows
    by_default: ClassVar[str] = "*"  # the pattern if no layers are given

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
        """Returns the constructor's arguments as values for JSON. :func:`make` needs them to read a file."""
        return {"layers": list(self.layers)}

    def concerns(self, module: nn.Module) -> bool:
        """Whether the quantity is defined for such a module."""
        raise NotImplementedError

    def refuses(self, module: nn.Module) -> str | None:
        """Returns the reason why a module that it concerns cannot be recorded, or None."""
        return None

    def attach(self, recorder: RecorderProtocol, layer: str, module: nn.Module) -> list:
        """Attaches hooks to the module. Returns handles with a method ``remove()``."""
        raise NotImplementedError

    def merge(self, ranks: np.ndarray) -> np.ndarray:
        """Merges the records [ranks, steps, rows, ...] of all ranks of a distributed run into [steps, rows, ...]."""
        return ranks.sum(0)

    def derive(self, values: np.ndarray) -> Arrays:
        """Returns named arrays [steps, ...] for records [steps, rows, ...]."""
        return {row: values[:, k] for k, row in enumerate(self.rows)}


def ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Returns a / b without a warning. It is NaN where both are 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return a / b
