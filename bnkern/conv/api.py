"""The weight gradient of a convolution with sums that show whether its summands agree in sign."""

from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor

from .. import backends


class GradSigns(NamedTuple):
    """Sums over the summands of each weight's gradient, [O, I, *kernel_size] each. A sum that is not wanted is None."""

    sum: Tensor | None
    abs_sum: Tensor | None
    sign_sum: Tensor | None
    nonzero: Tensor | None


def conv2d_grad_signs(
    x: Tensor,
    dy: Tensor,
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    *,
    wanted: Collection[str] = GradSigns._fields,
) -> GradSigns:
    """Returns a convolution's weight gradient, and the absolute sum, sign sum and nonzero count of its summands.

    The gradient of weight K[o, i, p, q] is the sum over images n and output positions (h, w) of

        d = dy[n, o, h, w] * x[n, i, h * stride + p - padding, w * stride + q - padding]

    with zeros in the padding. Computes those of sum d, sum |d|, sum sign(d) and the number of nonzero d that are
    ``wanted``, in one pass over tiles that are loaded once.

    Args:
        x: the convolution's input [N, I, H, W]; float32, bfloat16, float16 or float64. NCHW, channels_last and views
            of them are read in place on the CPU; other strides are copied once.
        dy: the gradient at the convolution's own output [N, O, H', W'], of the dtype and device of x, with
            H' = (H + 2 * padding - kernel_size) // stride + 1; x and dy may differ in memory format.
        kernel_size: of the convolution, an int or a pair (rows, columns). Dilation and groups are not supported.
        stride: of the convolution, an int or a pair.
        padding: of the convolution, an int or a pair.
        wanted: names of GradSigns' fields.

    Returns:
        GradSigns. ``sum`` and ``abs_sum`` are float32 (float64 for float64). On the CPU some hundred products at a time
        are added in float32, and these partial sums in float64. ``sum`` has the same bits whatever else is wanted.
        ``sign_sum`` and ``nonzero`` are exact, in int32. The results carry no graph, so they are not differentiable.
        An empty batch gives zeros.

        A NaN makes every sum to which it contributes NaN. So does infinity times zero, in the padding too. Signs and
        counts depend on the factors: a summand with a NaN has sign 0 and counts as nonzero, and a summand with a zero
        does not count.

        On a GPU Triton's kernel computes the sums. docs/known_issues.md describes a wrong result of larger blocks.

    Raises:
        TypeError, ValueError: An argument is not as above. The message names it.
        RuntimeError: A forced backend cannot compute the call, and the message says why. Also under torch.jit.trace,
            which would record the results as constants.

    Source: Bjorck et al., "Understanding Batch Normalization", 2018, equation 4 and Table 1.
    """
    kernel_size = _pair("kernel_size", kernel_size, 1)
    stride, padding = _pair("stride", stride, 1), _pair("padding", padding, 0)
    _check(x, dy, kernel_size, stride, padding)
    if torch.jit.is_tracing():
        raise RuntimeError("conv2d_grad_signs: torch.jit.trace cannot record this call, only its results as constants")
    requested = flags(wanted)
    backend = backends.choose(backends.forced(), x.device, x.dtype, "conv_grad_signs")
    return GradSigns(*backend.conv_grad_signs(x.detach(), dy.detach(), kernel_size, stride, padding, requested))


def _pair(name: str, value: object, minimum: int) -> tuple[int, int]:
    pair = (value, value) if type(value) is int else value
    if not (isinstance(pair, tuple | list) and len(pair) == 2 and all(type(v) is int for v in pair)):
        raise TypeError(f"conv2d_grad_signs: {name} must be an int or a pair of ints, got {value!r}")
    if min(pair) < minimum:
        raise ValueError(f"conv2d_grad_signs: {name} must be at least {minimum}, got {value!r}")
    return tuple(pair)


def flags(wanted: object) -> tuple[bool, bool, bool, bool]:
    """Returns one boolean for each field of GradSigns: whether its name is in ``wanted``."""
    fields = GradSigns._fields
    if isinstance(wanted, str) or not isinstance(wanted, Collection):
        raise TypeError(f"conv2d_grad_signs: wanted must be a collection of names, got {wanted!r}")
    for name in wanted:
        if name not in fields:
            raise ValueError(f"conv2d_grad_signs: wanted must be names among {', '.join(fields)}; got {name!r}")
    sum, abs_sum, sign_sum, nonzero = (name in wanted for name in fields)
    return sum, abs_sum, sign_sum, nonzero


def _check(
    x: Tensor, dy: Tensor, kernel_size: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]
) -> None:
    for name, t in (("x", x), ("dy", dy)):
        if not isinstance(t, Tensor):
            raise TypeError(f"conv2d_grad_signs: {name} must be a torch.Tensor, got {type(t).__name__}")
        if t.dtype not in backends.DTYPES:
            raise TypeError(f"conv2d_grad_signs: {name} must be float32, bfloat16, float16 or float64, got {t.dtype}")
        if t.layout is not torch.strided:
            raise TypeError(f"conv2d_grad_signs: {name} must be a strided (dense) tensor, got {t.layout}")
        if t.dim() != 4:
            raise ValueError(f"conv2d_grad_signs: {name} must have 4 dimensions, got shape {list(t.shape)}")
    if dy.dtype != x.dtype:
        raise TypeError(f"conv2d_grad_signs: dy must have the dtype of x, {x.dtype}, got {dy.dtype}")
    if dy.device != x.device:
        raise ValueError(f"conv2d_grad_signs: dy must be on the device of x, {x.device}, got {dy.device}")
    sizes = [
        (size + 2 * pad - kernel) // step + 1
        for size, kernel, step, pad in zip(x.shape[2:], kernel_size, stride, padding, strict=True)
    ]
    if min(sizes) < 1:
        raise ValueError(
            f"conv2d_grad_signs: kernel_size {kernel_size} does not fit x, {list(x.shape)}, with padding {padding}"
        )
    if [dy.shape[0], *dy.shape[2:]] != [x.shape[0], *sizes]:
        raise ValueError(
            f"conv2d_grad_signs: dy must be [{x.shape[0]}, O, {sizes[0]}, {sizes[1]}], the convolution's output for x "
            f"{list(x.shape)}, got {list(dy.shape)}"
        )
    if dy.shape[0] * sizes[0] * sizes[1] >= 1 << 31:
        raise ValueError("conv2d_grad_signs: dy has 2^31 or more values per channel, and int32 cannot hold the counts")
