"""The memory of recorded numbers until they are written: all records of a step are in one flat float64 tensor.

Kernels write into views of it. At the end of a step it is copied, in one launch for all layers, to the next row of a
ring on the same device. The index of the row is on the device too. The host therefore never waits for the device, and a
step can be captured in a graph together with its recording. Values that a step did not write are NaN.
"""

import math
from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor

RING_BYTES = 64 << 20  # largest size of the ring, unless two rows need more
MOST_ROWS = 4096


class Place(NamedTuple):
    """The position of a record in a row, and its shape."""

    offset: int
    shape: tuple[int, ...]


Key = tuple[str, str]  # quantity, layer


class Filled(NamedTuple):
    """``count`` rows for a file, with ids [step, call]. They are on the host when the event ``ready`` has occurred."""

    places: dict[Key, Place]
    rows: Tensor
    ids: Tensor
    count: Tensor  # type: ignore[assignment]  # hides tuple.count
    ready: torch.cuda.Event | None
    home: deque | None  # the list to which ``rows`` return after writing, to be used as a ring again


class Buffer:
    """The flat records of the current step, one for each call of a layer in it, and the ring of closed steps.

    The layout has a place for every reserved record, and grows when a layer records for the first time. Before it
    grows the old ring must be handed out, and then a new one is made. In a captured graph the layout must not grow.
    """

    def __init__(self, first_step: int, capacity: int | None = None) -> None:
        self.first_step, self._capacity_wanted = first_step, capacity
        self.capacity = 0
        self.places: dict[Key, Place] = {}
        self.width = 0
        self.calls: list[Tensor] = []  # the flat records of the first, second, ... call
        self._fresh: dict[Key, dict[int, Tensor]] = {}  # records, by call, that have no place in the layout yet
        self._slots: dict[tuple[Key, int], Tensor] = {}  # results of slot(); a look-up costs less than making two views
        self._spare: deque[Tensor] = deque()  # rings that have been written; using new memory costs more than a copy
        self.device: torch.device | None = None

    def slot(self, key: Key, call: int, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """Returns the float64 tensor of this shape for this record of this call in the current step."""
        if torch.compiler.is_compiling():
            return self._slot(key, call, shape, device)
        slot = self._slots.get((key, call))
        if slot is None or slot.shape != shape or slot.device != device:
            slot = self._slots[key, call] = self._slot(key, call, shape, device)
        return slot

    def _slot(self, key: Key, call: int, shape: tuple[int, ...], device: torch.device) -> Tensor:
        if self.device is None:
            self._begin(device)
        elif device != self.device:
            raise ValueError(f"probes: layer {key[1]!r} is on {device}, others on {self.device}; record them apart")
        place = self.places.get(key)
        if place is None:
            calls = self._fresh.setdefault(key, {})
            if call not in calls:
                self._not_in_graph(f"{key[0]} of {key[1]!r}")
                calls[call] = torch.full(shape, torch.nan, dtype=torch.float64, device=device)
            return calls[call]
        if place.shape != shape:
            raise ValueError(f"probes: {key[0]} of {key[1]!r} changed shape from {place.shape} to {shape}")
        while call >= len(self.calls):
            self._not_in_graph(f"call {call + 1} of {key[1]!r} within a step")
            self.calls.append(torch.full_like(self.calls[0], torch.nan))
        return self.calls[call][place.offset : place.offset + math.prod(shape)].view(shape)

    def set_capacity(self, rows: int) -> None:
        """Sets the number of rows of the ring that the next ``grow`` makes."""
        self._capacity_wanted = rows

    def grown(self) -> bool:
        """Whether there are records without a place in the layout."""
        return bool(self._fresh)

    def grow(self) -> None:
        """Gives new records a place, in new flat memory and a new ring. The old ring must have been handed out."""
        fresh, self._fresh = self._fresh, {}
        self._slots.clear()
        self._spare = deque()  # rings that are still being written return to the old list and are freed with it
        old, old_width = self.calls, self.width
        for key, calls in fresh.items():
            shape = tuple(next(iter(calls.values())).shape)
            self.places[key] = Place(self.width, shape)
            self.width += math.prod(shape)
        count = max([len(old), *(1 + call for calls in fresh.values() for call in calls)])
        self.calls = [
            torch.full((self.width,), torch.nan, dtype=torch.float64, device=self.device) for _ in range(count)
        ]
        for flat, before in zip(self.calls, old, strict=False):
            flat[:old_width] = before
        for key, calls in fresh.items():
            for call, values in calls.items():
                self.slot(key, call, tuple(values.shape), values.device).copy_(values)
        fitting = RING_BYTES // (8 * self.width)
        self.capacity = self._capacity_wanted or min(max(fitting, 2), MOST_ROWS)
        # One extra row. It receives records that do not fit into the ring and records that the schedule leaves out.
        self.rows = torch.empty((self.capacity + 1, self.width), dtype=torch.float64, device=self.device)
        self.ids = torch.zeros((self.capacity + 1, 2), dtype=torch.int64, device=self.device)

    def close_step(self, calls: int, active: Tensor | None = None) -> None:
        """Copies the records of the first ``calls`` calls to the ring and resets them.

        ``active`` is a boolean on the device: whether the records are kept. None means that they are.
        """
        for call, flat in enumerate(self.calls[:calls]):
            row = self._next_row(active).view(1)
            self.rows.index_copy_(0, row, flat.view(1, -1))
            self.ids.index_copy_(0, row, torch.stack((self.step, torch.full_like(self.step, call))).view(1, 2))
            flat.fill_(torch.nan)

    def _next_row(self, active: Tensor | None) -> Tensor:
        """Returns the index of the row for the next record, and counts it."""
        room = self.cursor < self.capacity
        wanted = room if active is None else room & active
        row = torch.where(wanted, self.cursor, self.capacity)
        self.cursor += wanted
        self.dropped += ~room if active is None else ~room & active
        return row

    def next_step(self) -> None:
        """Counts a step on the device, or on the host if nothing has been recorded and the device is not known yet."""
        if self.device is None:
            self.first_step += 1
        else:
            self.step += 1

    def hand_out(self) -> Filled | None:
        """Empties the ring and returns its rows, or None without a ring. Their copy to the host may be running."""
        if not self.capacity:
            return None
        ready: torch.cuda.Event | None = None
        home: deque | None = None
        if self.device is not None and self.device.type == "cuda":
            self._not_in_graph("a flush")
            host = [
                torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True)
                for t in (self.rows, self.ids, self.cursor)
            ]
            ready = torch.cuda.Event()
            ready.record()
        else:
            count = int(self.cursor)
            if 2 * count < self.capacity:
                rows = self.rows[:count].clone()
            else:
                rows, home = self.rows, self._spare
                self.rows = home.popleft() if home else torch.empty_like(rows)
            host = [rows, self.ids[:count].clone(), self.cursor.clone()]
        self.cursor.zero_()
        return Filled(dict(self.places), host[0], host[1], host[2], ready, home)

    def rewind(self, step: int) -> None:
        """Empties the ring without handing it out, and continues to count from ``step``."""
        self.first_step = step
        if self.device is not None:
            self.step.fill_(step)
            self.cursor.zero_()
            self.dropped.zero_()
        for flat in self.calls:
            flat.fill_(torch.nan)

    def _begin(self, device: torch.device) -> None:
        self.device = device
        self.step = torch.full((), self.first_step, dtype=torch.int64, device=device)
        self.cursor, self.dropped = torch.zeros(2, dtype=torch.int64, device=device).unbind()

    def _not_in_graph(self, what: str) -> None:
        if self.capturing():
            raise RuntimeError(
                f"probes: {what} needs new memory in a CUDA graph; run a recorded step before the capture"
            )

    def capturing(self) -> bool:
        """Whether a CUDA graph is being captured."""
        return self.device is not None and self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
