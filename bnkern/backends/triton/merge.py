"""Phase ``merge``: several (count, mean, M2) to one by Chan's formula, and the statistics of a forward pass."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..calls import ForwardCall
from ..reference import accumulator
from .common import kernel, launch
from .records import fold_moments

PARTS, CHANNELS = 32, 16  # the block that a program merges at a time
# Counts of zero are replaced by this number before a division by them. It is less than any sum of weights.
LEAST_COUNT = tl.constexpr(1e-30)


@triton.jit
def chan(count_a, mean_a, m2_a, count_b, mean_b, m2_b):
    """(count, mean, M2) of a and b together, by Chan, Golub and LeVeque. A part with count zero changes nothing."""
    count = count_a + count_b
    delta = mean_b - mean_a
    part = count_b / tl.maximum(count, LEAST_COUNT)
    return count, tl.fma(delta, part, mean_a), m2_a + m2_b + (delta * count_a) * (delta * part)


@triton.jit
def merged(counts_ptr, means_ptr, m2s_ptr, parts, channel, channels, PARTS: tl.constexpr, CHANNELS: tl.constexpr):
    """Merges all parts of the channels [CHANNELS] in order: a tree within a block, and the blocks one by one.

    The returned count is exact and has the dtype of the counts. The formula uses a rounded count per channel.
    """
    ACC: tl.constexpr = means_ptr.dtype.element_ty
    exact = tl.zeros((), counts_ptr.dtype.element_ty)
    count = tl.zeros((CHANNELS,), ACC)
    mean = tl.zeros((CHANNELS,), ACC)
    m2 = tl.zeros((CHANNELS,), ACC)
    for first in range(0, parts, PARTS):
        part = (first + tl.arange(0, PARTS))[:, None]
        valid = (part < parts) & (channel < channels)[None, :]
        offsets = part.to(tl.int64) * channels + channel[None, :]
        counts = tl.load(counts_ptr + part, mask=part < parts, other=0)
        exact += tl.sum(counts)
        counts = counts.to(ACC)
        means = tl.where(counts > 0, tl.load(means_ptr + offsets, mask=valid, other=0.0), 0.0)
        m2s = tl.where(counts > 0, tl.load(m2s_ptr + offsets, mask=valid, other=0.0), 0.0)
        counts = tl.broadcast_to(counts, (PARTS, CHANNELS))
        counts, means, m2s = tl.reduce((counts, means, m2s), 0, chan)
        count, mean, m2 = chan(count, mean, m2, counts, means, m2s)
    return exact, mean, m2


@kernel
def merge_kernel(
    counts_ptr, means_ptr, m2s_ptr, count_ptr, mean_ptr, m2_ptr, parts, channels,
    PARTS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    count, mean, m2 = merged(counts_ptr, means_ptr, m2s_ptr, parts, channel, channels, PARTS, CHANNELS)
    tl.store(mean_ptr + channel, mean, mask=channel < channels)
    tl.store(m2_ptr + channel, m2, mask=channel < channels)
    if tl.program_id(0) == 0:
        tl.store(count_ptr, count)


def merge(counts: Tensor, means: Tensor, m2s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Merges counts [K], means [K, C] and m2s [K, C] in order into one (count, mean [C], M2 [C])."""
    counts, means, m2s = counts.contiguous(), means.contiguous(), m2s.contiguous()
    parts, channels = means.shape
    count, (mean, m2) = counts.new_empty(()), means.new_empty((2, channels))
    grid = (triton.cdiv(channels, CHANNELS),)
    launch(
        merge_kernel, grid, means.device, counts, means, m2s, count, mean, m2, parts, channels,
        PARTS=PARTS, CHANNELS=CHANNELS,
    )  # fmt: skip
    return count, mean, m2


# ---------------------------------------------------------------------------- mean and invstd for a forward pass


@triton.jit
def divide(a, b):
    """a / b, rounded as in IEEE 754."""
    if b.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def inverse_root(v):
    """1 / sqrt(v), with both operations rounded as in IEEE 754."""
    if v.dtype == tl.float64:
        return 1.0 / tl.sqrt(v)
    else:
        return tl.div_rn(tl.full(v.shape, 1.0, v.dtype), tl.sqrt_rn(v))


@kernel
def statistics_kernel(
    counts_ptr, means_ptr, m2s_ptr, running_mean_ptr, running_var_ptr, tracked_ptr, mean_ptr, invstd_ptr,
    parts_ptr, record_ptr, parts, channels, total, momentum: tl.float64, eps: tl.float64,
    training, has_running, cumulative, PARTS: tl.constexpr, CHANNELS: tl.constexpr,
    WEIGHTED: tl.constexpr = False,
):  # fmt: skip
    """mean and invstd from the parts, or from the running statistics if there are no parts. Parts update the latter.

    The first program increments the counter. A cumulative momentum is 1 / counter, and then there is one program that
    reads and increments it. With ``record_ptr`` a second row of programs joins the parts of the record, and sets the
    tallies in its last row to zero. If ``WEIGHTED``, the counts are sums of weights, and so is their total.
    """
    ACC: tl.constexpr = mean_ptr.dtype.element_ty
    if record_ptr is not None:  # noqa: SIM102 (only this condition is known at compile time)
        if tl.program_id(1) == 1:
            for first in range(tl.program_id(0) * CHANNELS, channels, tl.num_programs(0) * CHANNELS):
                channel = first + tl.arange(0, CHANNELS)
                fold_moments(parts_ptr, record_ptr, total, parts, channel, channels, PARTS, CHANNELS)
                zero = tl.zeros((CHANNELS,), tl.float64)  # all bits are 0, as for the integer 0
                tl.store(record_ptr + 8 * channels + channel, zero, mask=channel < channels)
            return
    share = momentum
    if tracked_ptr is not None:
        share = tl.where(cumulative != 0, 1.0 / (tl.load(tracked_ptr) + 1).to(tl.float64), momentum)
    keep = tl.full((CHANNELS,), 1.0 - share, ACC)
    share = tl.full((CHANNELS,), share, ACC)
    for first in range(tl.program_id(0) * CHANNELS, channels, tl.num_programs(0) * CHANNELS):
        channel = first + tl.arange(0, CHANNELS)
        valid = channel < channels
        running_mean = tl.load(running_mean_ptr + channel, mask=valid & (has_running != 0), other=0.0).to(ACC)
        running_var = tl.load(running_var_ptr + channel, mask=valid & (has_running != 0), other=0.0).to(ACC)
        mean, var = running_mean, running_var
        if training != 0:
            weight, mean, m2 = merged(counts_ptr, means_ptr, m2s_ptr, parts, channel, channels, PARTS, CHANNELS)
            if WEIGHTED:
                mean = tl.where(weight == 0, float("nan"), mean)
                var = divide(m2, tl.full((CHANNELS,), weight, ACC))
                unbiased = divide(m2, tl.full((CHANNELS,), tl.where(weight > 1, weight - 1, weight), ACC))
            else:
                var = divide(m2, tl.full((CHANNELS,), total, ACC))
                unbiased = divide(m2, tl.full((CHANNELS,), total - 1, ACC))
            running_mean = running_mean * keep + mean * share
            running_var = running_var * keep + unbiased * share
            tl.store(running_mean_ptr + channel, running_mean, mask=valid & (has_running != 0))
            tl.store(running_var_ptr + channel, running_var, mask=valid & (has_running != 0))
        tl.store(mean_ptr + channel, mean, mask=valid)
        tl.store(invstd_ptr + channel, inverse_root(var + tl.full((CHANNELS,), eps, ACC)), mask=valid)
    if tracked_ptr is not None:
        tl.debug_barrier()  # all threads must read the counter before one increments it
        if (training != 0) & (tl.program_id(0) == 0):
            tl.store(tracked_ptr, tl.load(tracked_ptr) + 1)


def statistics(parts: tuple[Tensor, ...] | None, count: int, call: ForwardCall) -> tuple[Tensor, Tensor]:
    """mean and invstd [C] from partial moments of ``count`` values, which also update the running statistics.

    With ``call.sample_weight`` the number of values is the sum of the parts' weights, and ``count`` is not read.

    Without parts they come from the running statistics, which are not changed. If there is a ``call.record`` [9, C],
    the parts must include the parts of the record. It is filled, except for its last row, which becomes 0. Without
    parts it is not written.
    """
    running_mean, record = call.running_mean, call.record
    training, has_running = parts is not None, running_mean is not None
    like = parts[1] if training else running_mean
    channels = like.shape[-1]
    mean, invstd = (torch.empty(channels, dtype=accumulator(call.x.dtype), device=like.device) for _ in range(2))
    counts, means, m2s = parts[:3] if training else (mean, mean, mean)
    running = (running_mean, call.running_var) if has_running else (mean, mean)
    cumulative = training and has_running and call.momentum is None
    recorded = (parts[3], record) if training and record is not None else (None, None)
    grid = (1 if cumulative else triton.cdiv(channels, CHANNELS), 1 if recorded[1] is None else 2)
    launch(
        statistics_kernel, grid, like.device, counts, means, m2s, *running, call.num_batches_tracked, mean,
        invstd, *recorded, len(counts), channels, count, call.momentum or 0.0, call.eps, int(training),
        int(has_running), int(cumulative), PARTS=PARTS, CHANNELS=CHANNELS,
        WEIGHTED=training and call.sample_weight is not None,
    )  # fmt: skip
    return mean, invstd
