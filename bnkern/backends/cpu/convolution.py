"""The CPU's convolution kernels: sums over the summands of a weight's gradient, and Conv2d's own 3 x 3 convolution."""

from collections.abc import Sequence
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor

from ..calls import BackwardCall, ForwardCall
from ..native import _native, plain
from ..protocol import ConvNormBackward, ConvNormForward
from ..reference import accumulator

conv_norm_options = True
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
    """Sum, absolute sum, sign sum and number of nonzero summands of a convolution's weight gradient, where ``wanted``.

    ``winograd``: the two sums are computed with Winograd's F(2 x 2, 3 x 3). The convolution must be one of ``conv3x3``.
    """
    if not (x.numel() and dy.numel()):
        shape = (dy.shape[1], x.shape[1], *kernel_size)
        dtypes = (accumulator(x.dtype),) * 2 + (torch.int32,) * 2
        zeros = (torch.zeros(shape, dtype=t) if want else None for t, want in zip(dtypes, wanted, strict=True))
        sum, abs_sum, sign_sum, nonzero = zeros
        return sum, abs_sum, sign_sum, nonzero
    options = (kernel_size, stride, padding, wanted, winograd)
    # Images are read in place if channels or columns have unit stride. Otherwise they are copied.
    x, dy = plain(x), plain(dy)
    results = _native.conv_grad_signs(x, dy, *options)
    results = results or _native.conv_grad_signs(x.contiguous(), dy.contiguous(), *options)
    return cast(Results, results)  # never None for contiguous images


def conv3x3(x: Tensor, weight: Tensor, flipped: bool = False) -> Tensor:
    """The convolution of x [N, I, H, W], float32 in channels_last, with weight [O, I, 3, 3], stride 1 and padding 1.

    ``flipped``: the weight is [I, O, 3, 3] and is rotated by 180 degrees. This computes the input gradient of a
    convolution. Uses Winograd's F(2 x 2, 3 x 3). I and O must be multiples of 16.
    """
    return _native.conv3x3(plain(x), plain(weight), flipped)


def conv_direct(
    x: Tensor,
    weight: Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
    size: tuple[int, int] | None = None,
) -> Tensor:
    """The convolution of x [N, I, H, W], float32 in channels_last, with weight [O, I, *kernel_size], by its definition.

    ``size``: (H, W) of the input of a convolution. x is then the gradient of its output, with O channels, and the
    result is the gradient of its input. The result has a multiple of 16 channels.
    """
    return _native.conv_direct(plain(x), plain(weight), stride, padding, size)


def conv_norm_forward(
    source: ForwardCall | Tensor,
    mean: Tensor | None,
    invstd: Tensor | None,
    keep: bool,
    weight: Tensor,
    bias: Tensor | None,
    norm: ForwardCall,
) -> ConvNormForward:
    """See ``reference.conv_norm_forward``. Tensors are float32 in channels_last, channels are multiples of 16."""
    return _native.conv_norm_forward(source, mean, invstd, keep, weight, bias, norm)


def conv_norm_backward(
    behind: BackwardCall,
    sums: Tensor,
    weight: Tensor,
    before: BackwardCall | None,
    y: Tensor | None,
    shortcut: Tensor | None,
    needs: tuple[bool, bool],
) -> ConvNormBackward:
    """See ``reference.conv_norm_backward``. Tensors are as in :func:`conv_norm_forward`."""
    return _native.conv_norm_backward(behind, sums, weight, before, y, shortcut, needs)


def grad_before_act(call: BackwardCall) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """See ``reference.grad_before_act``. Tensors are as in :func:`conv_norm_forward`."""
    return _native.grad_before_act(call)


def prefers_conv_norm(x: Tensor, channels: Sequence[int]) -> bool:
    """Whether these kernels are faster for a chain of 3 x 3 convolutions of x, with these numbers of channels.

    ``channels`` are those of the values, from the input's on. The condition is :func:`prefers_winograd` for each
    convolution, for float32 in channels_last.
    """
    n, _, h, w = x.shape
    return (
        x.dtype is torch.float32
        and x.is_contiguous(memory_format=torch.channels_last)
        and all(_winograd_pays(n, *pair, h, w) for pair in pairwise(channels))
    )


def prefers_own_gradient(
    x: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int], dilation: tuple[int, int], groups: int
) -> bool:
    """Whether these kernels are faster than torch's for the backward of such a convolution.

    The rule follows measurements (docs/log/2026-11.md). It accepts float32 in channels_last with a multiple of 16 input
    channels, if :func:`prefers_winograd` is true. With AVX-512 it also accepts every other kernel, a 1 x 1 kernel only
    with at most 64 input channels, for which ``conv_grad_signs`` takes 0.55 to 1.00 times as long as oneDNN for the
    weight gradient. Other cases are slower (the stem with 3 channels 1.2 times, bfloat16), or were not measured.
    """
    return (
        x.dtype is torch.float32
        and weight.dtype is torch.float32
        and groups == 1
        and tuple(dilation) == (1, 1)
        and x.shape[1] % 16 == 0
        and (weight.shape[2] * weight.shape[3] > 1 or x.shape[1] <= 64)
        and x.numel() > 0
        and x.is_contiguous(memory_format=torch.channels_last)
        and (_native.isa() == "avx512" or prefers_winograd(x, weight.shape[0], weight.shape[2:], stride, padding))
    )


def prefers_direct(
    x: Tensor,
    weight: Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    transposed: bool = False,
) -> bool:
    """Whether :func:`conv_direct` is faster than torch for such a convolution, or for its input gradient (transposed).

    The rule follows measurements with AVX-512 (docs/log/2026-11.md). It accepts float32 in channels_last. oneDNN is
    faster if the weight has more than some 20,000 elements, or the sum of an output has many products. For input
    gradients with stride 1 only 1 x 1 kernels are accepted.
    """
    outputs, inputs, *kernel = weight.shape
    taps = kernel[0] * kernel[1]
    if transposed:
        accepted = inputs % 16 == 0 and (taps == 1 or max(stride) > 1)
    else:
        accepted = outputs % 16 == 0 and taps * inputs <= 288
    return (
        accepted
        and weight.numel() <= 20_000
        and x.dtype is torch.float32
        and weight.dtype is torch.float32
        and groups == 1
        and tuple(dilation) == (1, 1)
        and x.numel() > 0
        and x.is_contiguous(memory_format=torch.channels_last)
        and min(s + 2 * p - k for s, p, k in zip(x.shape[2:], padding, kernel, strict=True)) >= 0
        and _native.isa() == "avx512"
    )


def prefers_winograd(
    x: Tensor, outputs: int, kernel_size: Sequence[int], stride: tuple[int, int], padding: tuple[int, int]
) -> bool:
    """Whether to use F(2 x 2, 3 x 3) for a convolution that :func:`prefers_own_gradient` accepts.

    It was measured with AVX-512 and AVX2, and has 1.1 to 2.7 times oneDNN's speed. It is slower with less than a few
    hundred tiles of 2 x 2, or if there are so many channels that the transformed weight does not fit into the
    second-level cache.
    """
    n, inputs, h, w = x.shape
    same_size = tuple(kernel_size) == (3, 3) and tuple(stride) == tuple(padding) == (1, 1)
    return same_size and _winograd_pays(n, inputs, outputs, h, w)


def _winograd_pays(n: int, inputs: int, outputs: int, h: int, w: int) -> bool:
    return (
        inputs % 16 == 0
        and outputs % 16 == 0
        and inputs * outputs <= 256 * 256
        and n * -(-h // 2) * -(-w // 2) >= 256
        and _native.isa() in ("avx2", "avx512")
    )
