"""The convolutions for the tests of every backend's ``conv_grad_signs``, and the bound of the error."""

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from bnkern.backends.reference import accumulator
from tests.support.cases import EPS32, LAYOUTS


@dataclass(frozen=True)
class ConvCase:
    """Shapes of x [N, I, H, W] and of the kernel, the layouts of x and dy, and the reason for the case."""

    name: str
    x_shape: tuple[int, int, int, int]
    outputs: int
    kernel: tuple[int, int]
    reason: str
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    x_layout: str = "channels_last"
    dy_layout: str = "channels_last"

    def __str__(self) -> str:
        return self.name

    @property
    def dy_shape(self) -> tuple[int, int, int, int]:
        sizes = zip(self.x_shape[2:], self.kernel, self.stride, self.padding, strict=True)
        return (self.x_shape[0], self.outputs, *((size + 2 * pad - k) // step + 1 for size, k, step, pad in sizes))

    @property
    def geometry(self) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
        return self.kernel, self.stride, self.padding

    def operands(self, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor]:
        """x with zeros and both signs, and dy with a few zeros."""
        generator = torch.Generator().manual_seed(zlib.crc32(self.name.encode()))

        def normal(shape: tuple[int, ...]) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        x, dy = normal(self.x_shape), normal(self.dy_shape)
        x = torch.where(x < -1, x, x.clamp(min=0))
        dy = torch.where(dy.abs() < 0.2, 0.0, dy)
        return tuple(
            LAYOUTS[layout](t.to(dtype).to(device)) for t, layout in ((x, self.x_layout), (dy, self.dy_layout))
        )


ONE, TWO = (1, 1), (2, 2)
CONV_CASES = [
    ConvCase("stage1", (6, 16, 32, 32), 16, (3, 3), "a CIFAR ResNet's first stage", ONE, ONE),
    ConvCase("stage1_nchw", (6, 16, 32, 32), 16, (3, 3), "in planes", ONE, ONE, "contiguous", "contiguous"),
    ConvCase("stage2_down", (5, 16, 32, 32), 32, (3, 3), "stride 2, odd batch", TWO, ONE),
    ConvCase("stage2_nchw", (3, 32, 16, 16), 64, (3, 3), "stride 2, in planes", TWO, ONE, "contiguous", "contiguous"),
    ConvCase("stage3", (40, 64, 8, 8), 64, (3, 3), "several images to a block, several chunks", ONE, ONE),
    ConvCase("projection", (6, 16, 32, 32), 32, ONE, "1x1 with stride 2: rows and columns never read", TWO),
    ConvCase("projection_nchw", (6, 20, 9, 9), 33, ONE, "the same in planes", TWO, (0, 0), "contiguous", "contiguous"),
    ConvCase("stem", (4, 3, 32, 32), 16, (3, 3), "three channels: less than a vector", ONE, ONE),
    ConvCase("stem_nchw", (4, 3, 33, 31), 10, (3, 3), "odd sizes, in planes", ONE, ONE, "contiguous", "contiguous"),
    ConvCase("imagenet", (1, 3, 70, 90), 20, (7, 7), "a large kernel, one image cut into rows", TWO, (3, 3)),
    ConvCase("one_channel", (3, 1, 12, 13), 1, (3, 3), "one channel in and out", ONE, ONE),
    ConvCase("one_channel_nchw", (3, 1, 12, 13), 1, (3, 3), "in planes", ONE, ONE, "contiguous", "contiguous"),
    ConvCase("odd", (3, 17, 11, 9), 19, (3, 3), "a vector and a tail of channels", ONE, ONE),
    ConvCase("even_kernel", (2, 5, 9, 8), 6, (4, 2), "an even kernel, not square", (1, 2), (2, 0)),
    ConvCase("five_wide", (2, 33, 9, 8), 7, (1, 5), "more vectors to a run than a tile holds", ONE, (0, 2)),
    ConvCase(
        "wide_padding", (2, 6, 5, 6), 4, (3, 3), "padding beyond the kernel: some taps read only zeros", ONE, (5, 4)
    ),
    ConvCase("stride_beyond", (2, 5, 14, 17), 3, (2, 3), "a stride beyond the kernel", (3, 5), ONE),
    ConvCase("whole_image", (7, 18, 4, 5), 5, (4, 5), "the kernel covers the image: one position"),
    ConvCase("linear", (150, 30, 1, 1), 21, ONE, "1 x 1 images"),
    ConvCase("long_rows", (1, 2, 3, 700), 3, (3, 3), "rows longer than a block", ONE, ONE),
    ConvCase("mixed", (3, 20, 10, 10), 24, (3, 3), "x in rows, dy in planes", ONE, ONE, dy_layout="contiguous"),
    ConvCase("mixed_back", (3, 20, 10, 10), 24, (3, 3), "x in planes, dy in rows", ONE, ONE, x_layout="contiguous"),
    ConvCase("slices", (3, 16, 9, 9), 16, (3, 3), "views", ONE, ONE, "sliced_batch", "sliced_channels_last"),
    ConvCase("crops", (3, 16, 9, 9), 16, (3, 3), "views", ONE, ONE, "sliced_space_channels_last", "sliced_space"),
    ConvCase("expanded", (3, 8, 6, 7), 9, (3, 3), "strides of 0", ONE, ONE, "expanded_channels", "expanded_space"),
    ConvCase("reversed", (3, 8, 6, 7), 9, (3, 3), "neither layout", ONE, ONE, "reversed_axes", "reversed_axes"),
    ConvCase("misaligned", (3, 16, 6, 7), 16, (3, 3), "an odd offset", ONE, ONE, "misaligned", "misaligned"),
]


def sum_bound(abs_sum: Tensor, dtype: torch.dtype, backend: str = "") -> Tensor:
    """The bound of the error of sum and abs_sum, from the sum of absolute summands.

    16 eps32 sum |d|: float32 chains of some hundred products. The error of a chain grows with the square root of its
    length, and by half an eps per step in the worst case. The reference in float32 is torch's convolution, whose chains
    have the length of the sum, thousands of products: 128 eps32. The truth in float64 has the same chains: 128 eps64.
    """
    if accumulator(dtype) is torch.float64:
        return abs_sum * 128 * torch.finfo(torch.float64).eps
    return abs_sum * (128 if backend == "reference" else 16) * EPS32
