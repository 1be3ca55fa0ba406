"""The flight recorder: the last steps of a training in a ring on the device, written when a value is not finite.

The host never waits for the device. A step, its records and the decision whether it is faulty can be captured in a
CUDA graph. After the first faulty step the ring keeps its rows, so the host may learn of it later.
"""

import json
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .attachment import Attachment
from .buffer import Buffer
from .diagnosis import FLIGHT, LIMITS, Diagnosis, diagnose
from .files import parts, replace, write_index, write_rows
from .quantities import Quantity, make


@contextmanager
def flight_recorder(
    model: nn.Module,
    steps: int = 64,
    out: str | PathLike = "flight",
    *,
    limits: Mapping[str, float] | None = None,
    on_fault: str = "warn",
    first_step: int = 0,
) -> Iterator["FlightRecorder"]:
    """Keep the last steps of a training in memory, and write them when a value is not finite or passes a limit.

    ```python
    with bnkern.probes.flight_recorder(model, steps=64, out="run/flight") as flight:
        for images, labels in data:
            loss = criterion(model(images), labels)
            loss.backward()
            optimizer.step()
            flight.step(loss)
            optimizer.zero_grad()
    ```

    Of each step it keeps the quantities ``activation_moments`` and ``gradient_channel_signs`` of bnkern's norm layers
    (and ``bnkern.nn.Activation``), ``parameter_norms``, and the loss. The input of a norm layer is the output of the
    convolution before it. A step is *faulty* if one of these values is infinite or NaN, or passes a limit. At the first
    faulty step the recorder writes the ring and a report into ``out``, says in one sentence what it saw first, and ends
    recording. ``python -m bnkern.probes show OUT`` prints and draws the report. An exception that leaves the context
    also writes the ring (not an interrupt). Otherwise nothing is written.

    It works under torch.compile, and a step can be captured in a CUDA graph together with ``flight.step``. Then call
    ``flight.poll()`` from time to time outside the graph. With several processes each writes into ``out/rank0``,
    ``out/rank1``, ..., without communication.

    Args:
        model: any module with bnkern's norm layers.
        steps: the number of steps to keep.
        out: folder for the report. It must not have a report already.
        limits: further limits by name: ``loss`` (of the loss), ``abs_max`` (of the magnitude of a norm layer's input),
            ``gradient`` (of the norm of a parameter's gradient), ``update`` (of the norm of a parameter's update
            divided by that of the parameter before), and ``active`` (a lower limit of the share of a layer's output
            above zero: 0.01 finds dead layers).
        on_fault: "warn" warns with the sentence, and the training goes on. "raise" raises a FloatingPointError.
        first_step: the number of the first step, in a run that continues.

    Yields:
        The recorder.

    Raises:
        ValueError: The model has no norm layer that can be recorded, a limit's name is unknown, ``out`` has a report,
            or another argument is not as described.
        FloatingPointError: ``on_fault`` is "raise" and a step was faulty.
    """
    flight = FlightRecorder(model, steps, out, dict(limits or {}), on_fault, first_step)
    try:
        yield flight
    except BaseException as error:
        flight.close(error)
        raise
    flight.close()


class Ring(Buffer):
    """A buffer whose ring keeps the newest rows."""

    def _next_row(self, active: Tensor | None) -> Tensor:
        row = self.cursor % self.capacity
        if active is None:
            self.cursor += 1
            return row
        row = torch.where(active, row, self.capacity)
        self.cursor += active
        return row

    def newest(self) -> tuple[Tensor, Tensor]:
        """Returns the rows and ids [step, call] in the ring, the oldest first, on the host."""
        count = int(self.cursor)
        order = [k % self.capacity for k in range(max(count - self.capacity, 0), count)]
        return self.rows[order].cpu(), self.ids[order].cpu()


class FlightRecorder(Attachment):
    """A flight recorder in use, as ``flight_recorder`` yields it.

    Attributes:
        active: whether steps are recorded. False after a fault.
        fault: the :class:`.diagnosis.Diagnosis` of the first faulty step, or None.
        folder: of the report of this process.
    """

    def __init__(
        self,
        model: nn.Module,
        steps: int,
        out: str | PathLike,
        limits: dict[str, float],
        on_fault: str,
        first_step: int,
    ) -> None:
        if steps < 1:
            raise ValueError(f"flight_recorder: steps must be at least 1, got {steps}")
        if on_fault not in ("warn", "raise"):
            raise ValueError(f'flight_recorder: on_fault must be "warn" or "raise", got {on_fault!r}')
        if unknown := set(limits) - set(LIMITS):
            raise ValueError(f"flight_recorder: no limit is called {min(unknown)!r}; there are {', '.join(LIMITS)}")
        self.rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else None
        self.folder = Path(out) if self.rank is None else Path(out) / f"rank{self.rank}"
        if (self.folder / FLIGHT).exists() or parts(self.folder):
            raise ValueError(f"flight_recorder: {self.folder} has a report already; choose another folder")
        self._buffer: Ring
        super().__init__(Ring(first_step, steps))
        self.steps, self.limits, self.on_fault = steps, limits, on_fault
        self.fault: Diagnosis | None = None
        self.active = True
        self._quantities: list[Quantity] = [
            make(name) for name in ("activation_moments", "gradient_channel_signs", "parameter_norms")
        ]
        self._loss = _Loss()
        self._copy: tuple[Tensor, torch.cuda.Event] | None = None  # of the number of the faulty step, on the host
        try:
            self._attach(model, self._quantities, ("*",))
            device = self._buffer.device
            assert device is not None, "parameter_norms has reserved its record"
            self.reserve(self._loss, "", (), device)
            self._grow()
        except BaseException:
            self._forget()
            raise
        # Layers that torch.compile calls are not observed, so the order of the model stands in for them.
        self._layers = [layer for name, layer in self._buffer.places if name == "activation_moments"]

    # ---- for the training loop

    def step(self, loss: Tensor | float | None = None) -> None:
        """Closes the current step. Call it once per optimiser step, after backward and before ``zero_grad``.

        Outside of a CUDA graph it also polls.
        """
        if not self.active:
            return
        calls = self._measure()
        self._begin_step()
        buffer, device = self._buffer, self._faulty_step.device
        if loss is not None:
            value = torch.as_tensor(loss, dtype=torch.float64, device=device).detach()
            self.slot(self._loss, "", 0, (), device).copy_(torch.stack((value, value.isfinite())))
        if buffer.grown() or len(buffer.calls) * self.steps > buffer.capacity:
            self._grow()
        faulty = torch.stack([self._watch.faulty(flat) for flat in buffer.calls[:calls]]).any()
        running = self._faulty_step < 0
        buffer.close_step(calls, running)
        self._faulty_step.copy_(torch.where(running & faulty, buffer.step, self._faulty_step))
        buffer.next_step()
        if not buffer.capturing():
            self.poll()

    def poll(self, wait: bool = False) -> Diagnosis | None:
        """Reports a faulty step if the host knows of one. On a GPU it asks without waiting, unless ``wait``.

        Returns:
            The diagnosis, or None.

        Raises:
            FloatingPointError: There was a faulty step, and ``on_fault`` is "raise".
        """
        if self.active and self._is_known_faulty(wait):
            self.fault = self.write("fault")
            self.active = False
            if self.on_fault == "raise":
                raise FloatingPointError(self.fault.sentence)
            warnings.warn(f"flight_recorder: {self.fault.sentence} Report: {self.folder}", RuntimeWarning, stacklevel=3)
        return self.fault

    def write(self, reason: str = "asked") -> Diagnosis:
        """Writes the ring and the report into ``folder``, and returns the diagnosis. It waits for the device.

        A later call replaces the files of an earlier one.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        for part in parts(self.folder):
            part.unlink()
        write_index(self.folder, [*self._quantities, self._loss], self.unserved)
        rows, ids = self._buffer.newest()
        if len(rows):
            write_rows(self.folder, 0, self._buffer.places, rows.numpy(), ids.numpy())
        order = list(self.order) + [layer for layer in self._layers if layer not in self.order]
        content = {"reason": reason, "rank": self.rank, "limits": self.limits, "order": order}
        replace(self.folder / FLIGHT, lambda file: file.write(json.dumps(content, indent=1).encode()))
        diagnosis = diagnose(self.folder)
        replace(self.folder / "report.txt", lambda file: file.write(diagnosis.text().encode()))
        return diagnosis

    def rewind(self, step: int) -> None:
        """Forgets all steps, and numbers the current step ``step``, for example after the warm-up of a CUDA graph."""
        self._begin_step()
        self._buffer.rewind(step)
        self._faulty_step.fill_(-1)

    def close(self, error: BaseException | None = None) -> None:
        """Removes the hooks. Reports a faulty step, or writes the ring if an exception has ended the training.

        An interrupt or an exit (:class:`BaseException` only) is no failure of the training, so nothing is written.
        """
        self._forget()
        if error is None:
            self.poll(wait=True)
        elif self.active and isinstance(error, Exception):
            self._write_after(error)
        self.active = False

    # ---- internal

    def _write_after(self, error: Exception) -> None:
        """Writes the ring, with what the step that failed has recorded. Must not replace the error by another one."""
        try:
            self._measure()
            if not self._buffer.grown():
                self._buffer.close_step(len(self._buffer.calls))
            self.write(f"{type(error).__name__}: {error}")
            error.add_note(f"flight_recorder: the last steps are in {self.folder}")
        except Exception as failure:
            error.add_note(f"flight_recorder: cannot write {self.folder}: {failure}")

    def _grow(self) -> None:
        """Gives new records a place. The ring begins anew."""
        buffer = self._buffer
        buffer.set_capacity(self.steps * len(buffer.calls))
        buffer.grow()
        self._faulty_step = torch.full((), -1, dtype=torch.int64, device=buffer.device)
        self._watch = _Watch(buffer, [*self._quantities, self._loss], self.limits)

    def _is_known_faulty(self, wait: bool) -> bool:
        if wait or self._faulty_step.device.type == "cpu":
            return int(self._faulty_step) >= 0
        if self._copy is None:
            host = torch.empty((), dtype=torch.int64, pin_memory=True).copy_(self._faulty_step, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self._copy = host, event
            return False
        host, event = self._copy
        if not event.query():
            return False
        self._copy = None
        return int(host) >= 0


class _Loss(Quantity):
    """The loss, as it was passed to ``step``, and whether it is finite (1 or 0)."""

    rows = ("loss", "finite")

    def __init__(self) -> None:
        super().__init__()
        self.name = "loss"  # type: ignore[misc]  # not a quantity of the table


class _Watch:
    """Decides on the device whether the records of a call are faulty. Records that are missing are NaN."""

    def __init__(self, buffer: Buffer, quantities: list[Quantity], limits: dict[str, float]) -> None:
        self.limits = limits
        rows = {quantity.name: quantity.rows for quantity in quantities}
        widths = [shape[1] for (name, _), (_, shape) in buffer.places.items() if name == "activation_moments"]

        def columns(name: str, row: str) -> Tensor:
            found: list[int] = []
            for (quantity, _), (offset, shape) in buffer.places.items():
                if quantity == name:
                    width = math.prod(shape[1:])
                    first = offset + rows[name].index(row) * width
                    found += range(first, first + width)
            return torch.tensor(found, dtype=torch.int64, device=buffer.device)

        kernels = ("activation_moments", "gradient_channel_signs")
        self.counts = torch.cat([columns(name, "nonfinite") for name in kernels])
        self.low, self.high, self.active, self.count = (
            columns("activation_moments", row) for row in ("min", "max", "active", "count")
        )
        weight, self.gradient, update = (columns("parameter_norms", row) for row in ("weight", "gradient", "update"))
        self.norms = torch.cat([weight, self.gradient, update])
        self.update = columns("parameter_norms", "relative_update")
        self.loss, self.finite = columns("loss", "loss"), columns("loss", "finite")
        self.layer_count = len(widths)
        self.layers = torch.arange(len(widths)).repeat_interleave(torch.tensor(widths, dtype=torch.int64))
        self.layers = self.layers.to(buffer.device)

    def faulty(self, flat: Tensor) -> Tensor:
        """Returns a boolean on the device for the flat records of a call."""
        found = [(flat[self.counts] > 0).any(), (flat[self.norms] == torch.inf).any(), (flat[self.finite] == 0).any()]
        for name, limit in self.limits.items():
            if name == "loss":
                found.append((flat[self.loss] > limit).any())
            elif name == "abs_max":
                found += [(flat[self.low] < -limit).any(), (flat[self.high] > limit).any()]
            elif name == "gradient":
                found.append((flat[self.gradient] > limit).any())
            elif name == "update":
                found.append((flat[self.update] > limit).any())
            elif name == "active":
                active, count = (
                    flat.new_zeros(self.layer_count).index_add_(0, self.layers, flat[columns])
                    for columns in (self.active, self.count)
                )
                found.append((active < limit * count).any())
        return torch.stack(found).any()
