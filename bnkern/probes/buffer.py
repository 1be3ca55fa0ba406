"""Where recorded numbers live until they are written: all of a step's records in one flat float64 tensor.

Kernels write into views of it. Closing a step copies it, one launch for all layers, to the next row of a ring on the
same device. The row is chosen by a cursor that lives there too: nothing asks the device anything, so a step can be
captured in a graph together with its recording. What a step did not write is NaN.
"""

import math
from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor

RING_BYTES = 64 << 20  # what the ring may hold before it is flushed, where one row does not already exceed it
MOST_ROWS = 4096


class Place(NamedTuple):
    """Where a record lies in a row, and its shape."""

    offset: int
    shape: tuple[int, ...]


Key = tuple[str, str]  # quantity, layer


class Filled(NamedTuple):
    """Rows on their way to a file, on the host once ``ready`` has come: ``count`` of them, ids [step, call]."""

    places: dict[Key, Place]
    rows: Tensor
    ids: Tensor
    count: Tensor  # type: ignore[assignment]  # hides tuple.count
    ready: torch.cuda.Event | None
    home: deque | None  # where ``rows`` go back to once they are written, to be a ring again


class Buffer:
    """The flat records of the step under way, one for each call of a layer within it, and the ring of closed steps.

    The layout holds what was reserved, and grows when a layer records for the first time: then the old ring must be
    handed out and a new one is made. Within a captured graph nothing may grow.
    """

    def __init__(self, first_step: int, capacity: int | None = None) -> None:
        self.first_step, self._capacity_wanted = first_step, capacity
        self.capacity = 0
        self.places: dict[Key, Place] = {}
        self.width = 0
        self.calls: list[Tensor] = []  # flat records of the first, second, ... call
        self._fresh: dict[Key, dict[int, Tensor]] = {}  # records by call that the layout does not hold yet
        self._slots: dict[tuple[Key, int], Tensor] = {}  # what slot() gave; making two views costs more than a look
        self._spare: deque[Tensor] = deque()  # rings that have been written: fresh memory costs more than a copy
        self.device: torch.device | None = None

    def slot(self, key: Key, call: int, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """The float64 tensor of this shape for this record of this call in the step under way."""
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

    def grown(self) -> bool:
        """Whether there are records that the layout does not hold yet."""
        return bool(self._fresh)

    def grow(self) -> None:
        """Give the fresh records places: new flat memory and a new ring; the old one must have been handed out."""
        fresh, self._fresh = self._fresh, {}
        self._slots.clear()
        self._spare = deque()  # rings still to be written go back to the old one, and are forgotten with it
        old, old_width = self.calls, self.width
        for key, calls in fresh.items():
            shape = tuple(next(iter(calls.values())).shape)
            self.places[key] = Place(self.width, shape)
            self.width += math.prod(shape)
        count = max(len(old), *(1 + call for calls in fresh.values() for call in calls))
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
        # One row more than can be handed out: where rows go that there is no room for, or that nobody wants.
        self.rows = torch.empty((self.capacity + 1, self.width), dtype=torch.float64, device=self.device)
        self.ids = torch.zeros((self.capacity + 1, 2), dtype=torch.int64, device=self.device)

    def close_step(self, calls: int, active: Tensor | None = None) -> None:
        """Copy the records of the first ``calls`` calls to the ring and forget them.

        ``active``: a boolean on the device that says whether they are wanted; None: they are.
        """
        for call, flat in enumerate(self.calls[:calls]):
            room = self.cursor < self.capacity
            wanted = room if active is None else room & active
            row = torch.where(wanted, self.cursor, self.capacity).view(1)
            self.rows.index_copy_(0, row, flat.view(1, -1))
            self.ids.index_copy_(0, row, torch.stack((self.step, torch.full_like(self.step, call))).view(1, 2))
            self.cursor += wanted
            self.dropped += ~room if active is None else ~room & active
            flat.fill_(torch.nan)

    def next_step(self) -> None:
        """Count a step on the device, or on the host as long as nothing has recorded and there is no device yet."""
        if self.device is None:
            self.first_step += 1
        else:
            self.step += 1

    def hand_out(self) -> Filled | None:
        """The ring's rows, on the host or on their way there, and an empty ring. None where there is no ring yet."""
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
        """Empty the ring without handing it out, and count on from ``step``."""
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
                f"probes: {what} would need new memory within a CUDA graph; run a recorded step before capturing"
            )

    def capturing(self) -> bool:
        """Whether a CUDA graph is being captured."""
        return self.device is not None and self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
