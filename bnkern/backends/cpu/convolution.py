"""The CPU's kernels for convolutions: sums over the summands of a weight's gradient, and Conv2d's own 3 x 3."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from ..native import _native, plain
from ..reference import accumulator

Results = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]  # sum, abs_sum, sign_sum, nonzero


def conv_grad_signs(
    x: Tensor,
    dy: Tensor,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    wanted: tuple[bool, bool, bool, bool],
    *,
    winograd: bool = False,
) -> Results:
    """Sum, absolute sum, sign sum and number of nonzero summands of a convolution's weight gradient, where wanted.

    ``winograd``: the two sums come by Winograd's F(2 x 2, 3 x 3), of such a convolution as ``conv3x3``.
    """
    if not (x.numel() and dy.numel()):
        shape = (dy.shape[1], x.shape[1], *kernel_size)
        dtypes = (accumulator(x.dtype),) * 2 + (torch.int32,) * 2
        zeros = (torch.zeros(shape, dtype=t) if want else None for t, want in zip(dtypes, wanted, strict=True))
        sum, abs_sum, sign_sum, nonzero = zeros
        return sum, abs_sum, sign_sum, nonzero
    how = (kernel_size, stride, padding, wanted, winograd)
    # Images are read where channels or columns have unit stride; others are copied.
    x, dy = plain(x), plain(dy)
    found = _native.conv_grad_signs(x, dy, *how) or _native.conv_grad_signs(x.contiguous(), dy.contiguous(), *how)
    return cast(Results, found)  # contiguous images are not declined


def conv3x3(x: Tensor, weight: Tensor, flipped: bool = False) -> Tensor:
    """The convolution of x [N, I, H, W], float32 in channels_last, by weight [O, I, 3, 3], of stride and padding 1.

    ``flipped``: by the weight [I, O, 3, 3] turned by 180 degrees instead, which is the gradient of a convolution's
    input. By Winograd's F(2 x 2, 3 x 3); I and O are multiples of 16.
    """
    return _native.conv3x3(plain(x), plain(weight), flipped)


def prefers_own_gradient(
    x: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int], dilation: tuple[int, int], groups: int
) -> bool:
    """Whether these kernels are the faster ones for the backward of such a convolution.

    A table of what was measured (docs/log/2026-11.md): float32 in channels_last, 16 input channels or more. By
    Winograd's form where :func:`prefers_winograd` says so; with AVX-512 any other kernel beyond 1 x 1 too, whose weight
    gradient takes ``conv_grad_signs`` 0.77 to 1.00 times as long as oneDNN. Elsewhere it is slower (the 3-channel stem
    1.4 times, bfloat16) or was not measured.
    """
    return (
        x.dtype is torch.float32
        and weight.dtype is torch.float32
        and groups == 1
        and tuple(dilation) == (1, 1)
        and x.shape[1] % 16 == 0
        and weight.shape[2] * weight.shape[3] > 1
        and x.numel() > 0
        and x.is_contiguous(memory_format=torch.channels_last)
        and (_native.isa() == "avx512" or prefers_winograd(x, weight.shape[0], weight.shape[2:], stride, padding))
    )


def prefers_winograd(
    x: Tensor, outputs: int, kernel_size: Sequence[int], stride: tuple[int, int], padding: tuple[int, int]
) -> bool:
    """Whether such a convolution, of what :func:`prefers_own_gradient` accepts, goes by F(2 x 2, 3 x 3).

    Measured with AVX-512 and AVX2: 1.1 to 2.7 times oneDNN's speed; slower with less than some hundred tiles of 2 x 2,
    or with so many channels that the transformed weight outgrows the second-level cache.
    """
    n, inputs, h, w = x.shape
    return (
        tuple(kernel_size) == (3, 3)
        and tuple(stride) == tuple(padding) == (1, 1)
        and inputs % 16 == 0
        and outputs % 16 == 0
        and inputs * outputs <= 256 * 256
        and n * -(-h // 2) * -(-w // 2) >= 256
        and _native.isa() in ("avx2", "avx512")
    )
