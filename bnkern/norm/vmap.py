"""Batch norm for torch.func's grad and vmap, by the kernels: the members of an ensemble are folded into the channels.

vmap maps one batch norm over B members. Channels are independent in batch norm, so B members of C channels are one
batch norm of B * C channels. x [B, N, C, ...] becomes [N, B * C, ...] in the memory format of its members. This is a
copy, unless x has this order in memory already. Tensors that the members share are repeated. The results are views of
the folded results.

The backward reads the sign of z from y, which has the same sign. The backward is differentiable by the reference
formula.
"""

import torch
from torch import Tensor

from ..backends import reference
from ..backends.activations import ACTIVATIONS
from ..backends.calls import BackwardCall, ForwardCall
from ..backends.layout import layout
from . import context
from .op import operands


def serves(call: ForwardCall) -> bool:
    """Whether this module can serve the call: no forward mode is active, and no running statistics are updated."""
    return not context.is_forward_mode() and call.training == (call.running_mean is None)


def batch_norm(call: ForwardCall, backend: str) -> Tensor:
    """y of a call that updates nothing. Uses the running statistics if they are given, else those of the batch."""
    return _Forward.apply(*call[:6], call.eps, call.act, backend)[0]


def _fold(t: Tensor | None, axis: int | None, members: int, rows: bool) -> Tensor | None:
    """The members' tensors [N, C, ...] as one [N, B * C, ...], or their vectors [C] as one [B * C]. None stays None."""
    if t is None:
        return None
    t = t.expand(members, *t.shape) if axis is None else t.movedim(axis, 0)
    if t.dim() == 2:
        return t.reshape(-1)
    if rows:
        return t.movedim((0, 2), (-2, -1)).flatten(-2).movedim(-1, 1)
    return t.transpose(0, 1).flatten(1, 2)


def _unfold(t: Tensor, members: int) -> tuple[Tensor, int]:
    """The members' tensors as one tensor, and its axis of the members."""
    axis = min(t.dim() - 1, 1)
    return t.unflatten(axis, (members, -1)), axis


def _mapped(
    function: type[torch.autograd.Function], info, in_dims: tuple, arguments: tuple, tensors: int, x: int
) -> tuple[tuple, tuple]:
    """A vmap rule: applies the function to the folded tensors.

    The first ``tensors`` arguments are tensors. Argument number ``x`` determines the layout.
    """
    axis = in_dims[x]
    rows = layout(arguments[x] if axis is None else arguments[x].select(axis, 0)).rows
    folded = [
        _fold(t, dim, info.batch_size, rows) for t, dim in zip(arguments[:tensors], in_dims[:tensors], strict=True)
    ]
    results = function.apply(*folded, *arguments[tensors:])
    tensors_of_members, axes = zip(*(_unfold(t, info.batch_size) for t in results), strict=True)
    return tensors_of_members, axes


class _Forward(torch.autograd.Function):
    """y, mean and invstd."""

    @staticmethod
    def forward(x, weight, bias, residual, running_mean, running_var, eps, act, backend):
        training = running_mean is None
        call = ForwardCall(
            x, weight, bias, residual, running_mean, running_var, training=training, momentum=0.0, eps=eps, act=act
        )
        return torch.ops.bnkern.batch_norm_forward(*operands(call), backend)[:3]

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias, _, running_mean, _, *ctx.settings = inputs
        y, mean, invstd = output
        ctx.training = running_mean is None
        ctx.mark_non_differentiable(mean, invstd)
        ctx.save_for_backward(x, weight, bias, mean, invstd, y)

    @staticmethod
    def backward(ctx, dy, *_):
        *saved, y = ctx.saved_tensors
        eps, act, backend = ctx.settings
        g = dy if act is None else ACTIVATIONS[act].gradient(dy, ~(y <= 0))
        dx, dweight, dbias = _Backward.apply(g, *saved, ctx.training, eps, backend)
        _, weight, bias, *_ = saved
        grads = (dx, None if weight is None else dweight, None if bias is None else dbias, g)
        needed = (grad if need else None for grad, need in zip(grads, ctx.needs_input_grad, strict=False))
        return (*needed, None, None, None, None, None)

    @staticmethod
    def vmap(info, in_dims, *arguments):
        return _mapped(_Forward, info, in_dims, arguments, 6, 0)


class _Backward(torch.autograd.Function):
    """dx, dweight and dbias from g, the gradient before the activation.

    An absent weight is 1, and an absent bias is 0.
    """

    @staticmethod
    def forward(g, x, weight, bias, mean, invstd, training, eps, backend):
        vectors = [mean if v is None else v for v in (weight, bias)]
        if weight is None:
            vectors[0] = torch.ones_like(mean)
        call = BackwardCall(
            g, x, vectors[0], vectors[1], mean, invstd, training=training, needs=(True, True, True, False)
        )
        return torch.ops.bnkern.batch_norm_backward(*call[:10], call.sample_weight, backend)[:3]

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.training, ctx.eps, _ = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, *ddgrads):
        g, x, weight, bias, mean, invstd = ctx.saved_tensors

        def formula(g: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor | None, ...]:
            vectors = (weight, mean if bias is None else bias)
            call = BackwardCall(g, x, *vectors, mean, invstd, None, None, ctx.training, (True, True, True, False))
            return reference.differentiable_backward(call, ctx.eps)[:3]

        scale = torch.ones_like(mean) if weight is None else weight
        grad_g, grad_x, grad_weight = torch.func.vjp(formula, g, x, scale)[1](ddgrads)
        return grad_g, grad_x, None if weight is None else grad_weight, *[None] * 6

    @staticmethod
    def vmap(info, in_dims, *arguments):
        return _mapped(_Backward, info, in_dims, arguments, 6, 1)
