"""The record of the samples' contributions to the gradients of the affine parameters."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..activations import code
from ..calls import BackwardCall
from ..layout import addressed, layout, strides
from ..reference import accumulator
from .common import INT32_OFFSETS, activate, channel_vectors, kernel, launch, per_channel

ELEMENTS = 1024  # of a tile


@kernel
def sample_sums_kernel(
    dy_ptr, x_ptr, mask_ptr, mean_ptr, invstd_ptr, weight_ptr, bias_ptr, sums_ptr,
    dy_sample, dy_channel, dy_position, x_sample, x_channel, x_position, samples, channels, positions,
    has_weight, has_bias, act,
    ROWS: tl.constexpr, WIDE: tl.constexpr, CHANNELS: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    """sum g and sum g * xhat over the positions of one sample, for CHANNELS channels, into ``sums`` [2, N, C]."""
    ACC: tl.constexpr = mean_ptr.dtype.element_ty
    sample = tl.program_id(0)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[:, None]
    exists = channel < channels
    mean = per_channel(mean_ptr, 1, 0.0, channel, exists, False, 1)
    invstd = per_channel(invstd_ptr, 1, 1.0, channel, exists, False, 1)
    weight = per_channel(weight_ptr, has_weight, 1.0, channel, exists, False, 1).to(ACC)
    bias = per_channel(bias_ptr, has_bias, 0.0, channel, exists, False, 1).to(ACC)
    total = tl.zeros((CHANNELS, POSITIONS), ACC)
    dot = tl.zeros((CHANNELS, POSITIONS), ACC)
    far, far_channel = sample, channel
    if WIDE:
        far, far_channel = sample.to(tl.int64), channel.to(tl.int64)
    for first in range(0, positions, POSITIONS):
        coord = first + tl.arange(0, POSITIONS)[None, :]
        valid = exists & (coord < positions)
        offsets = far * dy_sample + far_channel * dy_channel + coord * dy_position
        g = tl.load(dy_ptr + offsets, mask=valid, other=0.0).to(ACC)
        offsets = far * x_sample + far_channel * x_channel + coord * x_position
        xhat = (tl.load(x_ptr + offsets, mask=valid, other=0.0).to(ACC) - mean) * invstd
        if mask_ptr is None:
            below = (act != 0) & (tl.fma(xhat, weight, bias).to(x_ptr.dtype.element_ty).to(ACC) <= 0)
        else:
            if ROWS:
                bit = (far * positions + coord) * channels + channel
            else:
                bit = (far * channels + channel) * ((positions + 7) // 8 * 8) + coord
            byte = tl.load(mask_ptr + bit // 8, mask=valid, other=0)
            below = ((byte >> (bit % 8).to(tl.uint8)) & 1) == 0
        g = activate(g, below, act)
        total += g
        # An idle lane has g = 0, but its xhat may overflow, and the product would be NaN.
        dot = tl.fma(g, tl.where(valid, xhat, 0.0), dot)
    offsets = far * channels + tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    stored = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS) < channels
    tl.store(sums_ptr + offsets, tl.sum(total, 1), mask=stored)
    samples_and_channels = samples * channels
    if WIDE:
        samples_and_channels = samples.to(tl.int64) * channels
    tl.store(sums_ptr + samples_and_channels + offsets, tl.sum(dot, 1), mask=stored)


def sample_sums(call: BackwardCall) -> Tensor:
    """sum g and sum g * xhat of each sample and channel, [2, N, C], in one launch. dy and x are read once for it."""
    dy, x, mask = call.dy, call.x, call.mask
    like, acc = layout(x), accumulator(x.dtype)
    sums = torch.zeros((2, like.n, like.c), dtype=acc, device=x.device)
    if x.numel() == 0:
        return sums
    dy, x = addressed(dy, like.rows), addressed(x, like.rows)
    vectors, (_, *present) = channel_vectors(x, call.mean, call.invstd, call.weight, call.bias)
    steps = []
    for outer, inner in (strides(t, like.rows) for t in (dy, x)):
        steps += [like.s * outer, 1, outer] if like.rows else [outer, inner, 1]
    longest = max(
        sample * (like.n - 1) + channel * (like.c - 1) + position * (like.s - 1)
        for sample, channel, position in (steps[:3], steps[3:])
    )
    block = min(triton.next_power_of_2(like.c), 32) if like.rows else 1
    positions = min(triton.next_power_of_2(like.s), ELEMENTS // block)
    launch(
        sample_sums_kernel, (like.n, triton.cdiv(like.c, block)), x.device,
        dy, x, mask if call.act else None, *vectors, sums, *steps, like.n, like.c, like.s, *present, code(call.act),
        ROWS=like.rows, WIDE=max(longest, 2 * like.n * like.c, like.count * like.c + 8) > INT32_OFFSETS,
        CHANNELS=block, POSITIONS=positions,
    )  # fmt: skip
    return sums


def record_samples(call: BackwardCall) -> None:
    """Fills ``call.record_samples`` with the rows ``records.SAMPLES``, unless the normalisation is the identity.

    It is a pass over dy and x of its own, and a few small launches.
    """
    record = call.record_samples
    if record is None or call.mean is None:
        return
    sums = sample_sums(call).double()
    samples = sums.shape[1]
    record[0] = samples
    totals = sums.sum(1)
    record[1::2] = totals
    record[2::2] = (sums - (totals / max(samples, 1)).unsqueeze(1)).square().sum(1)
