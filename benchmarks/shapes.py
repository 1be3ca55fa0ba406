"""What is measured: named shapes with their reasons, layouts, dtypes and random data of them."""

from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

SHAPES = {
    "stage1": (128, 16, 32, 32),  # CIFAR ResNet at batch 128, first stage: few channels, 8 MB in fp32, cached
    "stage2": (128, 32, 16, 16),  # its second stage
    "stage3": (128, 64, 8, 8),  # its third: 2 MB in fp32, short planes, the fixed cost of a call shows
    "large": (32, 256, 56, 56),  # a ResNet-50 stage at 32 images: 103 MB in fp32, past every cache
    "large64": (64, 256, 56, 56),  # the same at 64 images: past 64 MB in bf16 too
    "least": (2, 16, 4, 4),  # 2 KB: nothing but the fixed cost of a call
    "images": (128, 3, 32, 32),  # a batch of CIFAR images, for whole networks
    "few_images": (4, 3, 32, 32),  # the same for --quick
    "tiny": (8, 16, 7, 7),  # --quick: does it run at all; planes that are no multiple of a vector
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


def cases(names: tuple[str, ...], device: torch.device) -> list[Case]:
    """Each shape in both layouts and in the dtypes worth timing: fp32 and bf16, on a GPU fp16 too."""
    dtypes = ("fp32", "bf16", "fp16") if device.type == "cuda" else ("fp32", "bf16")
    return [Case(name, layout, dtype) for name in names for layout in LAYOUTS for dtype in dtypes]
