"""How quantities are attached to the layers of a model: hooks, taps of norm layers, and the records of a step.

The hooks exist while the recording is in progress. In steps that are not recorded they return at once, and norm layers
run the kernels that do not record.
"""

import warnings
from collections import defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..backends.records import Records
from ..norm.context import is_recomputed
from .buffer import Buffer
from .quantities import Quantity

if TYPE_CHECKING:
    from .quantities.channels import _ChannelQuantity


class Tap:
    """Gives a norm layer, at each call, the memory for its records. A layer has one tap for each recording of it.

    A copy of a recorded module, by deepcopy or pickle, is not recorded, because its tap belongs to no recorder.
    """

    def __init__(self, recorder: "Attachment | None", layer: str) -> None:
        self.recorder, self.layer = recorder, layer
        self.quantities: dict[str, Quantity] = {}  # by name of the field in Records

    def __reduce__(self):
        return Tap, (None, self.layer)

    @staticmethod
    def requested(module: nn.Module) -> set[str]:
        """Returns the fields of Records that a call of a module with ``taps`` would fill now."""
        taps: tuple[Tap, ...] = module.taps  # type: ignore[assignment]
        active = (tap for tap in taps if tap.recorder is not None and tap.recorder.is_recording(module))
        return {field for tap in active for field in tap.quantities}

    @staticmethod
    def records(module: nn.Module, shape: tuple[int, ...], device: torch.device) -> Records | None:
        """Returns the memory for the records of this call of a module with ``taps``, or None.

        ``shape`` is (C,), for the C channels of the call, and empty without an axis of channels.
        """
        first: dict[str, Tensor] = {}
        mirrors = []
        taps: tuple[Tap, ...] = module.taps  # type: ignore[assignment]
        for tap in taps:
            recorder = tap.recorder
            if recorder is None or not recorder.is_recording(module):
                continue
            places = tap._places(recorder, shape, device)
            mirrors.append(Records(**{field: place for field, place in places.items() if field in first}))  # type: ignore[arg-type]
            first |= {field: place for field, place in places.items() if field not in first}
        return Records(**first, mirrors=tuple(mirrors[1:])) if first else None

    def _places(self, recorder: "Attachment", shape: tuple[int, ...], device: torch.device) -> dict[str, Tensor]:
        call = recorder.call_of(self.layer, self)
        if not torch.compiler.is_compiling():
            recorder.order.setdefault(self.layer)
        return {
            field: recorder.slot(quantity, self.layer, call, tuple(shape), device)
            for field, quantity in self.quantities.items()
        }


class ForwardHook:
    """A hook of one module, before or after its forward. It does nothing in a copy of the module (deepcopy, pickle)."""

    def __init__(self, module: nn.Module | None, callback: Callable | None) -> None:
        self.module, self.callback = module, callback

    def __reduce__(self):
        return ForwardHook, (None, None)

    def __call__(self, module: nn.Module, *arguments: Any) -> object:
        return self.callback(*arguments) if module is self.module and self.callback is not None else None


class _ObservedOutput(torch.autograd.Function):
    """The identity. Its backward calls ``observer`` with the gradient. torch.compile can trace it, unlike a hook."""

    @staticmethod
    def forward(ctx, y: Tensor, x: Tensor | None, observer: Callable[[Tensor | None, Tensor], None]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.observer = observer
        return y.view_as(y)

    @staticmethod
    def backward(ctx, dy: Tensor):
        (x,) = ctx.saved_tensors
        with torch.no_grad():
            ctx.observer(x, dy)
        return dy, None, None


class _Handle:
    """Has a method ``remove``, which undoes something."""

    def __init__(self, remove: Callable[[], None]) -> None:
        self.remove = remove


class Attachment:
    """The quantities of a recording, attached to the layers of a model, and the records of the step in progress.

    Attributes:
        active: whether the current step is recorded.
        in_eval: whether layers in eval mode are recorded.
        unserved: {(quantity, layer): why that layer cannot be recorded}.
        order: the layers with taps, in the order of their calls. Calls in compiled code are not observed.
    """

    active: bool

    def __init__(self, buffer: Buffer, in_eval: bool = False) -> None:
        self.in_eval = in_eval
        self.unserved: dict[tuple[str, str], str] = {}
        self.order: dict[str, None] = {}
        self._buffer = buffer
        self._calls: dict[object, int] = defaultdict(int)
        self._open: dict[object, list[int]] = defaultdict(list)
        self._closing: list[Callable[[], None]] = []
        self._taps: dict[nn.Module, Tap] = {}
        self._handles: list = []

    def is_recording(self, module: nn.Module) -> bool:
        """Whether a call of this module is recorded now."""
        return self.active and (module.training or self.in_eval)

    def slot(self, quantity: Quantity, layer: str, call: int, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """Returns the float64 memory for the record [rows, *shape] of a layer's call. All of it must be written."""
        return self._buffer.slot((quantity.name, layer), call, (len(quantity.rows), *shape), device)

    def tap(self, layer: str, module: nn.Module, quantity: "_ChannelQuantity") -> _Handle:
        """Makes the kernels of a norm layer record."""
        tap = self._taps.get(module)
        if tap is None:
            tap = self._taps[module] = Tap(self, layer)
            before: tuple[Tap, ...] = module.taps  # type: ignore[assignment]
            module.taps = (*before, tap)  # type: ignore[assignment]
        tap.quantities[quantity.record] = quantity

        def remove() -> None:
            taps: tuple[Tap, ...] = module.taps  # type: ignore[assignment]
            module.taps = tuple(other for other in taps if other is not tap)  # type: ignore[assignment]
            if not module.taps:
                del module.taps  # compiled code then finds the attribute of the class, as before

        return _Handle(remove)

    def on_gradient(
        self,
        layer: str,
        module: nn.Module,
        quantity: Quantity,
        shape: tuple[int, ...] | None,
        measure: Callable[..., None],
    ):
        """Calls ``measure(x, dy, out)`` in backward: the module's input, its output's gradient, the record to write.

        If the output has a ``handoff`` (``bnkern.conv``), it is the fourth argument. ``shape`` is the shape of the
        record without its rows. None stands for the shape of the output in the first step.
        """
        places: list[tuple[int, ...]] = []
        if shape is not None:
            places.append(shape)
            self.reserve(quantity, layer, shape, next(module.parameters()).device)

        def callback(args: tuple, kwargs: dict, y: object) -> Tensor | None:
            if not self.is_recording(module) or not isinstance(y, Tensor) or not y.requires_grad:
                return None
            x = args[0].detach() if args and isinstance(args[0], Tensor) else None
            call = self.call_of(layer, quantity)
            if not places:
                places.append(tuple(y.shape))

            handoff = [y.handoff] if hasattr(y, "handoff") else []  # not y, which will hold a reference to observe

            def observe(x: Tensor | None, dy: Tensor) -> None:
                measure(x, dy, self.slot(quantity, layer, call, places[0], dy.device), *handoff)

            if torch.compiler.is_compiling():
                return _ObservedOutput.apply(y, x, observe)
            y.register_hook(lambda dy: _without_grad(observe, x, dy))
            return None

        return self.on_forward(module, callback)

    def before_forward(self, module: nn.Module, callback: Callable[[], None]):
        """Calls ``callback()`` before each forward of the module that is recorded."""

        def hook(args: tuple) -> None:
            if self.is_recording(module):
                callback()

        return module.register_forward_pre_hook(ForwardHook(module, hook))

    def on_forward(self, module: nn.Module, callback: Callable[[tuple, dict, Any], object]):
        """Calls ``callback(args, kwargs, y)`` after each forward of the module. A result other than None replaces y."""
        return module.register_forward_hook(ForwardHook(module, callback), with_kwargs=True)

    def reserve(self, quantity: Quantity, layer: str, shape: tuple[int, ...], device: torch.device) -> None:
        """Reserves a record before its first step, so that torch.compile and graph capture need not be repeated."""
        self._buffer.slot((quantity.name, layer), 0, (len(quantity.rows), *shape), device)

    def at_step(self, measure: Callable[[], None]) -> _Handle:
        """Calls ``measure`` whenever a recorded step closes."""
        self._closing.append(measure)
        return _Handle(lambda: self._closing.remove(measure))

    def call_of(self, layer: str, observer: object) -> int:
        """Returns the number of this call of the layer in the step: 0, 1, ...

        A forward that runs during a backward is the recomputation of a checkpoint and not another call. It repeats the
        latest call that has not been recomputed yet, because the backward goes from the last call to the first.
        """
        if torch.compiler.is_compiling():
            return 0  # the code of one step is traced once
        key = layer, id(observer)
        if is_recomputed() and self._open[key]:
            return self._open[key].pop()
        call = self._calls[key]
        self._calls[key] += 1
        self._open[key].append(call)
        return call

    # ---- for the recorders that inherit from this class

    def _measure(self) -> int:
        """Calls what waits for the end of a step. Returns the number of calls of a layer in it."""
        for measure in self._closing:
            measure()
        return max(self._calls.values(), default=1)

    def _begin_step(self) -> None:
        self._calls.clear()
        self._open.clear()

    def _attach(self, model: nn.Module, quantities: list[Quantity], patterns: tuple[str, ...]) -> None:
        among = Quantity(patterns)
        for quantity in quantities:
            served = 0
            for layer, module in model.named_modules():
                if not (quantity.wants(layer) and among.wants(layer) and quantity.concerns(module)):
                    continue
                reason = quantity.refuses(module)
                if reason:
                    self.unserved[quantity.name, layer] = reason
                    continue
                handles = quantity.attach(self, layer, module)
                self._handles += handles
                served += bool(handles)
            if not served:
                reasons = {reason for (name, _), reason in self.unserved.items() if name == quantity.name}
                raise ValueError(
                    f"probes: {quantity.name} finds no layer that it can serve"
                    + (f": {'; '.join(sorted(reasons))}" if reasons else f" (patterns {', '.join(quantity.layers)})")
                )
        if self._buffer.grown():
            self._buffer.grow()
        if self.unserved:
            some = ", ".join(f"{name} of {layer}: {why}" for (name, layer), why in list(self.unserved.items())[:3])
            more = ", ..." if len(self.unserved) > 3 else ""
            warnings.warn(
                f"probes: {len(self.unserved)} layers cannot be recorded ({some}{more}); rec.unserved has them all",
                stacklevel=5,
            )

    def _forget(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def _without_grad(observe: Callable[[Tensor | None, Tensor], None], x: Tensor | None, dy: Tensor) -> None:
    with torch.no_grad():
        observe(x, dy)
