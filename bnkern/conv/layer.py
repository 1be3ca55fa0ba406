"""A convolution with a backend's own kernels, which takes over a weight gradient that a probe has computed already."""

from collections.abc import Collection
from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor

from .. import backends
from ..backends.protocol import Backend, OwnConvolutionBackend
from .api import GradSigns, conv2d_grad_signs, flags


class Handoff:
    """Passes the weight gradient from a probe that has computed it to the backward of the convolution."""

    def __init__(self) -> None:
        self._dy: tuple[int, int] | None = None
        self._sum: Tensor | None = None

    def put(self, dy: Tensor, sum: Tensor) -> None:
        """Stores ``sum``, the weight gradient for the present values of ``dy``."""
        self._dy, self._sum = (dy.data_ptr(), dy._version), sum

    def take(self, dy: Tensor) -> Tensor | None:
        """Returns the stored sum once, if ``dy`` is the same tensor and unchanged, else None."""
        stored = self._sum if self._dy == (dy.data_ptr(), dy._version) else None
        self._dy = self._sum = None
        return stored


class Plan(NamedTuple):
    """The kernels of a convolution: "winograd" or "direct" for a backend's own, None for torch's."""

    forward: str | None
    input_gradient: str | None
    own_weight_gradient: bool


def plan(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> Plan | None:
    """The kernels for such a convolution, or None if torch's are used for all parts of it."""
    if x.device.type != "cpu" or backends.unavailable("cpu", "cpu"):
        return None
    kernels = backends.choose("cpu", x.device, x.dtype)
    options = (x, weight, stride, padding, dilation, groups)
    own = kernels.prefers_own_gradient(*options)
    if own and bias is None and _uses_winograd(kernels, x, weight.shape[0], weight.shape[2:], stride, padding):
        return Plan("winograd", "winograd", True)
    forward = "direct" if bias is None and kernels.prefers_direct(*options) else None
    input_gradient = "direct" if kernels.prefers_direct(*options, transposed=True) else None
    return Plan(forward, input_gradient, own) if own or forward or input_gradient else None


def gradient_sums(
    x: Tensor,
    dy: Tensor,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    wanted: Collection[str],
) -> GradSigns:
    """Computes :func:`conv2d_grad_signs` as the backward of :func:`conv2d` does, by Winograd's form where it is used.

    In that form a value that is not finite may spread to all nine positions of a kernel.
    """
    sizes = (kernel_size, stride, padding)
    kernels = backends.choose(backends.forced(), x.device, x.dtype, "conv_grad_signs")
    dense = all(t.is_contiguous(memory_format=torch.channels_last) for t in (x, dy))
    if dense and _uses_winograd(kernels, x, dy.shape[1], *sizes):
        return GradSigns(*kernels.conv_grad_signs(x, dy, *sizes, flags(wanted), winograd=True))
    return conv2d_grad_signs(x, dy, *sizes, wanted=wanted)


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    plan: Plan,
) -> Tensor:
    """Computes ``F.conv2d`` with the kernels of a :func:`plan`, and the weight gradient of :func:`gradient_sums`.

    Where Winograd's form is used for the output and the input gradient, they may be NaN where the definition gives an
    infinity. A probe that has computed the weight gradient stores it in the attribute ``handoff`` of the result. Double
    backward uses torch's formula.
    """
    handoff = Handoff()
    y = _Conv2d.apply(x, weight, bias, stride, padding, plan, handoff)
    y.handoff = handoff
    return y


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, stride, padding, plan, handoff):
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding, ctx.plan, ctx.handoff = stride, padding, plan, handoff
        ctx.bias_sizes = None if bias is None else list(bias.shape)
        kernels = _kernels(x)
        if kernels is not None and plan.forward == "winograd":
            return kernels.conv3x3(x, weight, False)
        if kernels is not None and plan.forward == "direct":
            return kernels.conv_direct(x, weight, stride, padding)
        return torch.nn.functional.conv2d(x, weight, bias, stride, padding)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        first_order = not torch.is_grad_enabled()
        stored = ctx.handoff.take(dy)
        own_weight_gradient = need_weight and first_order and ctx.plan.own_weight_gradient
        dx = dweight = dbias = None
        kernels = _kernels(dy)
        if need_x and first_order and kernels is not None:
            if ctx.plan.input_gradient == "winograd":
                dx = kernels.conv3x3(dy, weight, True)
            elif ctx.plan.input_gradient == "direct":
                dx = kernels.conv_direct(dy, weight, ctx.stride, ctx.padding, tuple(x.shape[2:]))
        torch_needs = (need_x and dx is None, need_weight and not own_weight_gradient, need_bias)
        if any(torch_needs):
            torch_dx, dweight, dbias = torch.ops.aten.convolution_backward(
                dy, x, weight, ctx.bias_sizes, ctx.stride, ctx.padding, (1, 1), False, (0, 0), 1, torch_needs
            )
            dx = torch_dx if dx is None else dx
        if own_weight_gradient:
            if stored is None:
                stored = gradient_sums(x, dy, tuple(weight.shape[2:]), ctx.stride, ctx.padding, _SUM).sum
            dweight = torch.empty_like(weight).copy_(stored)
        return dx, dweight, dbias, None, None, None, None


_SUM = ("sum",)


def _uses_winograd(kernels: Backend, x: Tensor, *sizes: object) -> TypeGuard[OwnConvolutionBackend]:
    """Whether the backend has a 3 x 3 convolution of its own and uses it for such sizes."""
    prefers = getattr(kernels, "prefers_winograd", None)
    return prefers is not None and prefers(x, *sizes)


def _kernels(x: Tensor) -> OwnConvolutionBackend | None:
    """The backend with convolutions of its own that serves such an x, or None."""
    kernels = backends.choose(backends.forced(), x.device, x.dtype)
    own = hasattr(kernels, "conv3x3") and x.is_contiguous(memory_format=torch.channels_last)
    return kernels if own else None  # type: ignore[return-value]
