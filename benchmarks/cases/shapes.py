"""What is measured: named shapes and sets of them with their reasons, layouts, dtypes and random data."""

import os
from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

# The batch norms of ResNet-50 at 224 x 224, by channels and side.
RESNET50 = ((64, 112), (64, 56), (256, 56), (128, 28), (512, 28), (256, 14), (1024, 14), (512, 7), (2048, 7))
# One axis at a time, from 0.4 MB in fp32, where the fixed cost of a call shows, to 103 MB, past every cache.
GROWTH = {
    "N": {f"n{n}": (n, 64, 28, 28) for n in (2, 8, 32, 128, 512)},
    "C": {f"c{c}": (32, c, 28, 28) for c in (4, 16, 64, 256, 1024)},
    "S": {f"s{side * side}": (32, 64, side, side) for side in (7, 14, 28, 56, 112)},
}

SHAPES = {
    "stage1": (128, 16, 32, 32),  # CIFAR ResNet at batch 128, first stage: few channels, 8 MB in fp32, cached
    "stage2": (128, 32, 16, 16),  # its second stage
    "stage3": (128, 64, 8, 8),  # its third: 2 MB in fp32, short planes, the fixed cost of a call shows
    "large": (32, 256, 56, 56),  # a ResNet-50 stage at 32 images: 103 MB in fp32, past every cache
    "large64": (64, 256, 56, 56),  # the same at 64 images: past 64 MB in bf16 too
    "least": (2, 16, 4, 4),  # 2 KB: nothing but the fixed cost of a call
    "head": (32, 64, 1, 1),  # one position per channel, as after a network's last pooling
    "few_images": (4, 3, 32, 32),  # 12 KB; also the images of a network under --quick
    "patch": (8, 64, 32, 32),  # 2 MB: a few images of a detector or a U-Net
    "narrow": (33, 17, 31, 29),  # odd in every axis: planes start off any vector, channels fill none
    "sevens": (64, 2048, 7, 7),  # planes of 49 values, and more channels than any block holds
    "three": (128, 3, 32, 32),  # three channels: fewer than threads, blocks or vectors would like
    "inception": (16, 192, 35, 35),  # an odd side and a round number of channels
    "wide_image": (4, 128, 1024, 1024),  # 2.1 GB in fp32: past any cache, planes of 4 MB
    "past_2_31": (1100, 32, 256, 256),  # 2.3e9 elements: indices past 32 bits
    "images": (128, 3, 32, 32),  # a batch of CIFAR images, for whole networks
    "images32": (32, 3, 32, 32),  # a quarter of it, for deep networks
    "tiny": (8, 16, 7, 7),  # --quick: does it run at all; planes that are no multiple of a vector
    **{f"r50_{n}_{c}x{side}": (n, c, side, side) for n in (64, 256) for c, side in RESNET50},
    **{name: size for axis in GROWTH.values() for name, size in axis.items()},
}

# What is measured together, and why.
SETS = {
    "cifar": ("stage1", "stage2", "stage3"),  # what the paper trains, and where fixed costs decide
    "beyond": ("large",),  # memory's bandwidth decides; the one such shape that is quick to measure on two cores
    "small": ("least", "head", "few_images", "patch"),  # the cost of a call, not of its bytes
    "odd": ("narrow", "sevens", "three", "inception"),  # what vectors, blocks and threads do not divide
    "resnet50-64": tuple(f"r50_64_{c}x{side}" for c, side in RESNET50),  # a usual batch on one GPU
    "resnet50-256": tuple(f"r50_256_{c}x{side}" for c, side in RESNET50),  # a large one: 0.1 to 0.8 GB in fp32
    "huge": ("wide_image", "past_2_31"),
}
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Case(NamedTuple):
    """One shape in one layout and dtype, by their names."""

    shape: str
    layout: str
    dtype: str

    def __str__(self) -> str:
        return "-".join(self)

    @property
    def size(self) -> tuple[int, ...]:
        return SHAPES[self.shape]

    @property
    def elements(self) -> int:
        return prod(self.size)

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype].itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of one tensor."""
        return self.elements * self.itemsize

    def normal(self, device: torch.device) -> Tensor:
        """Standard normal values."""
        x = torch.empty(self.size, dtype=DTYPES[self.dtype], device=device, memory_format=LAYOUTS[self.layout])
        return x.copy_(torch.randn(self.size, device=device))

    def activations(self, device: torch.device) -> Tensor:
        """Normal values, each channel with a mean and a spread of its own."""
        mean = torch.randn(1, self.size[1], 1, 1, device=device)
        spread = torch.rand(1, self.size[1], 1, 1, device=device) + 0.5
        return self.normal(device).mul_(spread).add_(mean)


class Inputs(NamedTuple):
    """The tensors of the input's size that batch norm is called with."""

    x: Tensor
    residual: Tensor | None
    dy: Tensor

    @classmethod
    def random(cls, case: Case, device: torch.device) -> "Inputs":
        return cls(case.activations(device), case.activations(device), case.normal(device))

    def clone(self) -> "Inputs":
        return Inputs(*(t if t is None else t.clone() for t in self))

    def requiring_grad(self) -> "Inputs":
        x, residual, dy = self
        return Inputs(x.requires_grad_(), residual if residual is None else residual.requires_grad_(), dy)


QUICK = [Case("tiny", layout, "fp32") for layout in LAYOUTS]


# A comparison of whole batch norms holds so many tensors of the input's size: inputs, outputs, gradients, and what
# each provider keeps from one call to the next.
TENSORS_AT_ONCE = 16


def memory(device: torch.device) -> int:
    """Bytes that are free on the device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def named(names: Sequence[str]) -> list[str]:
    """Sets by their shapes' names, each shape once. ValueError for a name that is neither; "all" are all sets."""
    found = {}
    for name in names:
        if name != "all" and name not in SETS and name not in SHAPES:
            raise ValueError(f"no shape or set is called {name!r}: there are all, {', '.join((*SETS, *SHAPES))}")
        every = [shape for shapes in SETS.values() for shape in shapes] if name == "all" else SETS.get(name, (name,))
        found |= dict.fromkeys(every)
    return list(found)


def cases(names: Sequence[str], device: torch.device) -> list[Case]:
    """Each shape, or each of a set, in both layouts and in the dtypes worth timing: fp32, bf16, on a GPU fp16 too."""
    dtypes = ("fp32", "bf16", "fp16") if device.type == "cuda" else ("fp32", "bf16")
    return [Case(name, layout, dtype) for name in named(names) for layout in LAYOUTS for dtype in dtypes]
