"""Recorded files: written by a thread while training goes on, read as named arrays.

A recording is a folder. ``index.json`` says which quantities, their rows and options; ``part-000000.npz``,
``part-000001.npz``, ... hold the steps in order: ``step`` [n], ``call`` [n], and per quantity and layer an array
``quantity/layer`` [n, rows, ...] of float64, NaN where a step recorded nothing. Each part appears whole or not at all.
"""

import json
import os
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from .buffer import Filled
from .quantities import QUANTITIES, Quantity, make

INDEX = "index.json"
WAITING_BYTES = 256 << 20  # what may wait to be written before the ring is left full


class Writer:
    """Writes what the ring hands out, in its own thread; in a distributed run the first rank writes for all."""

    def __init__(
        self, out: str | PathLike, quantities: list[Quantity], unserved: Mapping[tuple[str, str], str], append: bool
    ) -> None:
        self.folder = Path(out)
        self.quantities = {quantity.name: quantity for quantity in quantities}
        self._unserved = unserved
        self.ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        self._rank = dist.get_rank() if self.ranks > 1 else 0
        self._error: BaseException | None = None
        self._dropped = 0
        self._waiting, self._lock = 0, threading.Lock()  # bytes
        # One thread, so that parts are written in order. The interpreter waits for it at exit even if the recording was
        # never closed: no part is lost, and the thread does not run while the interpreter shuts down.
        self._thread: ThreadPoolExecutor | None = None
        if self._rank == 0:
            existing = parts(self.folder)
            if existing and not append:
                raise ValueError(
                    f"probes: {self.folder} holds records already; choose another folder, or append=True to go on"
                )
            self.folder.mkdir(parents=True, exist_ok=True)
            self._next = 1 + max((int(path.stem.split("-")[1]) for path in existing), default=-1)
            self._write_index()
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="bnkern probes")

    def busy(self) -> bool:
        """Whether as much is waiting as may."""
        return self._waiting >= WAITING_BYTES

    def put(self, filled: Filled) -> None:
        """Hand over rows; with several ranks, a collective call."""
        if self.ranks > 1:
            filled = self._gathered(filled)
        if self._thread is not None:
            with self._lock:
                self._waiting += filled.rows.nbytes
            self._thread.submit(self._write_in_turn, filled)

    def wait(self) -> None:
        """Until all that was put is on the disk; raises what went wrong."""
        if self._thread is not None:
            self._thread.submit(int).result()  # does nothing, after all that was put before it
        self.raise_if_failed()

    def raise_if_failed(self) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            raise OSError(f"probes: cannot write to {self.folder}: {error}") from error

    def close(self, dropped: int) -> None:
        """Wait until all is written; raises what went wrong."""
        if self._thread is not None:
            self._thread.shutdown()
            self._dropped = dropped
            if self._error is None and dropped:
                self._write_index()
        self.raise_if_failed()

    def _gathered(self, filled: Filled) -> Filled:
        """All ranks' rows on the first: [ranks, count, width]. The ranks step together, so their counts agree."""
        if filled.ready is not None:
            filled.ready.synchronize()
        count = int(filled.count)
        rows = filled.rows[:count].contiguous()
        backend = dist.get_backend()
        device = torch.device("cuda", torch.cuda.current_device()) if backend == "nccl" else rows.device
        rows = rows.to(device)
        all_rows = [torch.empty_like(rows) for _ in range(self.ranks)] if self._rank == 0 else None
        dist.gather(rows, all_rows, dst=0)
        if filled.home is not None:
            filled.home.append(filled.rows)
        if all_rows is None:
            return filled
        return filled._replace(rows=torch.stack(all_rows).cpu(), ids=filled.ids[:count], ready=None, home=None)

    def _write_in_turn(self, filled: Filled) -> None:
        if self._error is None:
            try:
                self._write(filled)
            except BaseException as error:
                self._error = error
        with self._lock:
            self._waiting -= filled.rows.nbytes
        if filled.home is not None:
            filled.home.append(filled.rows)

    def _write(self, filled: Filled) -> None:
        if filled.ready is not None:
            filled.ready.synchronize()
        count = int(filled.count)
        if not count:
            return
        rows, ids = filled.rows.numpy(), filled.ids[:count].numpy()
        arrays = {"step": ids[:, 0], "call": ids[:, 1]}
        for (name, layer), (offset, shape) in filled.places.items():
            size = int(np.prod(shape))
            if self.ranks > 1:
                values = rows[:, :, offset : offset + size].reshape(self.ranks, count, *shape)
                values = self.quantities[name].merge(values)
            else:
                values = rows[:count, offset : offset + size].reshape(count, *shape)
            if not np.isnan(values).all():
                arrays[f"{name}/{layer}"] = values
        write_part(self.folder / f"part-{self._next:06}.npz", arrays)
        self._next += 1

    def _write_index(self) -> None:
        known = [quantity for quantity in self.quantities.values() if QUANTITIES.get(quantity.name) is type(quantity)]
        index: dict[str, Any] = {
            "format": 1,
            "quantities": {q.name: {"rows": list(q.rows), "options": None} for q in self.quantities.values()},
            "unserved": [[name, layer, why] for (name, layer), why in self._unserved.items()],
            "ranks": self.ranks,
            "dropped": self._dropped,
        }
        for quantity in known:
            index["quantities"][quantity.name]["options"] = quantity.options()
        replace(self.folder / INDEX, lambda file: file.write(json.dumps(index, indent=1).encode()))


def parts(folder: Path) -> list[Path]:
    """The parts of a recording, in order."""
    return sorted(folder.glob("part-*.npz"))


def write_part(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """One part, whole or not at all."""
    replace(path, lambda file: np.savez(file, **arrays))  # type: ignore[arg-type]  # no name is allow_pickle


def replace(path: Path, write) -> None:
    """Write beside the place, then rename: a reader never sees half a file."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(beside, "wb") as file:
            write(file)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def truncate(path: str | PathLike, step: int) -> None:
    """Cut a recording back to the steps before ``step``: what a run that resumes from there will write again."""
    for part in parts(Path(path)):
        with np.load(part) as arrays:
            kept = arrays["step"] < step
            if kept.all():
                continue
            content = {name: arrays[name][kept] for name in arrays.files}
        if kept.any():
            write_part(part, content)
        else:
            part.unlink()


class Recording:
    """What was recorded: ``steps`` [n] and ``calls`` [n] of its rows, and by quantity and layer the named arrays.

    ``recording["activation_moments"]["layer1.norm"]["mean"]`` is [n, C]; NaN where that row recorded nothing there.
    ``recording.index`` is the folder's index.json.
    """

    def __init__(self, path: str | PathLike) -> None:
        folder = Path(path)
        if not (folder / INDEX).is_file():
            raise FileNotFoundError(f"no recording in {folder}: there is no {INDEX}")
        self.index = json.loads((folder / INDEX).read_text())
        found = [dict(np.load(part)) for part in parts(folder)]
        counts = [len(part["step"]) for part in found]
        self.steps = np.concatenate([part.pop("step") for part in found] or [np.zeros(0, np.int64)])
        self.calls = np.concatenate([part.pop("call") for part in found] or [np.zeros(0, np.int64)])
        self._raw: dict[str, dict[str, np.ndarray]] = {name: {} for name in self.index["quantities"]}
        for name in dict.fromkeys(name for part in found for name in part):
            shape = next(part[name].shape[1:] for part in found if name in part)
            pieces = [
                part.get(name, np.full((count, *shape), np.nan)) for part, count in zip(found, counts, strict=True)
            ]
            quantity, layer = name.split("/", 1)
            self._raw[quantity][layer] = np.concatenate(pieces)

    @property
    def quantities(self) -> list[str]:
        """The names of the quantities."""
        return list(self._raw)

    def layers(self, quantity: str) -> list[str]:
        """The layers that recorded a quantity, in the order of the model."""
        return list(self._of(quantity))

    def __getitem__(self, quantity: str) -> dict[str, dict[str, np.ndarray]]:
        """{layer: {name: array [n, ...]}}."""
        entry = self.index["quantities"].get(quantity, {})
        if entry.get("options") is None:  # a quantity from elsewhere: as recorded
            return {
                layer: {row: values[:, k] for k, row in enumerate(entry["rows"])}
                for layer, values in self._of(quantity).items()
            }
        known = make(quantity, **entry["options"])
        return {layer: known.derive(values) for layer, values in self._of(quantity).items()}

    def array(self, quantity: str, name: str) -> np.ndarray:
        """One named array of all layers as [layer, n, channel, ...], NaN where a layer has fewer channels."""
        found = [layer[name] for layer in self[quantity].values()]
        shape = np.max([values.shape for values in found], 0)
        stacked = np.full((len(found), *shape), np.nan)
        for target, values in zip(stacked, found, strict=True):
            target[tuple(slice(size) for size in values.shape)] = values
        return stacked

    def table(self, quantity: str) -> dict[str, np.ndarray]:
        """Columns of equal length, ``pandas.DataFrame(recording.table(...))``: step, call, layer, channel and names.

        For quantities of one number a layer or a channel; the channel of the former is 0.
        """
        columns: dict[str, list[np.ndarray]] = {}
        for layer, arrays in self[quantity].items():
            wide = {name: v.reshape(len(v), -1) for name, v in arrays.items() if v.ndim <= 2}
            channels = max(v.shape[1] for v in wide.values())
            n = len(self.steps)
            wide |= {
                "step": np.repeat(self.steps[:, None], channels, 1),
                "call": np.repeat(self.calls[:, None], channels, 1),
                "layer": np.full((n, channels), layer),
                "channel": np.tile(np.arange(channels), (n, 1)),
            }
            for name, values in wide.items():
                columns.setdefault(name, []).append(np.broadcast_to(values, (n, channels)).ravel())
        order = ["step", "call", "layer", "channel"]
        return {name: np.concatenate(columns[name]) for name in [*order, *(c for c in columns if c not in order)]}

    def _of(self, quantity: str) -> dict[str, np.ndarray]:
        if quantity not in self._raw:
            raise KeyError(f"{quantity!r} was not recorded; there are {', '.join(self._raw)}")
        return self._raw[quantity]


def load(path: str | PathLike) -> Recording:
    """Read a recording; see :class:`Recording`. Raises FileNotFoundError where there is none."""
    return Recording(path)
