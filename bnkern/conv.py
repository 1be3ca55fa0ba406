"""Do the summands of a convolution's weight gradient agree in sign? And a convolution whose gradient comes with it."""

from collections.abc import Collection
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from . import backends


class GradSigns(NamedTuple):
    """Sums over the summands of each weight's gradient, [O, I, *kernel_size] each; None where not wanted."""

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
    """The weight gradient of a convolution, and of its summands the absolute sum, the sign sum and how many count.

    The gradient of weight K[o, i, p, q] is the sum over images n and output places (h, w) of ::

        d = dy[n, o, h, w] * x[n, i, h * stride + p - padding, w * stride + q - padding]

    with zeros on the padding. Returned are sum d, sum |d|, sum sign(d) and the number of nonzero d, those that are
    wanted, in one pass over tiles that are loaded once.

    Args:
        x: the convolution's input [N, I, H, W]; float32, bfloat16, float16 or float64. NCHW, channels_last and views
            of them are read in place on the CPU; other strides are copied once.
        dy: the gradient at the convolution's own output [N, O, H', W'], of the dtype and device of x, with
            H' = (H + 2 * padding - kernel_size) // stride + 1; x and dy may differ in memory format.
        kernel_size, stride, padding: the convolution's, ints or pairs (rows, columns). No dilation, no groups.
        wanted: names of GradSigns' fields.

    Returns:
        GradSigns. ``sum`` and ``abs_sum`` are float32 (float64 for float64), of float32 chains of some hundred
        products joined in float64 on the CPU; ``sum`` has the same bits whatever else is wanted. ``sign_sum`` and
        ``nonzero`` are exact, int32. Not differentiable: the results carry no graph. An empty batch gives zeros.

        A NaN makes the sums that it enters NaN, and so does infinity times zero, on the padding too. Signs and counts
        look at the factors: a NaN has sign 0 and counts as nonzero, zero times anything does not.

        On a GPU Triton's kernel serves; the README's known limits say where it was wrong with larger blocks.

    Raises:
        TypeError, ValueError: an argument is not as above; names it.
        RuntimeError: a forced backend cannot serve the call; says why. Under torch.jit.trace, which would record the
            results as constants.

    Source: Bjorck et al., "Understanding Batch Normalization", 2018, equation 4 and Table 1.
    """
    kernel_size = _pair("kernel_size", kernel_size, 1)
    stride, padding = _pair("stride", stride, 1), _pair("padding", padding, 0)
    _check(x, dy, kernel_size, stride, padding)
    if torch.jit.is_tracing():
        raise RuntimeError("conv2d_grad_signs: torch.jit.trace cannot record this call, only its results as constants")
    wanted = _flags(wanted)
    backend = backends.choose(backends.forced(), x.device, x.dtype, "conv_grad_signs")
    return GradSigns(*backend.conv_grad_signs(x.detach(), dy.detach(), kernel_size, stride, padding, wanted))


def _pair(name: str, value: object, least: int) -> tuple[int, int]:
    pair = (value, value) if type(value) is int else value
    if not (isinstance(pair, tuple | list) and len(pair) == 2 and all(type(v) is int for v in pair)):
        raise TypeError(f"conv2d_grad_signs: {name} must be an int or a pair of ints, got {value!r}")
    if min(pair) < least:
        raise ValueError(f"conv2d_grad_signs: {name} must be at least {least}, got {value!r}")
    return tuple(pair)


def _flags(wanted: object) -> tuple[bool, ...]:
    fields = GradSigns._fields
    if isinstance(wanted, str) or not isinstance(wanted, Collection):
        raise TypeError(f"conv2d_grad_signs: wanted must be a collection of names, got {wanted!r}")
    for name in wanted:
        if name not in fields:
            raise ValueError(f"conv2d_grad_signs: wanted must be names out of {', '.join(fields)}; got {name!r}")
    return tuple(name in wanted for name in fields)


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
        raise ValueError("conv2d_grad_signs: dy has 2^31 places or more: int32 cannot hold the counts")


# ------------------------------------------------------------------------------------ a convolution that can be probed


class Handoff:
    """Where a probe that has formed the weight gradient leaves it for the convolution's own backward."""

    def __init__(self) -> None:
        self._dy: tuple[int, int] | None = None
        self._sum: Tensor | None = None

    def put(self, dy: Tensor, sum: Tensor) -> None:
        """``sum`` belongs to this gradient, as it is now."""
        self._dy, self._sum = (dy.data_ptr(), dy._version), sum

    def take(self, dy: Tensor) -> Tensor | None:
        """The sum left for this gradient, if it still is what it was; at most once."""
        found = self._sum if self._dy == (dy.data_ptr(), dy._version) else None
        self._dy = self._sum = None
        return found


def takes_gradient(
    x: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int], dilation: tuple[int, int], groups: int
) -> bool:
    """Whether the CPU's own kernels serve the backward of such a convolution rather than torch.

    A table of what was measured (docs/LOG.md): float32 in channels_last, 16 input channels or more. By Winograd's form
    where :func:`by_winograd` says so; with AVX-512 any other kernel beyond 1 x 1 too, whose weight gradient takes
    ``conv_grad_signs`` 0.77 to 1.00 times as long as oneDNN. Elsewhere it is slower (the 3-channel stem 1.4 times,
    bfloat16) or was not measured.
    """
    return (
        x.device.type == "cpu"
        and x.dtype is torch.float32
        and weight.dtype is torch.float32
        and groups == 1
        and tuple(dilation) == (1, 1)
        and x.shape[1] % 16 == 0
        and weight.shape[2] * weight.shape[3] > 1
        and x.numel() > 0
        and x.is_contiguous(memory_format=torch.channels_last)
        and (_isa() == "avx512" or by_winograd(x, weight.shape[0], weight.shape[2:], stride, padding))
    )


def by_winograd(
    x: Tensor, outputs: int, kernel_size: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]
) -> bool:
    """Whether such a convolution, of what :func:`takes_gradient` serves, goes by F(2 x 2, 3 x 3) on the CPU.

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
        and _isa() in ("avx2", "avx512")
    )


@cache
def _isa() -> str | None:
    """The instruction set of the CPU's kernels; None where there are none."""
    if backends.unavailable("cpu", "cpu"):
        return None
    from . import _native

    return _native.isa()


def gradient_sums(
    x: Tensor,
    dy: Tensor,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    wanted: Collection[str],
) -> GradSigns:
    """:func:`conv2d_grad_signs` as the backward of :func:`conv2d` has it: by Winograd's form where that serves.

    Then a value that is not finite may spread to all nine places of a kernel.
    """
    sizes = (kernel_size, stride, padding)
    kernels = backends.choose(backends.forced(), x.device, x.dtype, "conv_grad_signs")
    dense = all(t.is_contiguous(memory_format=torch.channels_last) for t in (x, dy))
    if dense and hasattr(kernels, "conv3x3") and by_winograd(x, dy.shape[1], *sizes):
        return GradSigns(*kernels.conv_grad_signs(x, dy, *sizes, _flags(wanted), winograd=True))
    return conv2d_grad_signs(x, dy, *sizes, wanted=wanted)


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, int], padding: tuple[int, int]) -> Tensor:
    """``F.conv2d`` with the weight gradient from :func:`gradient_sums`, which a probe may have formed already.

    For operands that :func:`takes_gradient` accepts; output and input gradient go by Winograd's form where that serves,
    and may then be NaN where the definition gives an infinity. The result's attribute ``handoff`` is the probe's way
    in. Double backward goes through torch's formula.
    """
    handoff = Handoff()
    y = _Conv2d.apply(x, weight, bias, stride, padding, handoff)
    y.handoff = handoff
    return y


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, stride, padding, handoff):
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding, ctx.handoff = stride, padding, handoff
        ctx.bias_sizes = None if bias is None else list(bias.shape)
        ctx.winograd = bias is None and by_winograd(x, weight.shape[0], weight.shape[2:], stride, padding)
        y = _winograd(x, weight) if ctx.winograd else None
        return torch.nn.functional.conv2d(x, weight, bias, stride, padding) if y is None else y

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        once = not torch.is_grad_enabled()
        ours = need_weight and once
        left = ctx.handoff.take(dy)
        dx = _winograd(dy, weight, flipped=True) if need_x and once and ctx.winograd else None
        theirs = (need_x and dx is None, need_weight and not ours, need_bias)
        dweight = dbias = None
        if any(theirs):
            found, dweight, dbias = torch.ops.aten.convolution_backward(
                dy, x, weight, ctx.bias_sizes, ctx.stride, ctx.padding, (1, 1), False, (0, 0), 1, theirs
            )
            dx = found if dx is None else dx
        if ours:
            found = left
            if found is None:
                found = gradient_sums(x, dy, tuple(weight.shape[2:]), ctx.stride, ctx.padding, _SUM).sum
            dweight = torch.empty_like(weight).copy_(found)
        return dx, dweight, dbias, None, None, None


_SUM = ("sum",)


def _winograd(x: Tensor, weight: Tensor, flipped: bool = False) -> Tensor | None:
    """The CPU's own 3 x 3 convolution (stride 1, padding 1) of x, or None where it has none for such an x."""
    kernels = backends.choose(backends.forced(), x.device, x.dtype)
    if not hasattr(kernels, "conv3x3") or not x.is_contiguous(memory_format=torch.channels_last):
        return None
    return kernels.conv3x3(x, weight, flipped)
