"""Batch norm over the joint batch of several processes."""

from torch import Tensor

from ..backends.calls import ForwardCall
from ..backends.records import Records
from . import context, op
from .autograd import with_residual_in_format
from .validation import check_call


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
    records: Records | None = None,
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
    call = ForwardCall(
        input, weight, bias, residual, running_mean, running_var, num_batches_tracked, True, momentum, eps, act
    )
    check_call("sync_batch_norm", call, joint=True)
    if context.is_transformed():
        raise RuntimeError(
            "sync_batch_norm: statistics across ranks cannot be seen through by torch.func transforms or forward-mode "
            "differentiation; use a batch norm of one process there"
        )
    return op.batch_norm(with_residual_in_format(call), records, group)
