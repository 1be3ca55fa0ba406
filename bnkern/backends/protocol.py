"""The functions of a backend's module, as types for its callers.

Every backend has the functions of :class:`Backend`. The other classes have functions that only some backends have;
:func:`bnkern.backends.choose` selects a backend by the function's name.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from .calls import BackwardCall, Forward, ForwardCall, Gradients, Sums, UpdateCall

Flags = tuple[bool, bool, bool, bool]
Pair = tuple[int, int]
ConvNormForward = tuple[Tensor | None, Tensor | None, Tensor, Tensor, Tensor]  # y, mask, r, mean, invstd
# g or dx, the sums of g, dweight, dbias, the convolution's dweight
ConvNormBackward = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


class Backend(Protocol):
    """Batch norm, forward, backward and their single phases, and the update of all parameters.

    ``reference`` documents the functions.
    """

    __name__: str

    def refuses(self, device: torch.device, dtype: torch.dtype) -> str | None: ...

    def forward(self, call: ForwardCall) -> Forward: ...

    def backward(self, call: BackwardCall) -> Gradients: ...

    def moments(self, x: Tensor) -> tuple[int, Tensor, Tensor]: ...

    def merge(self, counts: Tensor, means: Tensor, m2s: Tensor) -> tuple[Tensor, Tensor, Tensor]: ...

    def normalize(
        self, call: ForwardCall, mean: Tensor | None, invstd: Tensor | None
    ) -> tuple[Tensor, Tensor | None]: ...

    def grad_sums(self, call: BackwardCall) -> tuple[Tensor, Tensor]: ...

    def grad_input(self, call: BackwardCall, sums: Sums | None) -> tuple[Tensor | None, Tensor | None]: ...

    def update(self, call: UpdateCall) -> None: ...


class ConvolutionBackend(Backend, Protocol):
    """A backend that also computes the sums over the summands of a convolution's weight gradient."""

    def conv_grad_signs(
        self, x: Tensor, dy: Tensor, kernel_size: Pair, stride: Pair, padding: Pair, wanted: Flags
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]: ...


class ImageBackend(Backend, Protocol):
    """A backend that also makes batches of CIFAR images."""

    def augment(
        self,
        images: Tensor,
        labels: Tensor,
        order: Tensor,
        state: Tensor,
        position: Tensor,
        table: Tensor,
        out: Tensor,
        labels_out: Tensor,
        size: int,
        first: int,
        random: bool,
    ) -> None: ...


class OwnConvolutionBackend(Backend, Protocol):
    """A backend with convolutions of its own. Only the CPU's backend has them."""

    def conv_grad_signs(
        self,
        x: Tensor,
        dy: Tensor,
        kernel_size: Pair,
        stride: Pair,
        padding: Pair,
        wanted: Flags,
        *,
        winograd: bool = False,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]: ...

    def conv3x3(self, x: Tensor, weight: Tensor, flipped: bool = False) -> Tensor: ...

    def conv_direct(
        self, x: Tensor, weight: Tensor, stride: Pair, padding: Pair, size: Pair | None = None
    ) -> Tensor: ...

    def prefers_direct(
        self,
        x: Tensor,
        weight: Tensor,
        stride: Pair,
        padding: Pair,
        dilation: Pair,
        groups: int,
        transposed: bool = False,
    ) -> bool: ...

    def prefers_own_gradient(
        self, x: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair, groups: int
    ) -> bool: ...

    def prefers_winograd(
        self, x: Tensor, outputs: int, kernel_size: Sequence[int], stride: Pair, padding: Pair
    ) -> bool: ...


class ChainBackend(Backend, Protocol):
    """A backend with kernels for a 3 x 3 convolution between two batch norms: ``cpu`` and ``cuda_conv``.

    ``reference`` documents the functions.
    """

    # Whether these functions record, count skipped batches, and serve eval mode and a convolution's bias.
    conv_norm_options: bool

    def normalize(
        self, call: ForwardCall, mean: Tensor | None, invstd: Tensor | None
    ) -> tuple[Tensor, Tensor | None]: ...

    def conv_norm_forward(
        self,
        source: ForwardCall | Tensor,
        mean: Tensor | None,
        invstd: Tensor | None,
        keep: bool,
        weight: Tensor,
        bias: Tensor | None,
        norm: ForwardCall,
    ) -> ConvNormForward: ...

    def conv_norm_backward(
        self,
        behind: BackwardCall,
        sums: Tensor,
        weight: Tensor,
        before: BackwardCall | None,
        y: Tensor | None,
        shortcut: Tensor | None,
        needs: tuple[bool, bool],
    ) -> ConvNormBackward: ...

    def grad_before_act(self, call: BackwardCall) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]: ...

    def prefers_conv_norm(self, x: Tensor, channels: Sequence[int]) -> bool: ...
