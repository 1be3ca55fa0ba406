"""Batch norm over the joint batch of several processes: the phases, with the two seams where the ranks meet.

    moments | gather: (count, mean, M2) of all ranks, merged in rank order | normalize
    grad_sums | reduce: (sum g, sum g * xhat) added over the ranks | grad_input

Two ops hold a pass each, collective included, so that eager, torch.compile and fake tensors all see one call. The
collectives follow the group's own backend: gloo for CPU tensors, nccl for CUDA. They are not torch's functional ones:
of those, one that Ctrl-C interrupts before it is waited for stays in a registry, which keeps gloo's threads alive until
the process ends.
"""

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from . import backends, ops
from .backends import records as rows
from .backends.layout import empty_like, layout
from .backends.reference import accumulator
from .functional import _check, _check_statistics, in_format_of

if TYPE_CHECKING:
    from .probes.buffer import Records


def ranks_of(process_group: "dist.ProcessGroup | None" = None) -> tuple[str, int] | None:
    """Name and number of ranks of the group, by default of all processes; None where there are no others to meet."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    group = process_group or dist.group.WORLD
    ranks = dist.get_world_size(group)
    return (group.group_name, ranks) if ranks > 1 else None


def sync_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    group: tuple[str, int],
    residual: Tensor | None = None,
    act: str | None = None,
    num_batches_tracked: Tensor | None = None,
    records: "Records | None" = None,
) -> Tensor:
    """:func:`bnkern.batch_norm` in training, by the mean and variance over the batches of all ranks of a group.

    Every rank must call, with the same number of channels, dtype and arguments that require grad; N and S may differ,
    and an empty batch (N = 0) takes part. All ranks get the same bits of mean, variance and running statistics.
    Gradients are those of the sum of all ranks' losses; those of weight and bias are this rank's share of it, as in
    torch.nn.SyncBatchNorm: DistributedDataParallel averages them.

    One all_gather of [2C + 2] numbers forward, one all_reduce of [2C] backward where input requires grad. Where the
    ranks have no value at all the running statistics stay; one value in all counts as variance 0.

    Args:
        group: name and size of the group, from :func:`ranks_of`; the others are those of :func:`bnkern.batch_norm`.
        records: as there, of this rank's own values.

    Raises:
        TypeError, ValueError: as :func:`bnkern.batch_norm`. A rank that raises leaves the others waiting.
        RuntimeError: within a torch.func transform or forward-mode differentiation, and in double backward.

    Source: as :func:`bnkern.batch_norm`; merging by Chan, Golub and LeVeque 1979.
    """
    _check("sync_batch_norm", input, residual, act)
    statistics = (running_mean, running_var, weight, bias, True, momentum, eps, num_batches_tracked)
    _check_statistics(input, *statistics, others=True)
    if ops.transformed():
        raise RuntimeError(
            "sync_batch_norm: statistics across ranks cannot be seen through by torch.func transforms or forward-mode "
            "differentiation; use a batch norm of one process there"
        )
    wanted = (None, None, None) if records is None else records[:3]
    y, mean, _, unbiased, count, _, activation = torch.ops.bnkern.sync_batch_norm_forward(
        input,
        weight,
        bias,
        in_format_of(input, residual),
        eps,
        act,
        backends.forced(),
        *group,
        wanted[0] is not None,
        *wanted[1:],
    )
    if wanted[0] is not None:
        wanted[0].copy_(activation)
    if records is not None and records.mirrors:
        if torch.compiler.is_compiling():
            raise RuntimeError("several recordings of one layer at once are for eager calls, not for torch.compile")
        records.forward_written()
        if y.grad_fn is not None:
            y.grad_fn.register_hook(lambda *_: records.backward_written())
    if num_batches_tracked is not None:
        num_batches_tracked += 1
    if running_mean is not None:
        share = momentum if momentum is not None else 1.0 / num_batches_tracked.to(mean.dtype)
        share = (count > 0).to(mean.dtype) * share
        for running, batch in ((running_mean, mean), (running_var, unbiased)):
            running.copy_(running.to(mean.dtype) * (1 - share) + batch * share)
    return y


# ---------------------------------------------------------------------------------------------------- the two seams


def _named(group: str) -> "dist.ProcessGroup":
    """The group of that name: the ops take the name, since a schema has no process groups."""
    return dist.distributed_c10d._resolve_process_group(group)  # in C++, by the name that ranks_of gives


def gather_moments(kernels, count: int, mean: Tensor, m2: Tensor, group: str, ranks: int) -> tuple[Tensor, ...]:
    """One (count, mean [C], M2 [C]) of all ranks' own, the same bits on each. The count is a tensor from here on."""
    channels, dtype = mean.shape[0], mean.dtype
    # The integer travels as bits: float32 would round counts beyond 2^24.
    bits = torch.full((1,), count, dtype=torch.int64, device=mean.device).view(dtype)
    packed = torch.cat((mean, m2, bits))
    gathered = packed.new_empty(ranks, len(packed))
    dist.all_gather(list(gathered.unbind()), packed, group=_named(group))
    means, m2s, bits = gathered.split((channels, channels, len(bits)), dim=1)
    return kernels.merge(bits.contiguous().view(torch.int64).flatten(), means, m2s)


def reduce_sums(sum_dy: Tensor, sum_dy_xhat: Tensor, group: str) -> tuple[Tensor, Tensor]:
    """sum g [C] and sum g * xhat [C] over all ranks."""
    reduced = torch.cat((sum_dy, sum_dy_xhat))
    dist.all_reduce(reduced, group=_named(group))
    return reduced.chunk(2)


# -------------------------------------------------------------------------------------------------------- the ops

_library = torch.library.Library("bnkern", "FRAGMENT")
_library.define(
    "sync_batch_norm_forward(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, float eps, str? act,"
    " str backend, str group, int ranks, bool record=False, Tensor? record_gradient=None, Tensor? record_affine=None)"
    " -> (Tensor y, Tensor mean, Tensor invstd, Tensor unbiased, Tensor count, Tensor mask, Tensor activation)"
)
_library.define(
    "sync_batch_norm_backward(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor invstd,"
    " Tensor count, Tensor mask, str? act, bool[] needs, str backend, str group, bool record_gradient=False,"
    " bool record_affine=False)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dresidual, Tensor gradient, Tensor affine)"
)


def _forward(
    x, weight, bias, residual, eps, act, backend, group, ranks, record=False, record_gradient=None, record_affine=None
):
    kernels = backends.choose(backend, x.device, x.dtype)
    count, mean, m2 = gather_moments(kernels, *kernels.moments(x), group, ranks)
    invstd = torch.rsqrt(m2 / count.clamp(min=1) + eps)
    activation = ops._record(x, rows.ACTIVATION, record)
    places = ops._places(record=activation)
    y, mask = kernels.normalize(x, mean, invstd, weight, bias, residual, act, **places)
    unbiased = m2 / (count - 1).clamp(min=1)  # the variance that running statistics keep
    mask = x.new_empty(0, dtype=torch.uint8) if mask is None else mask
    return y, mean, invstd, unbiased, count, mask, activation


def _forward_fake(
    x, weight, bias, residual, eps, act, backend, group, ranks, record=False, record_gradient=None, record_affine=None
):
    like = layout(x)
    mean, invstd, unbiased = (x.new_empty(like.c, dtype=accumulator(x.dtype)) for _ in range(3))
    mask = x.new_empty(like.mask_shape if act is not None and residual is not None else 0, dtype=torch.uint8)
    count, activation = x.new_empty((), dtype=torch.int64), ops._record(x, rows.ACTIVATION, record)
    return empty_like(x, like.rows), mean, invstd, unbiased, count, mask, activation


def _backward(
    dy,
    x,
    weight,
    bias,
    mean,
    invstd,
    count,
    mask,
    act,
    needs,
    backend,
    group,
    record_gradient=False,
    record_affine=False,
):
    need_x, need_weight, need_bias, need_residual = needs
    kernels = backends.choose(backend, x.device, x.dtype)
    common = (dy, x, mean, invstd, weight, bias, mask if mask.numel() else None, act)
    gradient, affine = ops._record(x, rows.GRADIENT, record_gradient), ops._record(x, rows.AFFINE, record_affine)
    dx = dweight = dbias = dresidual = joint = None
    if need_x or need_weight or need_bias or record_affine:
        sums = kernels.grad_sums(*common, **ops._places(record=affine))
        dbias = sums[0].to(bias.dtype) if need_bias else None
        dweight = sums[1].to(weight.dtype, copy=True) if need_weight else None  # no two results share memory
    if need_x:
        # The kernels divide by a count that the host knows, this rank's own; the sums make up for the difference.
        own = max(layout(x).count, 1)
        scale = own / count.clamp(min=1).to(mean.dtype)
        joint = (*(s * scale for s in reduce_sums(*sums, group)), own)
    if need_x or need_residual:
        dx, dresidual = kernels.grad_input(*common, joint, need_x, need_residual, **ops._places(record=gradient))
    grads = (x.new_empty(0) if grad is None else grad for grad in (dx, dweight, dbias, dresidual))
    return (*grads, gradient, affine)


def _backward_fake(
    dy,
    x,
    weight,
    bias,
    mean,
    invstd,
    count,
    mask,
    act,
    needs,
    backend,
    group,
    record_gradient=False,
    record_affine=False,
):
    like = (empty_like(x, layout(x).rows), weight, bias, empty_like(x, layout(x).rows))
    grads = (torch.empty_like(t) if need else x.new_empty(0) for t, need in zip(like, needs, strict=True))
    return (*grads, ops._record(x, rows.GRADIENT, record_gradient), ops._record(x, rows.AFFINE, record_affine))


def _setup_context(ctx, inputs, output):
    x, weight, bias, _, _, ctx.act, ctx.backend, ctx.group, _, _, gradient, affine = inputs
    _, mean, invstd, unbiased, count, mask, activation = output
    ctx.save_for_backward(x, weight, bias, mean, invstd, count, mask)
    ctx.places = gradient, affine  # to be written: saved tensors may not change
    ctx.mark_non_differentiable(mean, invstd, unbiased, count, mask, activation)
    ctx.set_materialize_grads(False)  # y alone has a gradient; no zeros for the rest


def _autograd(ctx, dy, *_):
    needs = ctx.needs_input_grad[:4]
    saved = ctx.saved_tensors
    flags = [record is not None and needed for record, needed in zip(ctx.places, (needs[0], True), strict=True)]
    *grads, gradient, affine = torch.ops.bnkern.sync_batch_norm_backward(
        dy, *saved, ctx.act, needs, ctx.backend, ctx.group, *flags
    )
    ops.copy_records(ctx.places, (gradient, affine), flags)
    return (*(grad if need else None for grad, need in zip(grads, needs, strict=True)), *[None] * 8)


def _no_second_derivative(ctx, *_):
    raise RuntimeError("sync_batch_norm: double backward across ranks is not supported, only within one process")


for _name, _implementation, _fake in (
    ("sync_batch_norm_forward", _forward, _forward_fake),
    ("sync_batch_norm_backward", _backward, _backward_fake),
):
    _library.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"bnkern::{_name}", _fake, lib=_library)
torch.library.register_autograd(
    "bnkern::sync_batch_norm_forward", _autograd, setup_context=_setup_context, lib=_library
)
torch.library.register_autograd("bnkern::sync_batch_norm_backward", _no_second_derivative, lib=_library)
