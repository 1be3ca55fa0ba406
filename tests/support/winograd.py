"""Operands for the CPU's 3 x 3 convolution."""

import torch
from torch import Tensor

from bnkern.backends import cpu

# Images, channels in and out, rows and columns: groups of 32 and of 16 outputs, several groups, odd sizes, single rows,
# groups of tiles that are not full, bands over several images, several chunks.
SIZES = [
    (3, 16, 16, 4, 32),
    (2, 16, 64, 3, 8),
    (3, 32, 32, 5, 16),
    (2, 32, 48, 2, 16),
    (3, 64, 64, 8, 8),
    (2, 64, 16, 1, 16),
    (5, 48, 32, 7, 7),
    (1, 16, 16, 1, 1),
    (2, 80, 16, 2, 3),
    (20, 16, 16, 16, 32),
]


def operands(n: int, inputs: int, outputs: int, h: int, w: int) -> tuple[Tensor, Tensor, Tensor]:
    """x, the weight, and the output's gradient."""
    torch.manual_seed(2)
    x, weight, dy = torch.randn(n, inputs, h, w), torch.randn(outputs, inputs, 3, 3), torch.randn(n, outputs, h, w)
    return (*(t.contiguous(memory_format=torch.channels_last) for t in (x.relu(), weight, dy)),)


def gradient_of(x: Tensor, dy: Tensor, absolute: bool = False) -> Tensor:
    wanted, ones = (not absolute, absolute, False, False), (1, 1)
    return cpu.conv_grad_signs(x, dy, (3, 3), ones, ones, wanted, winograd=True)[int(absolute)]
