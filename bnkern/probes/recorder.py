"""``record`` attaches quantities to the layers of a model, collects the records of each step and writes them to files.

The order in a step is: forwards, backwards, ``rec.step(loss)``, ``optimizer.zero_grad()``.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from os import PathLike

import torch
from torch import Tensor, nn

from .attachment import Attachment
from .buffer import Buffer
from .files import Writer
from .quantities import Quantity, make
from .schedules import every

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


class Recorder(Attachment):
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
        super().__init__(Buffer(first_step, capacity), in_eval)
        self.schedule, self.on_device = schedule, on_device
        self._step = first_step
        self._loss: Tensor | None = None
        self._rows = 0  # upper bound of the rows in the ring
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
            self._commit(self._measure())
        self._begin_step()
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
        self._begin_step()
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

    # ---- internal

    def _keep(self, loss: Tensor) -> None:
        """Copies the loss to fixed memory on the device, which a captured graph can read."""
        if self._loss is None:
            self._loss = loss.detach().float().clone()
        else:
            self._loss.copy_(loss.detach())

    def _commit(self, calls: int) -> None:
        buffer = self._buffer
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
