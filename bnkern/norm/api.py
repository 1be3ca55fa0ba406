"""Batch norm with fused ReLU and residual add: the public functions, and the choice of the way a call takes.

There are four ways. Plain eager calls go straight to a backend (:mod:`bnkern.norm.autograd`). Calls that torch.compile,
export, a mode or a tensor subclass must see go through the operator (:mod:`bnkern.norm.op`). torch.func's vmap and grad
fold members into channels (:mod:`bnkern.norm.vmap`). Traces in eval mode record torch's own operators.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .. import backends
from ..backends import reference
from ..backends.calls import ForwardCall
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
    records: "Records | None" = None,
) -> Tensor:
    """``act(batch_norm(input) + residual)`` in one fused operation; ``F.batch_norm`` where neither is given.

    Per channel c over the M = N * S values of the batch:

        mean = sum x / M,  var = sum (x - mean)^2 / M          (training; else the running statistics)
        y    = act(weight * (x - mean) / sqrt(var + eps) + bias + residual)
        running = (1 - momentum) * running + momentum * batch, the variance unbiased (M - 1)

    Arithmetic and statistics are float32 for float32, bfloat16 and float16 input, float64 for float64 input; the
    sum is rounded once, to the dtype of ``input``, before the activation.

    Args:
        input: [N, C, ...] of 2 to 5 or more dimensions; float32, bfloat16, float16 or float64. NCHW, channels_last,
            and views of them whose samples, channels or rows are strided are read in place; other strides are
            copied once to the dense form of their layout.
        running_mean: [C], updated in place in training; given together with running_var, or None.
        running_var: [C], as running_mean.
        weight: [C] or None.
        bias: [C] or None, independent of weight.
        training: normalise by the batch's statistics (True) or the running ones (False).
        momentum: weight of the batch in the running statistics; None for the cumulative mean, 1 / counter.
        eps: added to the variance; positive in training, as torch asks since 2.10, and not negative otherwise (torch
            2.10 and 2.11 ask for a positive one there too).
        residual: a tensor of the shape, dtype and device of ``input``, added before the activation. It is read in
            place where its memory format is that of ``input``. A residual in the other format (contiguous beside
            channels_last, or the reverse) is first copied to the format of ``input``, which costs one more read and
            write of the residual, and its gradient is copied back, which costs as much. Its shape is not broadcast
            and its dtype not promoted.
        act: None or "relu".
        num_batches_tracked: int64 scalar counter, raised by one in training when given; needed by momentum None.
        records: where the kernels write what they record, in the same pass (:mod:`bnkern.probes` gives it); the results
            keep their bits.

    Vectors of size C have the dtype of ``input``, or float32 for bfloat16 and float16 input.

    Returns:
        y, of the shape, dtype and memory format of ``input``. Differentiable in input, weight, bias and residual,
        each gradient in the memory format of its tensor (under torch.compile the format of the residual's gradient is
        the compiler's choice until autograd accumulates it into a leaf, as for torch's own addition);
        a second time, and in forward mode (torch.func.jvp, dual tensors), through the reference formula. torch.func's
        vmap and grad run the kernels, an ensemble's members folded into the channels (:mod:`bnkern.norm.vmap`),
        unless running statistics are to be updated: then the reference formula serves. Saved for backward: input,
        weight, bias, two vectors, and with residual and ReLU one bit per element.

    Raises:
        TypeError, ValueError: an argument is not as above; names it. Nothing was written by then.
        RuntimeError: a forced backend cannot serve the call; says why.

    Source: Ioffe and Szegedy, "Batch Normalization", 2015.
    """
    call = ForwardCall(
        input, weight, bias, residual, running_mean, running_var, num_batches_tracked, training, momentum, eps, act
    )
    if context.is_plain_eager():
        y = autograd.try_batch_norm(call, records)
        if y is not None:
            return y
    node = context.fx_node(
        batch_norm,
        input,
        (running_mean, running_var, weight, bias, training, momentum, eps),
        {"residual": residual, "act": act, "num_batches_tracked": num_batches_tracked},
    )
    if node is not None:
        return node  # type: ignore[return-value]  # a Proxy stands for the result
    if torch.jit.is_tracing() and not training:  # a trace in training records bnkern's operator
        return op.eval_in_torch(call)
    check_call("batch_norm", call)
    return _dispatch(call, records)


def add_act(
    x: Tensor, residual: Tensor | None = None, act: str | None = "relu", *, records: "Records | None" = None
) -> Tensor:
    """``act(x + residual)`` by the kernels of :func:`batch_norm` without normalisation.

    x and residual are as ``input`` and ``residual`` there, and so is ``records``; the sum is rounded once, before the
    activation. A residual in another memory format than x is copied once, as there. Differentiable in both. Raises
    TypeError or ValueError naming the argument that is wrong.
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

    mean = sum x / M and var = sum (x - mean)^2 / M, float32 (float64 for float64 input), by sums of distances
    from a value near the mean, merged with Chan's formula. Not differentiable: the results carry no graph. Raises
    TypeError or ValueError, and RuntimeError under torch.jit.trace, which would record the results as constants.
    """
    check_tensors("channel_moments", x)
    if torch.jit.is_tracing():
        raise RuntimeError("channel_moments: torch.jit.trace cannot record this call, only its results as constants")
    x = x.detach().resolve_neg()
    count, mean, m2 = backends.choose(backends.forced(), x.device, x.dtype).moments(x)
    return Moments(count, mean, m2 / count)


def explain(input: Tensor, *args: object, **kwargs: object) -> str:
    """Which backend serves ``batch_norm(input, ...)`` here, and why not the others, as a table.

    The device type and dtype of input decide. ``residual`` and ``act`` are checked where they are given by name; other
    arguments are ignored. Raises TypeError or ValueError as :func:`batch_norm` does.
    """
    check_tensors("explain", input, kwargs.get("residual"), kwargs.get("act"))  # type: ignore[arg-type]  # tells types
    return backends.explain(input.device, input.dtype)


def _dispatch(call: ForwardCall, records: Records | None) -> Tensor:
    """A valid call, by the way that its context asks for."""
    call = autograd.with_residual_in_format(call)
    if context.is_transformed():
        return _transformed(call)
    if context.is_direct(*call[:7]):
        return autograd.batch_norm(call, records)
    return op.batch_norm(call, records)


def _transformed(call: ForwardCall) -> Tensor:
    """A call within torch.func's transforms or forward-mode differentiation."""
    if vmap.serves(call):
        return vmap.batch_norm(call, backends.forced())
    mean = call.running_mean
    if call.training and mean is not None and context.is_mapped(call.x) and not context.is_mapped(mean):
        raise RuntimeError(
            "batch_norm: vmap maps over input but not over running_mean and running_var, which cannot take every "
            "member's update; make the module with track_running_stats=False, or call it in eval mode"
        )
    # Forward mode, and running statistics under torch.func: the reference formula, as for double backward.
    return reference.forward(call)[0]
