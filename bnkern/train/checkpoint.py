"""Checkpoints, and files that are always complete: they are written under another name, synced and then renamed.

A checkpoint file is a line that names the format, a line with the SHA-256 of the rest, and the output of ``torch.save``
for tensors and plain values. :func:`save` keeps the previous checkpoint, and :func:`load` reads it if the newest one is
damaged.
"""

import hashlib
import io
import os
import warnings
from pathlib import Path

import torch

MAGIC = b"bnkern checkpoint 1\n"
DIGEST = 64 + 1  # hexadecimal digits and a newline


class CheckpointError(RuntimeError):
    """A file is not a checkpoint of bnkern, is damaged, or belongs to another run. The message says which of these."""


def write(path: Path, state: dict, keep: Path | None = None) -> None:
    """Writes ``state`` (tensors and plain values) as a checkpoint file; see :func:`replace`."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    payload = buffer.getvalue()
    replace(path, MAGIC + hashlib.sha256(payload).hexdigest().encode() + b"\n" + payload, keep)


def read(path: Path) -> dict:
    """Returns the state in a checkpoint file, with tensors on the CPU. No code in the file is executed.

    Raises:
        CheckpointError: The file is not a checkpoint, or it is truncated or damaged.
        FileNotFoundError: There is no such file.
    """
    content = path.read_bytes()
    if not content.startswith(MAGIC):
        raise CheckpointError(f"{path} is not a checkpoint of bnkern")
    digest, payload = content[len(MAGIC) :][:DIGEST], content[len(MAGIC) + DIGEST :]
    if digest != hashlib.sha256(payload).hexdigest().encode() + b"\n":
        raise CheckpointError(f"{path} is truncated or damaged: {len(content)} bytes that do not match their checksum")
    return torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)


def save(path: Path, state: dict) -> None:
    """Calls :func:`write` and keeps the previous checkpoint as ``<name>.previous``."""
    write(path, state, _previous(path))


def load(path: Path, config: dict | None = None) -> dict | None:
    """Returns the newest valid state that :func:`save` wrote, or None if there is no file.

    If the newest file is not valid, or belongs to another run (its ``state["config"]`` is not ``config``), a warning
    says why, and the previous file is read.

    Raises:
        CheckpointError: There are files and none is valid.
    """
    problems = []
    for file in (path, _previous(path)):
        try:
            state = read(file)
            if config is not None and (saved := state.get("config", {})) != config:
                differs = [name for name in config if saved.get(name) != config[name]]
                raise CheckpointError(f"{file} belongs to another run: its {', '.join(differs)} differ")
        except FileNotFoundError:
            continue
        except CheckpointError as error:
            problems.append(str(error))
            continue
        if problems:
            warnings.warn(f"{problems[0]}; continuing from the previous one, {file.name}", RuntimeWarning, stacklevel=2)
        return state
    if problems:
        raise CheckpointError(
            "; ".join(problems) + "; no valid checkpoint is left: remove the files to restart the run"
        )
    return None


def replace(path: Path, content: bytes, keep: Path | None = None) -> None:
    """Replaces the content of a file. After a loss of power the file has either the complete new or the old content.

    With ``keep`` the old file is renamed to that path first. For a short time only the file under that path exists.
    """
    part = path.with_name(f"{path.name}.part")
    with part.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    if keep and path.exists():
        os.replace(path, keep)
    os.replace(part, path)
    folder = os.open(path.parent, os.O_RDONLY)  # syncs the rename
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _previous(path: Path) -> Path:
    return path.with_name(f"{path.name}.previous")
