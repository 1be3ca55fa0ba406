"""Files that are whole or not there: written beside their place, synced, renamed; checkpoints checked when read.

A checkpoint file is a line that names the format, a line with the SHA-256 of the rest, and what ``torch.save`` makes
of tensors and plain values. :func:`save` keeps the one before it, and :func:`load` falls back on that.
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
    """A file is no checkpoint of ours, or not whole, or of another run; the text says which and what to do."""


def write(path: Path, state: dict, keep: Path | None = None) -> None:
    """``state`` (tensors and plain values) as a checkpoint file; see :func:`replace`."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    payload = buffer.getvalue()
    replace(path, MAGIC + hashlib.sha256(payload).hexdigest().encode() + b"\n" + payload, keep)


def read(path: Path) -> dict:
    """The state in a checkpoint file, tensors on the CPU; nothing in the file is executed.

    Raises:
        CheckpointError: not such a file, or truncated or damaged.
        FileNotFoundError: not there.
    """
    content = path.read_bytes()
    if not content.startswith(MAGIC):
        raise CheckpointError(f"{path} is not a checkpoint of bnkern")
    digest, payload = content[len(MAGIC) :][:DIGEST], content[len(MAGIC) + DIGEST :]
    if digest != hashlib.sha256(payload).hexdigest().encode() + b"\n":
        raise CheckpointError(f"{path} is truncated or damaged: {len(content)} bytes that do not match their checksum")
    return torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)


def save(path: Path, state: dict) -> None:
    """:func:`write`, with the checkpoint that was there kept as ``<name>.previous``."""
    write(path, state, _previous(path))


def load(path: Path, config: dict | None = None) -> dict | None:
    """The newest good state that :func:`save` left, or None where it left nothing.

    A bad newest file is passed over with a warning that says what is wrong with it; so is one of another run, whose
    ``state["config"]`` is not ``config``.

    Raises:
        CheckpointError: there are files and none is good.
    """
    wrong = []
    for file in (path, _previous(path)):
        try:
            state = read(file)
            if config is not None and (there := state.get("config", {})) != config:
                differs = [name for name in config if there.get(name) != config[name]]
                raise CheckpointError(f"{file} is of another run: its {', '.join(differs)} differ")
        except FileNotFoundError:
            continue
        except CheckpointError as error:
            wrong.append(str(error))
            continue
        if wrong:
            warnings.warn(f"{wrong[0]}; going on from the one before it, {file.name}", RuntimeWarning, stacklevel=2)
        return state
    if wrong:
        raise CheckpointError("; ".join(wrong) + "; no good checkpoint is left: remove it to start the run anew")
    return None


def replace(path: Path, content: bytes, keep: Path | None = None) -> None:
    """The file's new content, all of it or, whenever the power goes, still the old one.

    With ``keep`` the old file is renamed to it first; for a moment then only that one is there.
    """
    part = path.with_name(f"{path.name}.part")
    with part.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    if keep and path.exists():
        os.replace(path, keep)
    os.replace(part, path)
    folder = os.open(path.parent, os.O_RDONLY)  # the rename itself
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _previous(path: Path) -> Path:
    return path.with_name(f"{path.name}.previous")
