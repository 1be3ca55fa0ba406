"""The update of the running statistics by a batch that may be skipped because its statistics are not finite."""

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from ..calls import Forward, ForwardCall
from ..reference import accumulator
from .common import kernel, launch

LARGEST_BLOCK = 1024


@triton.jit
def is_finite(v):
    return (tl.abs(v) < float("inf")).to(tl.int32)


@kernel
def update_running_kernel(
    batch_ptr, running_mean_ptr, running_var_ptr, tracked_ptr, skipped_ptr, channels, momentum: tl.float64,
    has_running, cumulative, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program. ``batch`` [2, C] has the mean and the unbiased variance. If all are finite, it updates the running
    statistics and increments the counter of batches, and otherwise it increments the counter of skipped batches."""
    ACC: tl.constexpr = batch_ptr.dtype.element_ty
    finite = tl.full((), 1, tl.int32)
    for first in range(0, 2 * channels, BLOCK):
        coord = first + tl.arange(0, BLOCK)
        values = tl.load(batch_ptr + coord, mask=coord < 2 * channels, other=0.0)
        finite = tl.minimum(finite, tl.min(is_finite(values), 0))
    share = momentum
    if tracked_ptr is not None:
        tracked = tl.load(tracked_ptr) + finite
        share = tl.where(cumulative != 0, 1.0 / tl.maximum(tracked, 1).to(tl.float64), momentum)
        tl.debug_barrier()  # all threads must read the counter before one writes it
        tl.store(tracked_ptr, tracked)
    keep = tl.full((BLOCK,), 1.0 - share, ACC)
    share = tl.full((BLOCK,), share, ACC)
    for first in range(0, channels, BLOCK):
        channel = first + tl.arange(0, BLOCK)
        valid = (channel < channels) & (has_running != 0) & (finite != 0)
        mean = tl.load(batch_ptr + channel, mask=valid, other=0.0)
        variance = tl.load(batch_ptr + channels + channel, mask=valid, other=0.0)
        running_mean = tl.load(running_mean_ptr + channel, mask=valid, other=0.0).to(ACC)
        running_var = tl.load(running_var_ptr + channel, mask=valid, other=0.0).to(ACC)
        tl.store(running_mean_ptr + channel, running_mean * keep + mean * share, mask=valid)
        tl.store(running_var_ptr + channel, running_var * keep + variance * share, mask=valid)
    skipped = tl.load(skipped_ptr) + 1 - finite
    tl.debug_barrier()
    tl.store(skipped_ptr, skipped)


def forward_with_skips(forward: Callable[[ForwardCall], Forward | None], call: ForwardCall) -> Forward | None:
    """``forward(call)`` with the running statistics and counters updated as ``call.num_batches_skipped`` requires.

    ``forward`` writes the statistics of the batch to new memory, and one more launch updates from there. This costs two
    small launches. If ``forward`` returns None, nothing has been updated.
    """
    skipped = call.num_batches_skipped
    if not call.training or skipped is None or call.x.numel() == 0:
        return forward(call._replace(num_batches_skipped=None))
    channels = call.x.shape[1]
    batch = torch.zeros((2, channels), dtype=accumulator(call.x.dtype), device=call.x.device)
    # With momentum 1 the update of zeros is the statistics of the batch.
    scratch = {"running_mean": batch[0], "running_var": batch[1], "num_batches_tracked": None, "momentum": 1.0}
    results = forward(call._replace(num_batches_skipped=None, **scratch))
    if results is None:
        return None
    has_running = call.running_mean is not None
    running = (call.running_mean, call.running_var) if has_running else batch.unbind()
    launch(
        update_running_kernel, (1,), batch.device, batch, *running, call.num_batches_tracked, skipped, channels,
        call.momentum or 0.0, int(has_running), int(call.momentum is None),
        BLOCK=min(triton.next_power_of_2(2 * channels), LARGEST_BLOCK),
    )  # fmt: skip
    return results
