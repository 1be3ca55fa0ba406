"""The files of a recording. A thread writes them during the training, and they are read as named arrays.

A recording is a folder. ``index.json`` lists the quantities with their rows and options. ``part-000000.npz``,
``part-000001.npz``, ... have the steps in order: ``step`` [n], ``call`` [n], and for each quantity and layer a float64
array ``quantity/layer`` [n, rows, ...], with NaN where a step recorded nothing. A part is either complete or absent.
"""

import json
import math
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from .buffer import Filled, Key, Place
from .quantities import QUANTITIES, Quantity, make

INDEX = "index.json"
WAITING_BYTES = 256 << 20  # bytes that may wait for the disk before a full ring is no longer handed out


class Writer:
    """Writes the rows of the ring in a thread of its own. In a distributed run rank 0 writes for all ranks."""

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
        # never closed. No part is lost, and the thread does not run while the interpreter shuts down.
        self._thread: ThreadPoolExecutor | None = None
        if self._rank == 0:
            existing = parts(self.folder)
            if existing and not append:
                raise ValueError(
                    f"probes: {self.folder} has records already; choose another folder, or append=True to add to them"
                )
            self.folder.mkdir(parents=True, exist_ok=True)
            self._next = 1 + max((int(path.stem.split("-")[1]) for path in existing), default=-1)
            self._write_index()
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="bnkern probes")

    def busy(self) -> bool:
        """Whether the limit of waiting bytes is reached."""
        return self._waiting >= WAITING_BYTES

    def put(self, filled: Filled) -> None:
        """Queues rows for writing. With several ranks this is a collective call."""
        if self.ranks > 1:
            filled = self._gathered(filled)
        if self._thread is not None:
            with self._lock:
                self._waiting += filled.rows.nbytes
            self._thread.submit(self._write_in_turn, filled)

    def wait(self) -> None:
        """Waits until all queued rows are on the disk. Raises the error of the thread if there was one."""
        if self._thread is not None:
            self._thread.submit(int).result()  # an empty task, which runs after all earlier ones
        self.raise_if_failed()

    def raise_if_failed(self) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            raise OSError(f"probes: cannot write to {self.folder}: {error}") from error

    def close(self, dropped: int) -> None:
        """Waits until everything is written and ends the thread. Raises its error if there was one."""
        if self._thread is not None:
            self._thread.shutdown()
            self._dropped = dropped
            if self._error is None and dropped:
                self._write_index()
        self.raise_if_failed()

    def _gathered(self, filled: Filled) -> Filled:
        """Gathers the rows of all ranks on rank 0: [ranks, count, width]. All make the same steps, so counts agree."""
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
        merges = {name: quantity.merge for name, quantity in self.quantities.items()} if self.ranks > 1 else None
        write_rows(self.folder, self._next, filled.places, rows[..., :count, :], ids, merges)
        self._next += 1

    def _write_index(self) -> None:
        write_index(self.folder, self.quantities.values(), self._unserved, self.ranks, self._dropped)


def write_index(
    folder: Path,
    quantities: Iterable[Quantity],
    unserved: Mapping[tuple[str, str], str],
    ranks: int = 1,
    dropped: int = 0,
) -> None:
    """Writes ``index.json``, which names the rows of the records."""
    index: dict[str, Any] = {
        "format": 1,
        "quantities": {
            q.name: {"rows": list(q.rows), "options": q.options() if QUANTITIES.get(q.name) is type(q) else None}
            for q in quantities
        },
        "unserved": [[name, layer, why] for (name, layer), why in unserved.items()],
        "ranks": ranks,
        "dropped": dropped,
    }
    replace(folder / INDEX, lambda file: file.write(json.dumps(index, indent=1).encode()))


def write_rows(
    folder: Path,
    number: int,
    places: Mapping[Key, Place],
    rows: np.ndarray,
    ids: np.ndarray,
    merges: Mapping[str, Callable[[np.ndarray], np.ndarray]] | None = None,
) -> None:
    """Writes rows [n, width] with ids [n, 2] as a part, or rows [ranks, n, width], which ``merges`` joins."""
    arrays = {"step": ids[:, 0], "call": ids[:, 1]}
    for (name, layer), (offset, shape) in places.items():
        values = rows[..., offset : offset + math.prod(shape)].reshape(*rows.shape[:-1], *shape)
        if merges:
            values = merges[name](values)
        if not np.isnan(values).all():
            arrays[f"{name}/{layer}"] = values
    write_part(folder / f"part-{number:06}.npz", arrays)


def parts(folder: Path) -> list[Path]:
    """Returns the parts of a recording, in order."""
    return sorted(folder.glob("part-*.npz"))


def write_part(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes one part, which is then either complete or absent."""
    replace(path, lambda file: np.savez(file, **arrays))  # type: ignore[arg-type]  # no name is allow_pickle


def replace(path: Path, write) -> None:
    """Writes under another name and then renames the file, so that no reader finds an incomplete one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            write(file)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def truncate(path: str | PathLike, step: int) -> None:
    """Removes the records from ``step`` on, which a run that resumes from there will write again."""
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
    """A recording: ``steps`` [n] and ``calls`` [n] of its rows, and named arrays for each quantity and layer.

    ``recording["activation_moments"]["layer1.norm"]["mean"]`` is [n, C], with NaN in rows that have no such record.
    ``recording.index`` is the content of index.json.
    """

    def __init__(self, path: str | PathLike) -> None:
        folder = Path(path)
        if not (folder / INDEX).is_file():
            raise FileNotFoundError(f"no recording in {folder}: there is no {INDEX}")
        self.index = json.loads((folder / INDEX).read_text())
        contents = [dict(np.load(part)) for part in parts(folder)]
        counts = [len(part["step"]) for part in contents]
        self.steps = np.concatenate([part.pop("step") for part in contents] or [np.zeros(0, np.int64)])
        self.calls = np.concatenate([part.pop("call") for part in contents] or [np.zeros(0, np.int64)])
        self._raw: dict[str, dict[str, np.ndarray]] = {name: {} for name in self.index["quantities"]}
        for name in dict.fromkeys(name for part in contents for name in part):
            shape = next(part[name].shape[1:] for part in contents if name in part)
            pieces = [
                part.get(name, np.full((count, *shape), np.nan)) for part, count in zip(contents, counts, strict=True)
            ]
            quantity, layer = name.split("/", 1)
            self._raw[quantity][layer] = np.concatenate(pieces)

    @property
    def quantities(self) -> list[str]:
        """The names of the recorded quantities."""
        return list(self._raw)

    def layers(self, quantity: str) -> list[str]:
        """Returns the layers that recorded a quantity, in the order of the model."""
        return list(self._of(quantity))

    def __getitem__(self, quantity: str) -> dict[str, dict[str, np.ndarray]]:
        """Returns {layer: {name: array [n, ...]}} of a quantity."""
        entry = self.index["quantities"].get(quantity, {})
        if entry.get("options") is None:  # a quantity that is not in the table: its records as they are
            return {
                layer: {row: values[:, k] for k, row in enumerate(entry["rows"])}
                for layer, values in self._of(quantity).items()
            }
        definition = make(quantity, **entry["options"])
        return {
            layer: definition.derive(_with_rows(values, entry["rows"], definition.rows))
            for layer, values in self._of(quantity).items()
        }

    def array(self, quantity: str, name: str) -> np.ndarray:
        """Returns one named array of all layers as [layer, n, channel, ...], with NaN for missing channels."""
        arrays = [layer[name] for layer in self[quantity].values()]
        shape = np.max([values.shape for values in arrays], 0)
        stacked = np.full((len(arrays), *shape), np.nan)
        for target, values in zip(stacked, arrays, strict=True):
            target[tuple(slice(size) for size in values.shape)] = values
        return stacked

    def table(self, quantity: str) -> dict[str, np.ndarray]:
        """Returns columns of equal length for ``pandas.DataFrame``: step, call, layer, channel and the named arrays.

        This is for quantities with one number for each layer or channel. The channel of the former is 0.
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


def _with_rows(values: np.ndarray, recorded: list[str], rows: tuple[str, ...]) -> np.ndarray:
    """Returns records [n, recorded, ...] as [n, rows, ...]. A row that an older version did not record is NaN."""
    if recorded == list(rows):
        return values
    return np.stack(
        [values[:, recorded.index(row)] if row in recorded else np.full_like(values[:, 0], np.nan) for row in rows], 1
    )


def load(path: str | PathLike) -> Recording:
    """Reads a recording; see :class:`Recording`. Raises a FileNotFoundError if there is none."""
    return Recording(path)
