"""Batch norm in plain eager mode: one autograd.Function over a backend's forward and backward."""

from collections.abc import Callable

import torch
from torch import Tensor

from .. import backends
from ..backends import reference
from ..backends.calls import BackwardCall, Forward, ForwardCall
from ..backends.layout import formats_conflict, layout, relaid
from ..backends.protocol import Backend
from ..backends.records import Records
from . import context


def try_batch_norm(call: ForwardCall, records: Records | None) -> Tensor | None:
    """:func:`batch_norm` of a call that was not validated, in plain eager mode.

    The backend checks the call while it reads the tensors. Returns None, before anything is written, if this short
    check does not accept the call.
    """
    x = call.x
    for t in call[:4]:
        if t is not None and type(t) not in context.PLAIN:
            return None
    if x is None or x.is_meta or x.dtype not in backends.DTYPES:
        return None
    backend = backends.choose(backends.forced(), x.device, x.dtype)
    attempt = getattr(backend, "try_forward", None)
    if attempt is None:
        return None
    try:
        return _run(call, records, backend, attempt)
    except _Declined:
        return None


def batch_norm(call: ForwardCall, records: Records | None) -> Tensor:
    """y of a valid call of plain tensors, differentiable."""
    backend = backends.choose(backends.forced(), call.x.device, call.x.dtype)
    x = context.unwrapped(call.x)
    weight, bias, residual, running_mean, running_var, counter = map(context.unwrapped, call[1:7])
    call = ForwardCall(x, weight, bias, residual, running_mean, running_var, counter, *call[7:])
    if call.num_batches_skipped is not None:
        call = call._replace(num_batches_skipped=context.unwrapped(call.num_batches_skipped))
    if call.sample_weight is not None:
        call = call._replace(sample_weight=context.unwrapped(call.sample_weight))
    return _run(call, records, backend, backend.forward)


class _Declined(RuntimeError):
    """The backend returned None for the call."""


def _run(
    call: ForwardCall, records: Records | None, backend: Backend, forward: Callable[[ForwardCall], Forward | None]
) -> Tensor:
    x, weight, bias, residual, running_mean, running_var, counter, *_ = call
    needs_grad = context.grad_needed(x, weight, bias, residual)
    if needs_grad or records is not None:
        save_mask = needs_grad and call.act is not None and residual is not None
        record = None if records is None else records.activation
        call = ForwardCall(*call[:11], save_mask, record, *call[13:])
    if needs_grad:
        y = _apply(x, weight, bias, residual, call, backend, forward, records)
    else:
        y = _accepted(forward(call))[0]
        if records is not None:
            records.forward_written()
    if call.training:
        # The kernels write through addresses, which does not change autograd's version counters.
        updated = (running_mean, running_var, counter, call.num_batches_skipped)
        torch.autograd.graph.increment_version([t for t in updated if t is not None])
    return y


def _accepted(results: Forward | None) -> Forward:
    if results is None:
        raise _Declined("batch_norm: this is a defect of bnkern: the kernels cannot read a call that the checks accept")
    return results


class _BatchNorm(torch.autograd.Function):
    """A backend's forward and backward. Double backward uses the reference formula."""

    @staticmethod
    def forward(ctx, x, weight, bias, residual, call, backend, forward, records):
        y, mean, invstd, mask = _accepted(forward(call))
        if records is not None:
            records.forward_written()
        ctx.save_for_backward(x, weight, bias, mean, invstd, mask, call.sample_weight)
        ctx.call = call.act, call.training, call.eps, backend, records
        return y

    @staticmethod
    def backward(ctx, dy):
        act, training, eps, backend, records = ctx.call
        x, weight, bias, mean, invstd, mask, sample_weight = ctx.saved_tensors
        needs = ctx.needs_input_grad[:4]
        arguments = (x, weight, bias, mean, invstd, mask, act, training, needs)
        if torch.is_grad_enabled() or context.is_batched(dy):
            call = BackwardCall(dy, *arguments, sample_weight=sample_weight)
            grads = reference.differentiable_backward(call, eps)
        elif records is None:
            dy = dy.resolve_neg()
            grads = backend.backward(BackwardCall(dy, *arguments, sample_weight=sample_weight))
        else:
            dy = dy.resolve_neg()
            requested = (records.gradient, records.affine, records.samples)
            grads = backend.backward(BackwardCall(dy, *arguments, *requested))
            records.backward_written()
        return (*grads, None, None, None, None)


# Function.apply calls this if no transform is active and no tensor is a wrapper of a transform that has ended. Both
# conditions hold here, and the checks in Function.apply would take 2 us.
_apply = super(torch.autograd.Function, _BatchNorm).apply


# --------------------------------------------------------------------------------- a residual in another format


def with_residual_in_format(call: ForwardCall) -> ForwardCall:
    """The call with a residual that the kernels can read: itself, or a copy if its memory format is not that of x."""
    x, residual = call.x, call.residual
    if residual is None or residual.stride() == x.stride() or not formats_conflict(x, residual):
        return call
    rows = layout(x).rows
    # torch.compile does not trace a Function with a forward mode.
    residual = relaid(residual, rows) if torch.compiler.is_compiling() else _Relaid.apply(residual, rows)
    return ForwardCall(x, call.weight, call.bias, residual, *call[4:])


class _Relaid(torch.autograd.Function):
    """A copy, in the given layout, of a tensor in the other layout. Its gradient is copied back to the other layout."""

    generate_vmap_rule = True

    @staticmethod
    def forward(t, rows):
        return relaid(t, rows)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.rows = inputs

    @staticmethod
    def backward(ctx, grad):
        return _Relaid.apply(grad, not ctx.rows), None

    @staticmethod
    def jvp(ctx, tangent, _):
        return _Relaid.apply(tangent, ctx.rows)
