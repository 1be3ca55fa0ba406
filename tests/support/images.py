"""Checks of ``augment`` and of :class:`bnkern.train.cifar10.Batches`, for any backend.

No check has a tolerance. Values are looked up in a table, and the random words are integers.
"""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from bnkern import backends
from bnkern.backends.reference.images import CROP, philox, words
from bnkern.train import cifar10
from tests.support.cases import Target

FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


class Case(NamedTuple):
    """A part of a batch:

    ``part`` images from index ``first`` on, of batch ``position`` of ``size`` images, from ``n``.
    """

    name: str
    n: int
    size: int
    part: int
    first: int
    position: int
    seed: int = 1
    epoch: int = 0
    random: bool = True

    def __str__(self) -> str:
        return self.name


CASES = [
    Case("plain", 20, 6, 6, 0, 1, random=False),
    Case("moved", 20, 6, 6, 0, 1),
    Case("one_image", 5, 1, 1, 0, 4),
    Case("whole_split", 7, 7, 7, 0, 0),
    Case("last_of_three_ranks", 20, 6, 2, 4, 2),
    Case("high_seed", 20, 6, 6, 0, 0, seed=2**63),
    Case("highest", 20, 6, 6, 0, 0, seed=2**64 - 1, epoch=2**32 - 1),
    Case("late_epoch", 20, 6, 6, 0, 0, epoch=2**20 + 3),
    Case("high_word_of_the_seed", 20, 6, 6, 0, 0, seed=5 << 32),
]
BEYOND = [Case("before", 20, 6, 6, 0, -1), Case("short_batch", 20, 6, 6, 0, 3), Case("far", 20, 6, 6, 0, 2**40)]
MANY = Case("many", 3000, 3000, 3000, 0, 0, seed=2**40 + 1, epoch=2)


def problem(case: Case, dtype: torch.dtype, layout: str, device: str = "cpu") -> tuple:
    """The arguments of a call on random images. The last five are the outputs, filled with 99, and three settings."""
    generator = torch.Generator().manual_seed(case.n)
    # 0 is the value of the padding
    images = torch.randint(1, 256, (case.n, 3, 32, 32), generator=generator, dtype=torch.uint8)
    images[0], images[-1] = 0, 255
    labels, order = torch.randint(0, 10, (case.n,), generator=generator), torch.randperm(case.n, generator=generator)
    seed = torch.tensor([case.seed], dtype=torch.uint64).view(torch.int64)
    state = torch.cat([seed, torch.tensor([case.epoch])])
    table = torch.randn(3, 256, generator=generator, dtype=torch.float64).to(dtype)
    tensors = (images, labels, order, state, torch.tensor(case.position), table)
    out = torch.full((case.part, 3, 32, 32), 99.0, dtype=dtype, device=device).contiguous(memory_format=FORMATS[layout])
    outputs = (out, torch.full((case.part,), 99, device=device))
    return (*(t.to(device) for t in tensors), *outputs, case.size, case.first, case.random)


def oracle(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Processes each image as torchvision would: pad, crop, flip, normalise."""
    images, labels, order, _, _, table, out, labels_out, *_ = problem(case, dtype, "nchw")
    for k in range(case.part):
        i = order[case.position * case.size + case.first + k].item()
        w0, w1, w2, _ = philox(words(case.seed), (case.epoch, i, CROP, 0))
        padded = torch.zeros(3, 40, 40, dtype=torch.uint8)
        padded[:, 4:36, 4:36] = images[i]
        down, right, flip = (w0 * 9 // 2**32, w1 * 9 // 2**32, w2 >= 2**31) if case.random else (4, 4, False)
        window = padded[:, down : down + 32, right : right + 32]
        window = window.flip(2) if flip else window
        out[k] = torch.stack([table[c][window[c].long()] for c in range(3)])
        labels_out[k] = labels[i]
    return out, labels_out


def same(a: Tensor, b: Tensor) -> bool:
    """Whether values and strides are equal. NaN equals NaN."""
    return a.stride() == b.stride() and torch.equal(a.nan_to_num(1e4), b.nan_to_num(1e4))


def augment(target: Target, case: Case, dtype: torch.dtype, layout: str) -> tuple[Tensor, Tensor]:
    arguments = problem(case, dtype, layout, target.device)
    backends.choose(target.backend, target.device, dtype, "augment").augment(*arguments)
    return tuple(t.cpu() for t in arguments[6:8])


def check_augment(target: Target, dtype: torch.dtype, layout: str, case: Case) -> None:
    images, labels = augment(target, case, dtype, layout)
    expected, numbers = oracle(case, dtype)
    assert same(images, expected.contiguous(memory_format=FORMATS[layout]))
    assert torch.equal(labels, numbers)


def check_augment_in_other_dtypes(target: Target, dtype: torch.dtype) -> None:
    for layout in FORMATS:
        images, _ = augment(target, CASES[1], dtype, layout)
        assert same(images, oracle(CASES[1], dtype)[0].contiguous(memory_format=FORMATS[layout]))


def check_position_beyond_the_epoch(target: Target, case: Case) -> None:
    """The CPU raises an error. Other backends read no memory out of bounds, and write NaN images and labels of -1."""
    if target.backend == "cpu":
        with pytest.raises(IndexError, match=f"position must be 0 to 2, got {case.position}"):
            augment(target, case, torch.float32, "nchw")
    else:
        images, labels = augment(target, case, torch.float32, "nchw")
        assert images.isnan().all() and (labels == -1).all()


def check_parts_of_a_batch(target: Target) -> None:
    """The parts of two ranks are the halves of the whole batch."""
    whole = augment(target, Case("", 20, 6, 6, 0, 1), torch.float32, "nchw")
    parts = [augment(target, Case("", 20, 6, 3, first, 1), torch.float32, "nchw") for first in (0, 3)]
    for expected, *halves in zip(whole, *parts, strict=True):
        assert torch.equal(expected, torch.cat(halves))


# ----------------------------------------------------------------------------------------------- batches


def make_batches(split: cifar10.Split, size: int = 8, seed: int = 1, **options: object) -> cifar10.Batches:
    return cifar10.Batches(split, size, seed, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3), **options)


def assert_same(a: tuple, b: tuple) -> None:
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y)


def check_fill(target: Target, split, memory_format: torch.memory_format) -> None:
    split = cifar10.Split(*(t.to(target.device) for t in split))
    batches = make_batches(split, size=12, augment=True, memory_format=memory_format, rank=1, world=3)
    position = torch.zeros((), dtype=torch.int64, device=target.device)
    images = torch.empty(4, 3, 32, 32, device=target.device).contiguous(memory_format=memory_format)
    labels = torch.empty(4, dtype=torch.int64, device=target.device)
    for epoch in (0, 3, 1):
        batches.start(epoch)
        places = [t.data_ptr() for t in batches._epoch]
        for index in (3, 0, 1):
            position.fill_(index)
            batches.at(7, 0)  # this does not change the started epoch
            batches.fill(position, images, labels)
            assert_same((images, labels), batches.at(epoch, index))
        batches.start(epoch)
        assert [t.data_ptr() for t in batches._epoch] == places
