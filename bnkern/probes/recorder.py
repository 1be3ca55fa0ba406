"""``record`` attaches quantities to the layers of a model, collects the records of each step and writes them to files.

The order in a step is: forwards, backwards, ``rec.step(loss)``, ``optimizer.zero_grad()``. The hooks exist while the
context is entered. In steps that the schedule leaves out they return at once, and norm layers run the kernels that do
not record.
"""

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..backends.records import Records
from ..norm.context import is_recomputed
from .buffer import Buffer
from .files import Writer
from .quantities import Quantity, make
from .schedules import every

if TYPE_CHECKING:
    from .quantities.channels import _ChannelQuantity

Schedule = Callable[..., bool]
EVERY_STEP = every(1)


@contextmanager
def record(
    model: nn.Module,
    quantities: Iterable[str | Quantity],
    schedule: Schedule = EVERY_STEP,
    out: str | PathLike = "probes",
    *,
    layers: str | Iterable[str] = "*",
    first_step: int = 0,
    append: bool = False,
    in_eval: bool = False,
    on_device: bool = False,
    capacity: int | None = None,
) -> Iterator["Recorder"]:
    """Record quantities of a model's layers while it trains, into files under ``out``.

    ```python
    with bnkern.probes.record(model, ["activation_moments"], every(10), "run/probes") as rec:
        for images, labels in data:
            loss = criterion(model(images), labels)
            loss.backward()
            optimizer.step()
            rec.step(loss)
            optimizer.zero_grad()
    ```

    Recording never changes a bit of what the model computes, and never waits for the device.

    Args:
        model: any module made of torch's convolutions and bnkern's norm layers; layers go by their names in it.
        quantities: names out of ``bnkern.probes.QUANTITIES``, or quantities made with options.
        schedule: which steps to record; ``every(n)``, ``steps([...])``, ``log_spaced()``, ``while_loss(above=...)`` or
            any function of (step, loss of the step before).
        out: folder for the files; :func:`bnkern.probes.load` reads it, and so does numpy alone.
        layers: patterns of layer names, on top of the quantities' own.
        first_step: number of the first step, in a run that continues.
        append: continue in a folder that has records. Otherwise such a folder is an error.
        in_eval: record layers in eval mode too.
        on_device: the device counts the steps and evaluates ``schedule``, so a step can be captured in a CUDA graph
            together with ``rec.step``. Every step then records, and the rows of the scheduled steps are kept. Run one
            step before the capture, and call ``rec.flush()`` at least every ``capacity`` recorded steps.
        capacity: the number of rows in the buffer on the device, by default 64 MB of them. If it is full and cannot be
            written in time, the newest rows are dropped and counted (``rec.dropped``).

    Yields:
        The recording in progress.

    Raises:
        ValueError: Nothing matches, a name is unknown, or ``out`` has records and ``append`` is not set.
        OSError: ``out`` cannot be written, at the start or in a later step.
    """
    patterns = (layers,) if isinstance(layers, str) else tuple(layers)
    recorder = Recorder(
        model, [make(q) for q in quantities], schedule, out, patterns, first_step, append, in_eval, on_device, capacity
    )
    try:
        yield recorder
    except BaseException:
        recorder.close(failed=True)
        raise
    recorder.close()


class Tap:
    """Gives a norm layer, at each call, the memory for its records. A layer has one tap for each recording of it.

    A copy of a recorded module, by deepcopy or pickle, is not recorded, because its tap belongs to no recorder.
    """

    def __init__(self, recorder: "Recorder | None", layer: str) -> None:
        self.recorder, self.layer = recorder, layer
        self.quantities: dict[str, Quantity] = {}  # by name of the field in Records

    def __reduce__(self):
        return Tap, (None, self.layer)

    @staticmethod
    def records(module: nn.Module, x: Tensor) -> Records | None:
        """Returns the memory for the records of this call of a module with ``taps``, or None."""
        first: dict[str, Tensor] = {}
        mirrors = []
        taps: tuple[Tap, ...] = module.taps  # type: ignore[assignment]
        for tap in taps:
            recorder = tap.recorder
            if recorder is None or not recorder.is_recording(module):
                continue
            places = tap._places(recorder, x)
            mirrors.append(Records(**{field: place for field, place in places.items() if field in first}))  # type: ignore[arg-type]
            first |= {field: place for field, place in places.items() if field not in first}
        return Records(**first, mirrors=tuple(mirrors[1:])) if first else None

    def _places(self, recorder: "Recorder", x: Tensor) -> dict[str, Tensor]:
        call = recorder.call_of(self.layer, self)
        return {
            field: recorder.slot(quantity, self.layer, call, tuple(x.shape[1:2]), x.device)
            for field, quantity in self.quantities.items()
        }


class ForwardHook:
    """A forward hook of one module. A copy of that module, by deepcopy or pickle, has a hook that does nothing."""

    def __init__(self, module: nn.Module | None, callback: Callable | None) -> None:
        self.module, self.callback = module, callback

    def __reduce__(self):
        return ForwardHook, (None, None)

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, y: object) -> object:
        return self.callback(args, kwargs, y) if module is self.module and self.callback is not None else None


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


class Recorder:
    """A recording in progress, as ``record`` yields it.

    Attributes:
        active: whether the current step is recorded.
        unserved: {(quantity, layer): why that layer cannot be recorded}.
    """

    def __init__(
        self,
        model: nn.Module,
        quantities: list[Quantity],
        schedule: Schedule,
        out: str | PathLike,
        patterns: tuple[str, ...],
        first_step: int,
        append: bool,
        in_eval: bool,
        on_device: bool,
        capacity: int | None,
    ) -> None:
        if on_device and not hasattr(schedule, "on_device"):
            raise ValueError("probes: with on_device the schedule must be one of bnkern.probes' own, or have on_device")
        self.schedule, self.in_eval, self.on_device = schedule, in_eval, on_device
        self.unserved: dict[tuple[str, str], str] = {}
        self._step = first_step
        self._buffer = Buffer(first_step, capacity)
        self._loss: Tensor | None = None
        self._rows = 0  # upper bound of the rows in the ring
        self._calls: dict[object, int] = defaultdict(int)
        self._open: dict[object, list[int]] = defaultdict(list)
        self._closing: list[Callable[[], None]] = []
        self._taps: dict[nn.Module, Tap] = {}
        self._handles: list = []
        self.active = on_device or bool(schedule(first_step, None))
        try:
            self._attach(model, quantities, patterns)
            self._writer = Writer(out, quantities, self.unserved, append)
        except BaseException:
            self._forget()
            raise

    # ---- for the training loop

    def step(self, loss: Tensor | float | None = None) -> None:
        """Close the current step. Call it once per optimiser step, after backward and before ``zero_grad``.

        ``loss`` is for schedules that use it. With ``on_device`` a tensor stays on its device. Otherwise only schedules
        that use it read it, on the CPU without cost.
        """
        self._writer.raise_if_failed()
        if self.active:
            for measure in self._closing:
                measure()
            self._commit()
        self._calls.clear()
        self._open.clear()
        self._step += 1
        if not self.on_device:
            self.active = bool(self.schedule(self._step, loss.detach() if isinstance(loss, Tensor) else loss))
        else:
            self._buffer.next_step()
            if isinstance(loss, Tensor):
                self._keep(loss)

    def flush(self, wait: bool = False) -> None:
        """Hands all closed steps to the thread that writes them. With ``wait`` it returns when they are on the disk."""
        self._hand_out()
        if wait:
            self._writer.wait()

    def rewind(self, step: int) -> None:
        """Drops the records of steps closed since the last flush, and numbers the current step ``step``.

        This is for steps that do not count, such as the warm-up steps of a CUDA graph.
        """
        self._step = step
        self._rows = 0
        self._calls.clear()
        self._open.clear()
        self._buffer.rewind(step)
        if self._loss is not None:
            self._loss.fill_(torch.inf)  # as before the first step, for schedules that use it
        if not self.on_device:
            self.active = bool(self.schedule(step, None))

    @property
    def dropped(self) -> int:
        """The number of rows lost because the buffer was full and the disk too slow. A read waits for the device."""
        return 0 if self._buffer.device is None else int(self._buffer.dropped)

    def close(self, failed: bool = False) -> None:
        """Removes the hooks and writes the remaining rows. ``record`` calls it, also after an exception.

        After an exception it raises no second one. In a distributed run the rows since the last flush are then lost.
        To gather them from all ranks is a collective, and the other ranks may be in another one or may have ended.
        """
        self._forget()
        try:
            if not (failed and self._writer.ranks > 1):
                self._hand_out()
            self._writer.close(self.dropped)
        except Exception:
            if not failed:
                raise
        if self.dropped:
            warnings.warn(f"probes: {self.dropped} records were dropped, the buffer was full", stacklevel=3)

    # ---- for quantities and taps

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

    # ---- internal

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

    def _keep(self, loss: Tensor) -> None:
        """Copies the loss to fixed memory on the device, which a captured graph can read."""
        if self._loss is None:
            self._loss = loss.detach().float().clone()
        else:
            self._loss.copy_(loss.detach())

    def _commit(self) -> None:
        buffer = self._buffer
        calls = max(self._calls.values(), default=1)
        if buffer.grown():
            self._hand_out()
            buffer.grow()
        if not buffer.capacity:
            return  # nothing has been recorded yet
        if self._rows + calls > buffer.capacity and not buffer.capturing() and not self._writer.busy():
            self._hand_out()
        if self.on_device:
            buffer.close_step(calls, self.schedule.on_device(buffer.step, self._loss))  # type: ignore[attr-defined]  # it has
        else:
            buffer.step.fill_(self._step)
            buffer.close_step(calls)
        self._rows += calls

    def _hand_out(self) -> None:
        filled = self._buffer.hand_out()
        self._rows = 0
        if filled is not None:
            self._writer.put(filled)


def _without_grad(observe: Callable[[Tensor | None, Tensor], None], x: Tensor | None, dy: Tensor) -> None:
    with torch.no_grad():
        observe(x, dy)
