"""Convolutions between batch norms on CUDA devices. **Nothing of this has run on a GPU yet.**

The forward is one kernel of csrc/cuda/conv_norm_forward.cu. The backward has no kernel of its own: it is composed of
the kernels of ``cuda`` and torch's convolution backward, so the gradient of r and, without a residual, y are in memory
for the time of one call. :func:`bnkern.use_cuda_chains` switches this on.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import cuda, native
from .calls import BackwardCall, ForwardCall
from .protocol import ConvNormBackward, ConvNormForward

normalize = cuda.normalize
conv_norm_options = False


@cuda.with_memory
def conv_norm_forward(
    source: ForwardCall | Tensor,
    mean: Tensor | None,
    invstd: Tensor | None,
    keep: bool,
    weight: Tensor,
    bias: Tensor | None,
    norm: ForwardCall,
) -> ConvNormForward:
    """See ``reference.conv_norm_forward``, for images that :func:`prefers_conv_norm` accepts, without a bias.

    A residual that does not begin at a multiple of 16 bytes is copied once.
    """
    if isinstance(source, ForwardCall) and source.residual is not None and source.residual.data_ptr() % 16:
        source = source._replace(residual=source.residual.clone(memory_format=torch.channels_last))
    return native._native.conv_norm_forward(source, mean, invstd, keep, weight, bias, norm)


def conv_norm_backward(
    behind: BackwardCall,
    sums: Tensor,
    weight: Tensor,
    before: BackwardCall | None,
    y: Tensor | None,
    shortcut: Tensor | None,
    needs: tuple[bool, bool],
) -> ConvNormBackward:
    """See ``reference.conv_norm_backward``. The gradient of r is rounded to the storage type, as between modules."""
    count = behind.x.numel() // behind.x.shape[1]
    dr, _ = cuda.grad_input(behind._replace(needs=(True, False, False, False)), (sums[0], sums[1], count))
    assert dr is not None
    if y is None:
        assert before is not None, "y or the norm before the convolution is required"
        source = ForwardCall(before.x, before.weight, before.bias, act=before.act)
        y, _ = cuda.normalize(source, before.mean, before.invstd)
    options = (None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [*needs, False])
    dy, dweight, _ = torch.ops.aten.convolution_backward(dr, y, weight, *options)
    if not needs[0]:
        return None, None, None, None, dweight
    if shortcut is not None:
        dy = dy + shortcut
    if before is None:
        return dy, None, None, None, dweight
    return *grad_before_act(before._replace(dy=dy)), dweight


def grad_before_act(call: BackwardCall) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """See ``reference.grad_before_act``. The sums are float32."""
    sum_g, sum_g_xhat = cuda.grad_sums(call)
    _, g = cuda.grad_input(call._replace(needs=(False, False, False, True)), None)
    assert g is not None
    dweight = None if call.weight is None else sum_g_xhat.to(call.weight.dtype)
    dbias = None if call.bias is None else sum_g.to(call.bias.dtype)
    return g, torch.stack((sum_g, sum_g_xhat)), dweight, dbias


def prefers_conv_norm(x: Tensor, channels: Sequence[int]) -> bool:
    """Whether the kernel serves a chain of 3 x 3 convolutions of x, with these numbers of channels.

    x is bfloat16 or float16 in channels_last and begins at a multiple of 16 bytes. All values have the same number of
    channels, 16, 32 or 64, and at most 16,384 numbers an image. The compiled code is that of capability 8.0 or later.
    """
    return (
        x.dtype in (torch.bfloat16, torch.float16)
        and x.is_contiguous(memory_format=torch.channels_last)
        and set(channels) == {x.shape[1]}
        and x.numel() > x.shape[1]  # more than one value in a channel, so the variance exists
        and x.data_ptr() % 16 == 0
        and cuda.compiled_for(x.device) >= (8, 0)
        and native._native.conv_norm_refusal(x) is None
    )
