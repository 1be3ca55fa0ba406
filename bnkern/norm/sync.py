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
    num_batches_skipped: Tensor | None = None,
    records: Records | None = None,
) -> Tensor:
    """:func:`bnkern.batch_norm` in training, with the mean and variance over the batches of all ranks of a group.

    Every rank must call it, with the same number of channels, the same dtype and the same arguments that require grad.
    N and S may differ, and a batch may be empty (N = 0). All ranks get the same bits of mean, variance and running
    statistics. Gradients are those of the sum of all ranks' losses. The gradients of weight and bias are this rank's
    share of it, as in torch.nn.SyncBatchNorm, and DistributedDataParallel averages them.

    The forward has one all_gather of [2C + 2] numbers. The backward has one all_reduce of [2C] numbers if input
    requires grad. If the ranks have no values at all, the running statistics do not change. If they have one value, the
    variance is 0.

    Args:
        group: name and size of the group, from :func:`ranks_of`. The other arguments are as in
            :func:`bnkern.batch_norm`.
        num_batches_skipped: as in :func:`bnkern.batch_norm`. The statistics of the joint batch decide, so all ranks
            make the same decision.
        records: as in :func:`bnkern.batch_norm`, for this rank's own values.

    Raises:
        TypeError, ValueError: as :func:`bnkern.batch_norm`. A rank that raises leaves the others waiting.
        RuntimeError: in a torch.func transform or forward-mode differentiation, and in double backward.

    Source: as :func:`bnkern.batch_norm`; merging by Chan, Golub and LeVeque 1979.
    """
    call = ForwardCall(
        input,
        weight,
        bias,
        residual,
        running_mean,
        running_var,
        num_batches_tracked,
        True,
        momentum,
        eps,
        act,
        num_batches_skipped=num_batches_skipped,
    )
    check_call("sync_batch_norm", call, joint=True)
    if context.is_transformed():
        raise RuntimeError(
            "sync_batch_norm: statistics across ranks do not support torch.func transforms and forward-mode "
            "differentiation; use a batch norm of one process there"
        )
    return op.batch_norm(with_residual_in_format(call), records, group)
