"""Batch norm over the joint batch of several ranks: a backend's phases, with two collectives between them.

    moments | gather: (count, mean, M2) of all ranks, merged in rank order | normalize
    grad_sums | reduce: (sum g, sum g * xhat) added over the ranks | grad_input

The collectives use the group's own backend: gloo for CPU tensors, nccl for CUDA. They are not torch's functional
collectives. If Ctrl-C interrupts one of those before its wait, it stays in a registry, which keeps gloo's threads alive
until the process ends.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from ..backends.calls import BackwardCall, ForwardCall, Gradients
from ..backends.layout import layout
from ..backends.protocol import Backend
from ..backends.reference import update_running


def ranks_of(process_group: "dist.ProcessGroup | None" = None) -> tuple[str, int] | None:
    """Name and number of ranks of the group (by default the group of all processes). None if there is only one rank."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    group = process_group or dist.group.WORLD
    ranks = dist.get_world_size(group)
    return (group.group_name, ranks) if ranks > 1 else None  # type: ignore[union-attr]  # initialised, so no None


def forward(
    kernels: Backend, call: ForwardCall, group: str, ranks: int
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """As a backend's forward in training. The fifth result is the number of all ranks' values per channel.

    If the ranks have no values at all, the running statistics do not change. If they have one value, the variance is 0.
    """
    count, mean, m2 = gather_moments(kernels, *kernels.moments(call.x), group, ranks)
    invstd = torch.rsqrt(m2 / count.clamp(min=1) + call.eps)
    y, mask = kernels.normalize(call, mean, invstd)
    update_running(call, count, mean, m2)
    return y, mean, invstd, mask, count


def backward(kernels: Backend, call: BackwardCall, group: str, count: Tensor) -> Gradients:
    """As a backend's backward. dweight and dbias are this rank's share, and DistributedDataParallel averages them."""
    need_x, need_weight, need_bias, need_residual = call.needs
    dx = dweight = dbias = dresidual = joint = None
    if call.needs_sums:
        sum_dy, sum_dy_xhat = kernels.grad_sums(call)
        dbias = sum_dy.to(call.bias.dtype) if need_bias and call.bias is not None else None
        # A copy, because results must not share memory.
        dweight = sum_dy_xhat.to(call.weight.dtype, copy=True) if need_weight and call.weight is not None else None
    if need_x:
        # The kernels divide by this rank's own count, which is known on the host. The scaled sums correct for that.
        own_count = max(layout(call.x).count, 1)
        scale = own_count / count.clamp(min=1).to(sum_dy.dtype)
        joint_dy, joint_dy_xhat = reduce_sums(sum_dy, sum_dy_xhat, group)
        joint = (joint_dy * scale, joint_dy_xhat * scale, own_count)
    if need_x or need_residual:
        dx, dresidual = kernels.grad_input(call, joint)
    return dx, dweight, dbias, dresidual


def gather_moments(
    kernels: Backend, count: int, mean: Tensor, m2: Tensor, group: str, ranks: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Merges the (count, mean [C], M2 [C]) of all ranks, with the same bits on each. The result's count is a tensor."""
    channels, dtype = mean.shape[0], mean.dtype
    # The bits of the integer are sent, because float32 would round counts above 2^24.
    bits = torch.full((1,), count, dtype=torch.int64, device=mean.device).view(dtype)
    packed = torch.cat((mean, m2, bits))
    gathered = packed.new_empty(ranks, len(packed))
    dist.all_gather(list(gathered.unbind()), packed, group=_resolve(group))
    means, m2s, bits = gathered.split((channels, channels, len(bits)), dim=1)
    return kernels.merge(bits.contiguous().view(torch.int64).flatten(), means, m2s)


def reduce_sums(sum_dy: Tensor, sum_dy_xhat: Tensor, group: str) -> tuple[Tensor, Tensor]:
    """sum g [C] and sum g * xhat [C] over all ranks."""
    reduced = torch.cat((sum_dy, sum_dy_xhat))
    dist.all_reduce(reduced, group=_resolve(group))
    joint_dy, joint_dy_xhat = reduced.chunk(2)
    return joint_dy, joint_dy_xhat


def _resolve(group: str) -> "dist.ProcessGroup":
    """The group of that name. The operator takes the name, since a schema has no process groups."""
    # It is resolved in C++, by the name from ranks_of. Not every version of torch has a type for group names.
    return dist.distributed_c10d._resolve_process_group(group)  # type: ignore[arg-type]
