"""The CPU's kernels for convolutions: sums over the summands of a weight's gradient, and Conv2d's own 3 x 3."""

import torch
from torch import Tensor

# torch comes first: it brings the OpenMP runtime that the native module then shares.
from .. import _native
from .arguments import CODES, address
from .reference import accumulator


def _image(t: Tensor) -> tuple[Tensor, int, torch.Size, tuple[int, ...]]:
    """``t`` [N, C, H, W], or a dense copy where neither channels nor columns have unit stride, to be kept alive; its
    address, sizes and strides."""
    stride = t.stride()
    if stride[1] != 1:
        unit = [axis for axis in (1, 3) if stride[axis] == 1 or t.shape[axis] == 1]
        t = t if unit else t.contiguous()
        stride = tuple(1 if axis in unit else step for axis, step in enumerate(t.stride()))
    return t, t.data_ptr(), t.shape, stride


def conv_grad_signs(
    x: Tensor,
    dy: Tensor,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    wanted: tuple[bool, bool, bool, bool],
    *,
    winograd: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Sum, absolute sum, sign sum and number of nonzero summands of a convolution's weight gradient, where wanted.

    ``winograd``: the two sums come by Winograd's F(2 x 2, 3 x 3), of such a convolution as ``conv3x3``.
    """
    shape = (dy.shape[1], x.shape[1], *kernel_size)
    make = torch.empty if x.numel() and dy.numel() else torch.zeros
    dtypes = (accumulator(x.dtype),) * 2 + (torch.int32,) * 2
    results = [make(shape, dtype=dtype) if want else None for dtype, want in zip(dtypes, wanted, strict=True)]
    if x.numel() and dy.numel():
        x, *of_x = _image(x)
        dy, *of_dy = _image(dy)
        addresses = [address(result) for result in results]
        how = (kernel_size, stride, padding, addresses, winograd, torch.get_num_threads())
        _native.cpu_conv_grad_signs(CODES[x.dtype], *of_x, *of_dy, *how)
    return tuple(results)


def conv3x3(x: Tensor, weight: Tensor, flipped: bool = False) -> Tensor:
    """The convolution of x [N, I, H, W], float32 in channels_last, by weight [O, I, 3, 3], of stride and padding 1.

    ``flipped``: by the weight [I, O, 3, 3] turned by 180 degrees instead, which is the gradient of a convolution's
    input. By Winograd's F(2 x 2, 3 x 3); I and O are multiples of 16.
    """
    n, _, h, w = x.shape
    address, stride = weight.data_ptr(), weight.stride()
    outputs = weight.shape[1 if flipped else 0]
    if flipped:
        address += weight.itemsize * 2 * (stride[2] + stride[3])
        stride = (stride[1], stride[0], -stride[2], -stride[3])
    size, y_stride = (n, outputs, h, w), (h * w * outputs, 1, w * outputs, outputs)
    y = torch.from_dlpack(_native.cpu_empty(CODES[x.dtype], size, y_stride))
    _native.cpu_conv3x3(x.data_ptr(), x.shape, address, outputs, stride, y.data_ptr(), torch.get_num_threads())
    return y
