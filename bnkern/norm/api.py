"""Batch norm with fused ReLU and residual add: the public functions, and the choice of the code that serves a call.

There are four cases. Plain eager calls go directly to a backend (:mod:`bnkern.norm.autograd`). Calls that
torch.compile, export, a mode or a tensor subclass must record use the operator (:mod:`bnkern.norm.op`). torch.func's
vmap and grad fold members into channels (:mod:`bnkern.norm.vmap`). Traces in eval mode record torch's own operators.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .. import backends
from ..backends import reference
from ..backends.calls import ForwardCall
from ..backends.layout import layout
from ..backends.records import Records
from . import autograd, context, op, vmap
from .validation import check_call, check_tensors


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    act: str | None = None,
    num_batches_tracked: Tensor | None = None,
    num_batches_skipped: Tensor | None = None,
    sample_weight: Tensor | None = None,
    records: "Records | None" = None,
) -> Tensor:
    """``act(batch_norm(input) + residual)`` in one fused operation. Without both it is ``F.batch_norm``.

    Per channel c over the M = N * S values of the batch:

        mean = sum x / M,  var = sum (x - mean)^2 / M          (training; else the running statistics)
        y    = act(weight * (x - mean) / sqrt(var + eps) + bias + residual)
        running = (1 - momentum) * running + momentum * batch, the variance unbiased (M - 1)

    With ``sample_weight`` w and W = sum w over the M values:

        mean = sum w x / W,  var = sum w (x - mean)^2 / W      (training; in eval mode the weights are ignored)
        running: as above, with the variance sum w (x - mean)^2 / (W - 1) if W > 1, and var otherwise

    So integer weights are numbers of repetitions, and values of weight 0 do not count. y is computed for all values.

    Arithmetic and statistics are float32 for float32, bfloat16 and float16 input, and float64 for float64 input. The
    sum is rounded once, to the dtype of ``input``, before the activation.

    Args:
        input: [N, C, ...] with 2 or more dimensions; float32, bfloat16, float16 or float64. NCHW, channels_last, and
            views of them with strided samples, channels or rows are read in place. Tensors with other strides are
            copied once to the dense form of their layout.
        running_mean: [C], updated in place in training. Give both running_mean and running_var, or None for both.
        running_var: [C], as running_mean.
        weight: [C] or None.
        bias: [C] or None, independent of weight.
        training: normalise by the batch's statistics (True) or by the running statistics (False).
        momentum: weight of the batch in the running statistics; None for the cumulative mean, 1 / counter.
        eps: added to the variance. It must be positive in training, as in torch since 2.10, and not negative otherwise
            (torch 2.10 and 2.11 require a positive value there too).
        residual: a tensor of the shape, dtype and device of ``input``, added before the activation. It is read in
            place if it has the memory format of ``input``. A residual in the other format (contiguous with a
            channels_last input, or the reverse) is first copied to the format of ``input``, which costs one more read
            and write of the residual. Its gradient is copied back, which costs the same. Its shape is not broadcast,
            and its dtype is not promoted.
        act: None or "relu".
        num_batches_tracked: int64 scalar counter, increased by one in training if it is given. Required if momentum is
            None.
        num_batches_skipped: int64 scalar counter. If it is given, a batch whose statistics are not all finite (an
            infinity or NaN in any channel, or a variance that overflows) increases it by one in training, and leaves
            running_mean, running_var and num_batches_tracked as they were. y is computed as without it. The decision
            is made on the device, so the host does not wait, and a CUDA graph can capture the call. On CUDA tensors it
            costs two more small launches.
        sample_weight: [N] or [N, ...], the shape of ``input`` without the channel axis. A weight of a shape [N] counts
            for all positions of its sample. float32, or float64 for float64 input, on the device of ``input``. Weights
            must not be negative, which is not checked. They are constants, and get no gradient. Values of weight 0 do
            not change the statistics, even if they are infinite or NaN. But the gradients of ``weight`` and ``bias``
            are sums over all values, so a NaN in the padding of ``input`` makes the gradient of ``weight`` NaN, even if
            the loss ignores the padding. If all weights are 0, the statistics and y are NaN, and with
            ``num_batches_skipped`` the batch is skipped. Eval mode checks the weights and ignores them. In training
            they exclude ``records``, torch.func's transforms, forward mode and statistics across ranks. On CUDA tensors
            Triton's kernels serve the call.
        records: buffers for the records that the kernels write in the same pass (from :mod:`bnkern.probes`). The
            results keep their bits.

    Vectors of size C have the dtype of ``input``, or float32 for bfloat16 and float16 input.

    Returns:
        y, with the shape, dtype and memory format of ``input``. It is differentiable in input, weight, bias and
        residual, and each gradient has the memory format of its tensor. (Under torch.compile the compiler chooses the
        format of the residual's gradient until autograd accumulates it into a leaf, as for torch's own addition.)
        Second derivatives and forward mode (torch.func.jvp, dual tensors) use the reference formula. torch.func's vmap
        and grad run the kernels, with the members of an ensemble folded into the channels (:mod:`bnkern.norm.vmap`).
        If they must update running statistics, they use the reference formula. Input, weight, bias and two vectors are
        saved for backward, and with residual and ReLU also one bit per element.

    Raises:
        TypeError, ValueError: an argument is not as described above. The message names it. Nothing has been written.
        RuntimeError: a forced backend cannot serve the call, or arguments that exclude each other are given. The
            message has the reason.

    Source: Ioffe and Szegedy, "Batch Normalization", 2015.
    """
    call = ForwardCall(
        input,
        weight,
        bias,
        residual,
        running_mean,
        running_var,
        num_batches_tracked,
        training,
        momentum,
        eps,
        act,
        num_batches_skipped=num_batches_skipped,
        sample_weight=sample_weight,
    )
    if sample_weight is None and context.is_plain_eager():
        y = autograd.try_batch_norm(call, records)
        if y is not None:
            return y
    node = context.fx_node(
        batch_norm,
        input,
        (running_mean, running_var, weight, bias, training, momentum, eps),
        {
            "residual": residual,
            "act": act,
            "num_batches_tracked": num_batches_tracked,
            "num_batches_skipped": num_batches_skipped,
            "sample_weight": sample_weight,
        },
    )
    if node is not None:
        return node  # type: ignore[return-value]  # the result is a Proxy
    if torch.jit.is_tracing() and not training:  # a trace in training records bnkern's operator
        return op.eval_in_torch(call)
    check_call("batch_norm", call)
    if sample_weight is not None:
        if training and records is not None:
            raise RuntimeError("batch_norm: sample_weight is not supported while a probe records this batch norm")
        call = call._replace(sample_weight=_flat_weights(sample_weight, input) if training else None)
    return _dispatch(call, records)


def _flat_weights(sample_weight: Tensor, x: Tensor) -> Tensor:
    """The weights as the kernels read them: contiguous [N * S], in the order n, s."""
    n, _, s = layout(x)[1:]
    weights = sample_weight.detach()
    if weights.dim() == 1:
        weights = weights.view(n, 1).expand(n, s)
    return weights.reshape(n * s).contiguous()


def add_act(
    x: Tensor, residual: Tensor | None = None, act: str | None = "relu", *, records: "Records | None" = None
) -> Tensor:
    """``act(x + residual)`` by the kernels of :func:`batch_norm` without normalisation.

    x, residual and ``records`` are as ``input``, ``residual`` and ``records`` of :func:`batch_norm`. The sum is rounded
    once, before the activation. A residual in another memory format than x is copied once. The result is differentiable
    in x and residual. Raises TypeError or ValueError with the name of the wrong argument.
    """
    node = context.fx_node(add_act, x, (residual, act), {})
    if node is not None:
        return node  # type: ignore[return-value]
    call = ForwardCall(x, residual=residual, training=False, momentum=0.0, eps=0.0, act=act)
    if torch.jit.is_tracing():
        return op.eval_in_torch(call)
    check_tensors("add_act", x, residual, act)
    return _dispatch(call, records)


class Moments(NamedTuple):
    """Per-channel moments: ``count`` values each, ``mean`` [C] and biased ``var`` [C]."""

    count: int  # type: ignore[assignment]  # hides tuple.count
    mean: Tensor
    var: Tensor


def channel_moments(x: Tensor) -> Moments:
    """Mean and biased variance of each channel of x [N, C, ...] over all other axes, in one pass over memory.

    mean = sum x / M and var = sum (x - mean)^2 / M, in float32 (float64 for float64 input). They are computed from sums
    of distances from a value near the mean, and merged with Chan's formula. The results are not differentiable. Raises
    TypeError or ValueError, and RuntimeError under torch.jit.trace, which would record the results as constants.
    """
    check_tensors("channel_moments", x)
    if torch.jit.is_tracing():
        raise RuntimeError("channel_moments: torch.jit.trace cannot record this call, only its results as constants")
    x = x.detach().resolve_neg()
    count, mean, m2 = backends.choose(backends.forced(), x.device, x.dtype).moments(x)
    return Moments(count, mean, m2 / count)


def explain(input: Tensor, *args: object, **kwargs: object) -> str:
    """The backend that serves ``batch_norm(input, ...)``, and why the others do not, as a table.

    The device and dtype of input decide. ``residual`` and ``act`` are checked if they are passed by name. Other
    arguments are ignored. Raises TypeError or ValueError as :func:`batch_norm` does.
    """
    check_tensors("explain", input, kwargs.get("residual"), kwargs.get("act"))  # type: ignore[arg-type]  # checks types
    return backends.explain(input.device, input.dtype)


def _dispatch(call: ForwardCall, records: Records | None) -> Tensor:
    """Serves a valid call in the way that its context requires."""
    call = autograd.with_residual_in_format(call)
    if context.is_transformed():
        return _transformed(call)
    if context.is_direct(*call[:7], call.num_batches_skipped, call.sample_weight):
        return autograd.batch_norm(call, records)
    return op.batch_norm(call, records)


def _transformed(call: ForwardCall) -> Tensor:
    """Serves a call within torch.func's transforms or forward-mode differentiation."""
    if call.training and call.num_batches_skipped is not None:
        raise RuntimeError(
            "batch_norm: torch.func transforms and forward-mode differentiation do not support num_batches_skipped "
            "(skip_nonfinite of a module) in training"
        )
    if call.sample_weight is not None:
        raise RuntimeError(
            "batch_norm: torch.func transforms and forward-mode differentiation do not support sample_weight "
            "in training"
        )
    if vmap.serves(call):
        return vmap.batch_norm(call, backends.forced())
    mean = call.running_mean
    if call.training and mean is not None and context.is_mapped(call.x) and not context.is_mapped(mean):
        raise RuntimeError(
            "batch_norm: vmap maps over input but not over running_mean and running_var, which cannot store the update "
            "of every member; make the module with track_running_stats=False, or call it in eval mode"
        )
    # Forward mode, and running statistics under torch.func, use the reference formula, as does double backward.
    return reference.forward(call)[0]
