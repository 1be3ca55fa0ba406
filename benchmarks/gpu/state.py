"""The state of a check in its folder, from which the next command continues: the parts that ran and the native module.

For a machine from which only few files can be copied, the whole folder is also packed into pieces.
"""

import hashlib
import io
import json
import shutil
import sys
import tarfile
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import NamedTuple

from benchmarks import ROOT
from benchmarks.gpu.parts import PARTS, Part

PIECE = 15 << 20  # bytes of a piece of a pack
MODULE = f"_native{EXTENSION_SUFFIXES[0]}"


class Record(NamedTuple):
    """One attempt at a part."""

    part: str
    result: str  # "ok", "FAILED", "out of time", or why it was left out
    status: int | None  # of its process
    seconds: float

    @property
    def ran(self) -> bool:
        return self.status is not None


class State:
    def __init__(self, out: Path) -> None:
        self.out, self.path = out, out / "gpu-check.json"
        saved = json.loads(self.path.read_text()) if self.path.exists() else {"records": [], "sources": None}
        self.records = [Record(**record) for record in saved["records"]]
        self.sources: str | None = saved["sources"]

    def add(self, record: Record) -> None:
        self.records.append(record)
        if record.part == "build" and record.result == "ok":
            self.sources = sources()
            put(ROOT / "bnkern" / MODULE, self.out / MODULE)
        records = [record._asdict() for record in self.records if record.ran]
        self.path.write_text(json.dumps({"records": records, "sources": self.sources}, indent=1) + "\n")

    def last(self, name: str) -> Record | None:
        return next((record for record in reversed(self.records) if record.part == name and record.ran), None)

    def built(self) -> bool:
        """Whether the module of an earlier command serves. Puts it in its place if the machine is another one."""
        if self.sources != sources() or not (self.out / MODULE).exists():
            return False
        put(self.out / MODULE, ROOT / "bnkern" / MODULE)
        return True

    def remaining(self) -> list[Part]:
        """The parts to run: those that never ran, then those that did not succeed, and the last part of the list."""
        build, *others, last = PARTS
        new = [part for part in others if not self.last(part.name)]
        failed = [part for part in others if (record := self.last(part.name)) and record.result != "ok"]
        finished = (record := self.last(last.name)) is not None and record.result == "ok"
        return [build] * (not self.built()) + new + failed + [last] * (not finished)


def put(module: Path, target: Path) -> None:
    """Copies a module and renames the copy. A process would crash if the file that it has loaded were overwritten."""
    part = target.with_name(f"{target.name}.part")
    shutil.copy(module, part)
    part.replace(target)


def sources() -> str:
    """A digest of all that the native module depends on."""
    digest = hashlib.sha256(f"{MODULE} {sys.platform}".encode())
    for path in sorted([*(ROOT / "csrc").rglob("*.*"), ROOT / "CMakeLists.txt"]):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------------------- packs


def pack(out: Path, file: Path) -> None:
    """Writes the folder as an archive, in pieces FILE.00, FILE.01 ..., each complete before it replaces an older one.

    The second copy of a checkpoint is left out.
    """
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=3) as archive:
        archive.add(out, ".", filter=lambda info: None if info.name.endswith((".previous", ".part")) else info)
    content = buffer.getvalue()
    file.parent.mkdir(parents=True, exist_ok=True)
    pieces = [content[start : start + PIECE] for start in range(0, len(content), PIECE)]
    for k, piece in enumerate(pieces):
        part = file.with_name(f"{file.name}.part")
        part.write_bytes(piece)
        part.replace(file.with_name(f"{file.name}.{k:02}"))
    for stale in _pieces(file)[len(pieces) :]:
        stale.unlink()


def unpack(file: Path, out: Path) -> None:
    """Restores the folder from the pieces of a pack."""
    pieces = _pieces(file)
    if not pieces:
        raise SystemExit(f"there is no {file}.00")
    content = b"".join(piece.read_bytes() for piece in pieces)
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:gz") as archive:
        archive.extractall(out, filter="data")


def _pieces(file: Path) -> list[Path]:
    return sorted(file.parent.glob(f"{file.name}.[0-9][0-9]"))
