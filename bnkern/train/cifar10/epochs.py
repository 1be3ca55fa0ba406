"""The batches of a training: shuffled, cropped, flipped and normalised in one pass on the device that holds the images.

All random numbers are drawn from Philox4x32-10, a counter-based generator. The same seed therefore gives the same
images in the same order on every device and for every number of ranks. The key is the seed (low word, high word), and
the counter is (epoch, image, stream, 0), where ``image`` is the index of the image in the split:

    stream 0   the images of an epoch are in ascending order of w0 * 2^32 + w1
    stream 1   crop and flip of an image in an epoch; :func:`bnkern.backends.reference.augment` specifies the bits
    stream 2   as stream 0, in epoch 0: the first images in this order are those of :func:`split_validation`
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from bnkern import backends
from bnkern.backends.reference.images import ORDER, VALIDATION, philox, words

from .sets import Split


def batches(split: Split, size: int, seed: int, epoch: int = 0) -> Iterator[Split]:
    """Yields one epoch of ``split`` in batches of ``size``. A last batch that would be smaller is left out.

    The order is a permutation that ``seed`` and ``epoch`` (below 2^20) determine. It is drawn on the CPU and therefore
    the same for every device.
    """
    generator = torch.Generator().manual_seed((seed << 20) + epoch)
    order = torch.randperm(len(split.labels), generator=generator).to(split.labels.device)
    for start in range(0, len(order) - size + 1, size):
        chosen = order[start : start + size]
        yield Split(split.images[chosen], split.labels[chosen])


class Batches:
    """The batches of a training: each epoch is a permutation of ``split`` with cropped, flipped, normalised images.

    A batch is a pure function of seed, epoch and index, so batches can be made in any order. Cropping is torchvision's
    ``RandomCrop(32, padding=4)``: the raw image gets 4 black pixels on every side, and a window of 32 x 32 is cut out
    at one of 9 x 9 positions. Then the image is flipped, left to right, with probability 1/2. Then each pixel becomes
    (pixel / 255 - mean) / std of its channel. This is computed for each of the 256 values in float64 and rounded once,
    so that every backend, layout and number of ranks gives the same bits. Without ``augment`` images are only
    normalised. The order of an epoch is the same with and without ``augment``.

    Args:
        split: uint8 images [n, 3, 32, 32] and int64 labels [n] on one device, on which the batches are made. Images
            that are not contiguous are copied once.
        size: The number of images in a batch, of all ranks together. A last batch of an epoch that would be smaller is
            left out.
        seed: 0 to 2^64 - 1.
        mean: of each channel, three numbers, for pixels from 0 to 1.
        std: of each channel, as mean.
        augment: whether images are cropped and flipped.
        dtype: of the images made, floating point; bfloat16 and float16 round once more, by way of float32.
        memory_format: of the images made: torch.contiguous_format or torch.channels_last.
        rank: of this process, 0 to world - 1. It makes the images from rank * size / world on.
        world: the number of processes. Each makes size / world images of every batch.

    Raises:
        TypeError, ValueError: An argument is not as above. The message names it.
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
        self._epoch = self._fresh()  # the epoch of start() and fill()
        self._started = False
        self._recent: int | None = None
        self._recent_epoch = self._fresh()  # the epoch of at()

    def __len__(self) -> int:
        """Returns the number of batches in an epoch."""
        return len(self.split.labels) // self.size

    def at(self, epoch: int, index: int) -> tuple[Tensor, Tensor]:
        """Returns new images and int64 labels of batch ``index`` of ``epoch`` (from 0, below 2^32).

        Each change of the epoch costs a sort of the split.
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
        """Begins an epoch for :meth:`fill`, outside of any graph. The order is always written to the same memory."""
        self._begin(self._epoch, epoch)
        self._started = True

    def fill(self, position: Tensor, images: Tensor, labels: Tensor) -> None:
        """Writes the batch with number ``position`` of the started epoch into ``images`` and ``labels``.

        The batch is that of :meth:`at`. The device reads the number when it runs the kernel, nothing is allocated, and
        the host does not wait. A CUDA graph can therefore contain the call and be replayed for every batch of every
        epoch.

        Args:
            position: int64 scalar, 0 to len(self) - 1. For other values the CPU's kernels raise an IndexError. On a
                GPU the host cannot check the value; there the images become NaN and the labels -1.
            images: A tensor of this object's ``shape``, ``dtype`` and ``memory_format``.
            labels: int64 [number of images].
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
        """Returns memory for the order of an epoch, and for the bits of the seed and the epoch."""
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
        inputs = (*self.split, *state, position, self._table)
        kernels.augment(*inputs, images, labels, self.size, self._first, self.augment)


def split_validation(split: Split, count: int, seed: int) -> tuple[Split, Split]:
    """Returns (train, validation). ``count`` images, drawn at random from all classes together, are for validation.

    Both parts keep the order of ``split``. The same seed gives the same parts on every device.
    """
    _check_seed(seed)
    if not 0 < count < len(split.labels):
        raise ValueError(f"count must leave images in both parts of {len(split.labels)}, got {count}")
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
    """Returns the numbers below ``count`` in ascending order of their 64 random bits."""
    w0, w1, _, _ = philox(words(seed), (epoch, torch.arange(count, device=device), stream, 0))
    return torch.argsort((w0 - 2**31 << 32) + w1, stable=True)  # int64 is signed: minus 2^63 keeps the order
