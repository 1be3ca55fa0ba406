"""A batch of 128 training images of the 50,000 on the device: gathered, cropped, flipped and normalised.

``augment`` does all of this; ``normalise`` only gathers and normalises. Every call makes another batch, in memory that
is already allocated if the provider can use it. The eager forms draw from torch's generator. "eager" works on all
images at once, by indices. "eager one by one" works on one image after the other, as torchvision's transforms do, but
on tensors.
"""

from collections.abc import Callable
from itertools import cycle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases.shapes import DTYPES, LAYOUTS, Case
from bnkern.train.cifar10 import Batches, Split

IMAGES = 50_000
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


def cases(device: torch.device) -> list[Case]:
    return [Case("images", layout, dtype) for layout in LAYOUTS for dtype in ("fp32", "bf16")]


class Eager:
    """The same in plain torch, for all images at once or one by one."""

    def __init__(self, split: Split, case: Case, augment: bool) -> None:
        self.images, self.labels = split
        device = self.images.device
        self.count, self.dtype, self.memory_format = case.size[0], DTYPES[case.dtype], LAYOUTS[case.layout]
        self.augment = augment
        self.order = torch.randperm(len(self.labels), device=device)
        self.mean, self.std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (MEAN, STD))
        self.starts = cycle(range(0, len(self.labels) - self.count + 1, self.count))

    def _normalised(self, images: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        images = ((images.float() / 255 - self.mean) / self.std).to(self.dtype, memory_format=self.memory_format)
        return images, self.labels[chosen]

    def _chosen(self) -> Tensor:
        start = next(self.starts)
        return self.order[start : start + self.count]

    def at_once(self) -> tuple[Tensor, Tensor]:
        chosen = self._chosen()
        images, device = self.images[chosen], chosen.device
        if self.augment:
            side, k = torch.arange(32, device=device), torch.arange(self.count, device=device)
            down, right = torch.randint(9, (2, self.count, 1), device=device)
            flip = torch.rand(self.count, 1, device=device) < 0.5
            y, x = down + side, right + torch.where(flip, 31 - side, side)
            images = F.pad(images, (4, 4, 4, 4))[k[:, None, None], :, y[:, :, None], x[:, None, :]]
            images = images.permute(0, 3, 1, 2)
        return self._normalised(images, chosen)

    def one_by_one(self) -> tuple[Tensor, Tensor]:
        chosen = self._chosen()
        images = []
        for i in chosen.tolist():
            image = self.images[i]
            if self.augment:
                down, right = torch.randint(9, (2,)).tolist()
                image = F.pad(image, (4, 4, 4, 4))[:, down : down + 32, right : right + 32]
                image = image.flip(2) if torch.rand(()) < 0.5 else image
            images.append(image)
        return self._normalised(torch.stack(images), chosen)


@pytest.fixture(scope="module")
def split(device: torch.device, request: pytest.FixtureRequest) -> Split:
    count = 64 if request.config.getoption("quick") else IMAGES
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return Split(images.to(device), torch.randint(10, (count,), generator=generator).to(device))


@pytest.mark.parametrize("op", ["augment", "normalise"])
def test_augment(op: str, case: Case, mode: str, split: Split, compare: Callable) -> None:
    options = {"augment": op == "augment", "dtype": DTYPES[case.dtype], "memory_format": LAYOUTS[case.layout]}
    batches = Batches(split, case.size[0], 0, MEAN, STD, **options)
    batches.start(0)
    positions = cycle([torch.tensor(k, device=batches.device) for k in range(len(batches))])
    eager = Eager(split, case, op == "augment")
    count = batches.shape[0]
    moved = {"bytes": count * (3072 * (1 + case.itemsize) + 3 * 8), "images": count}
    compare(
        op,
        case,
        {
            "bnkern": lambda out: batches.fill(next(positions), *out),
            "eager": lambda out: eager.at_once(),
            "eager one by one": lambda out: eager.one_by_one(),
        },
        make_data=lambda: batches.at(0, 0),
        mode=mode,
        moved=lambda name: moved,
    )
