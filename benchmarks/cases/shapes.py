"""The cases of the benchmarks: named shapes and sets with their reasons, layouts, dtypes and random data."""

import os
from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

# The batch norms of ResNet-50 at 224 x 224, by channels and side.
RESNET50 = ((64, 112), (64, 56), (256, 56), (128, 28), (512, 28), (256, 14), (1024, 14), (512, 7), (2048, 7))
# One axis at a time, from 0.4 MB in fp32, where the fixed cost of a call matters, to 103 MB, larger than any cache.
GROWTH = {
    "N": {f"n{n}": (n, 64, 28, 28) for n in (2, 8, 32, 128, 512)},
    "C": {f"c{c}": (32, c, 28, 28) for c in (4, 16, 64, 256, 1024)},
    "S": {f"s{side * side}": (32, 64, side, side) for side in (7, 14, 28, 56, 112)},
}

SHAPES = {
    "stage1": (128, 16, 32, 32),  # CIFAR ResNet at batch 128, first stage: few channels, 8 MB in fp32, cached
    "stage2": (128, 32, 16, 16),  # its second stage
    "stage3": (128, 64, 8, 8),  # its third: 2 MB in fp32, short planes, the fixed cost of a call matters
    "large": (32, 256, 56, 56),  # a ResNet-50 stage at 32 images: 103 MB in fp32, larger than any cache
    "large64": (64, 256, 56, 56),  # the same at 64 images: more than 64 MB in bf16 too
    "least": (2, 16, 4, 4),  # 2 KB: only the fixed cost of a call
    "head": (32, 64, 1, 1),  # one position per channel, as after the last pooling of a network
    "few_images": (4, 3, 32, 32),  # 12 KB; also the images of a network under --quick
    "patch": (8, 64, 32, 32),  # 2 MB: a few images of a detector or a U-Net
    "narrow": (33, 17, 31, 29),  # odd in every axis: planes are not aligned to vectors, and channels do not fill one
    "sevens": (64, 2048, 7, 7),  # planes of 49 values, and more channels than one block holds
    "three": (128, 3, 32, 32),  # three channels: fewer than threads, blocks or lanes of a vector
    "inception": (16, 192, 35, 35),  # an odd side and a round number of channels
    "wide_image": (4, 128, 1024, 1024),  # 2.1 GB in fp32: larger than any cache, planes of 4 MB
    "past_2_31": (1100, 32, 256, 256),  # 2.3e9 elements: indices need more than 32 bits
    "images": (128, 3, 32, 32),  # a batch of CIFAR images, for whole networks
    "images32": (32, 3, 32, 32),  # a quarter of it, for deep networks
    "tiny": (8, 16, 7, 7),  # for --quick; planes that are no multiple of a vector
    **{f"r50_{n}_{c}x{side}": (n, c, side, side) for n in (64, 256) for c, side in RESNET50},
    **{name: size for axis in GROWTH.values() for name, size in axis.items()},
}

# Shapes that are measured together, and why.
SETS = {
    "cifar": ("stage1", "stage2", "stage3"),  # the paper's networks; fixed costs matter
    "beyond": ("large",),  # memory bandwidth matters; the only such shape that two cores measure quickly
    "small": ("least", "head", "few_images", "patch"),  # the fixed cost of a call, not its bytes
    "odd": ("narrow", "sevens", "three", "inception"),  # sizes that vectors, blocks and threads do not divide
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
        """Normal values, with a different mean and scale for each channel."""
        mean = torch.randn(1, self.size[1], 1, 1, device=device)
        spread = torch.rand(1, self.size[1], 1, 1, device=device) + 0.5
        return self.normal(device).mul_(spread).add_(mean)


class Inputs(NamedTuple):
    """The arguments of batch norm that have the size of the input."""

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


# The number of tensors of the input's size that a comparison of whole batch norms holds: inputs, outputs, gradients,
# and what each provider keeps between calls.
TENSORS_AT_ONCE = 16


def memory(device: torch.device) -> int:
    """Bytes that are free on the device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def named(names: Sequence[str]) -> list[str]:
    """The names of the shapes in sets and shapes, each once; "all" is every set. ValueError for an unknown name."""
    shapes = {}
    for name in names:
        if name != "all" and name not in SETS and name not in SHAPES:
            raise ValueError(f"no shape or set is called {name!r}; the names are all, {', '.join((*SETS, *SHAPES))}")
        every = [shape for members in SETS.values() for shape in members] if name == "all" else SETS.get(name, (name,))
        shapes |= dict.fromkeys(every)
    return list(shapes)


def cases(names: Sequence[str], device: torch.device) -> list[Case]:
    """Each shape, or each shape of a set, in both layouts and in fp32 and bf16, on a GPU also in fp16."""
    dtypes = ("fp32", "bf16", "fp16") if device.type == "cuda" else ("fp32", "bf16")
    return [Case(name, layout, dtype) for name in named(names) for layout in LAYOUTS for dtype in dtypes]
