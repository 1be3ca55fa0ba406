"""What torch.compile, export, fake tensors and functional transforms see: one functional op and its backward.

The op writes nothing in place. It returns the new running statistics, which the caller copies back, so that
functionalisation has nothing to undo. Absent results are tensors of no elements, since an op cannot return None.
The argument ``backend`` is the forced backend's name or "" for the table's choice; the backward gets the same.

``torch._decomp`` has a decomposition of the forward in eval mode into torch's operators, which torch.onnx.export uses
and ``ExportedProgram.run_decompositions(torch._decomp.get_decompositions([op]))`` applies on request; torch.compile
and torch.export keep the op. torch.jit.trace records torch's operators in eval mode and the op in training, and
torch.fx.symbolic_trace records the call.
"""

import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._decomp import register_decomposition

from . import backends
from .backends import records
from .backends.layout import empty_like, layout
from .backends.reference import accumulator, pack_mask

PLAIN = (Tensor, torch.nn.Parameter, torch.nn.Buffer)


def nobody_looks() -> bool:
    """Whether no compilation, export, trace, dispatch or function mode, transform or forward-mode level is at work.

    A result that torch.jit.trace does not see made would be a constant of its graph.
    """
    return not (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
    )


def recorded() -> bool:
    """Whether the call goes into a graph that may later run with inputs that require gradients where these do not."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


def plain(t: Tensor) -> bool:
    """Whether the values of ``t`` are what lies in its memory: no subclass, no lazy negation, no zeros never stored."""
    return type(t) in PLAIN and not t.is_neg() and not t._is_zerotensor()


def direct(*tensors: Tensor | None) -> bool:
    """Whether eager may call the launcher with these tensors' addresses, without passing through an op.

    Only plain tensors on a real device have an address, and only where nobody looks need nobody see the call.
    """
    return nobody_looks() and all(t is None or (plain(t) and t.device.type != "meta") for t in tensors)


def transformed() -> bool:
    """Whether a torch.func transform (grad, jvp, vmap) or forward-mode differentiation must look into the call.

    They see through plain torch alone: an op's registered backward is unknown to them.
    """
    if torch.compiler.is_compiling():
        return False
    level = torch._C._functorch.peek_interpreter_stack()
    inside = level is not None and level.key() != torch._C._functorch.TransformType.Functionalize
    return inside or torch.autograd.forward_ad._current_level >= 0


def fx_node(function: Callable, x: object, args: tuple, kwargs: dict) -> fx.Proxy | None:
    """The call ``function(x, *args, **kwargs)`` as one node where torch.fx.symbolic_trace gave ``x``, else None."""
    if isinstance(x, fx.Proxy):
        return x.tracer.create_proxy("call_function", function, (x, *args), kwargs)
    return None


def over_members(t: Tensor) -> bool:
    """Whether vmap maps over ``t``, at any of its levels."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(t):
        if functorch.is_batchedtensor(t):
            return True
        t = functorch.get_unwrapped(t)
    return False


def batched(t: Tensor) -> bool:
    """Whether ``t`` stands for several tensors: a gradient that vmap or ``is_grads_batched`` maps over."""
    functorch = torch._C._functorch
    return functorch.is_functorch_wrapped_tensor(t) or functorch.is_legacy_batchedtensor(t)


_library = torch.library.Library("bnkern", "DEF")
_library.define(
    "batch_norm_forward(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? running_mean,"
    " Tensor? running_var, Tensor? num_batches_tracked, bool training, float? momentum, float eps, str? act,"
    " bool save_mask, str backend, bool record=False, Tensor? record_gradient=None, Tensor? record_affine=None)"
    " -> (Tensor y, Tensor mean, Tensor invstd, Tensor mask, Tensor new_running_mean, Tensor new_running_var,"
    " Tensor new_num_batches_tracked, Tensor activation)"
)
_library.define(
    "batch_norm_backward(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor invstd, Tensor mask,"
    " str? act, bool training, bool[] needs, str backend, bool record_gradient=False, bool record_affine=False)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dresidual, Tensor gradient, Tensor affine)"
)


def _or_empty(t: Tensor | None, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return x.new_empty(0, dtype=dtype) if t is None else t


def _or_none(t: Tensor) -> Tensor | None:
    return t if t.numel() else None


def _forward(
    x,
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
    save_mask,
    backend,
    record=False,
    record_gradient=None,
    record_affine=None,
):
    running = (running_mean, running_var, num_batches_tracked)
    if training:
        running = tuple(None if t is None else t.clone() for t in running)
    kernels = backends.choose(backend, x.device, x.dtype)
    activation = _record(x, records.ACTIVATION, record)
    y, mean, invstd, mask = kernels.forward(
        x, weight, bias, residual, *running, training, momentum, eps, act, save_mask, **_places(record=activation)
    )
    if not training:
        running = (None, None, None)
    acc = accumulator(x.dtype)
    statistics = (_or_empty(mean, x, acc), _or_empty(invstd, x, acc), _or_empty(mask, x, torch.uint8))
    return (y, *statistics, *(_or_empty(t, x) for t in running), activation)


def _forward_fake(
    x,
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
    save_mask,
    backend,
    record=False,
    record_gradient=None,
    record_affine=None,
):
    _allow_in_inductor()
    like = layout(x)
    identity = not training and running_mean is None
    statistic = [x.new_empty(0 if identity else like.c, dtype=accumulator(x.dtype)) for _ in range(2)]
    saved = save_mask and act is not None and residual is not None
    mask = x.new_empty(like.mask_shape if saved else 0, dtype=torch.uint8)
    running = [
        torch.empty_like(t) if training and t is not None else x.new_empty(0)
        for t in (running_mean, running_var, num_batches_tracked)
    ]
    return (empty_like(x, like.rows), *statistic, mask, *running, _record(x, records.ACTIVATION, record))


def _allow_in_inductor() -> None:
    """Register the op with Inductor as one to be called, although it also has a decomposition.

    Inductor does so by itself, but where the environment variable CI is set, as on GitHub's runners, it first raises
    for an operator of which torch knows a decomposition. Its module takes a second to import, so this waits until a
    graph is traced, when Inductor has imported it.
    """
    lowering = sys.modules.get("torch._inductor.lowering")
    op = torch.ops.bnkern.batch_norm_forward.default
    if lowering is not None and op not in lowering.lowerings:
        tag = torch._library.utils.get_layout_constraint_tag(op, with_default=True)
        lowering.make_fallback(op, layout_constraint=lowering.tag_to_layout_constraint(tag), warn=False)


def _record(x: Tensor, rows: tuple[str, ...], wanted: bool) -> Tensor:
    """Where a kernel writes its record [rows, C]; no elements where none is wanted."""
    return x.new_empty((len(rows), x.shape[1]) if wanted else 0, dtype=torch.float64)


def _places(**records: Tensor) -> dict[str, Tensor]:
    """The launcher's arguments for the records that are wanted."""
    return {name: record for name, record in records.items() if record.dim() == 2}


def copy_records(places: tuple[Tensor | None, ...], found: tuple[Tensor, ...], flags: list[bool]) -> None:
    """Each record that was flagged to its place."""
    for place, record, flag in zip(places, found, flags, strict=True):
        if flag:
            place.copy_(record)


def _backward(
    dy, x, weight, bias, mean, invstd, mask, act, training, needs, backend, record_gradient=False, record_affine=False
):
    kernels = backends.choose(backend, x.device, x.dtype)
    gradient = _record(x, records.GRADIENT, record_gradient)
    affine = _record(x, records.AFFINE, record_affine)
    grads = kernels.backward(
        dy,
        x,
        weight,
        bias,
        _or_none(mean),
        _or_none(invstd),
        _or_none(mask),
        act,
        training,
        tuple(needs),
        **_places(record_gradient=gradient, record_affine=affine),
    )
    return (*(_or_empty(grad, x) for grad in grads), gradient, affine)


def _backward_fake(
    dy, x, weight, bias, mean, invstd, mask, act, training, needs, backend, record_gradient=False, record_affine=False
):
    rows = layout(x).rows
    need_x, need_weight, need_bias, need_residual = needs
    return (
        empty_like(x, rows) if need_x else x.new_empty(0),
        torch.empty_like(weight) if need_weight else x.new_empty(0),
        torch.empty_like(bias) if need_bias else x.new_empty(0),
        empty_like(x, rows) if need_residual else x.new_empty(0),
        _record(x, records.GRADIENT, record_gradient),
        _record(x, records.AFFINE, record_affine),
    )


def _setup_context(ctx, inputs, output):
    x, weight, bias, residual, _, _, _, ctx.training, _, _, ctx.act, save_mask, ctx.backend, _, gradient, affine = (
        inputs
    )
    _, mean, invstd, mask, *others = output
    ctx.lacks_mask = ctx.act is not None and residual is not None and not save_mask
    ctx.save_for_backward(x, weight, bias, mean, invstd, mask)
    ctx.places = gradient, affine  # to be written: saved tensors may not change
    ctx.mark_non_differentiable(mean, invstd, mask, *others)


def _autograd(ctx, dy, *_):
    if ctx.lacks_mask:
        raise RuntimeError(
            "batch_norm: this graph was recorded where no gradient was needed and keeps no ReLU mask for the backward; "
            "record it with an input or parameter that requires a gradient"
        )
    x, weight, bias, mean, invstd, mask = ctx.saved_tensors
    needs = ctx.needs_input_grad[:4]
    there = needs[0], mean.numel() > 0  # what there is to record
    flags = [record is not None and wanted for record, wanted in zip(ctx.places, there, strict=True)]
    *grads, gradient, affine = torch.ops.bnkern.batch_norm_backward(
        dy, x, weight, bias, mean, invstd, mask, ctx.act, ctx.training, needs, ctx.backend, *flags
    )
    copy_records(ctx.places, (gradient, affine), flags)
    return (*(grad if need else None for grad, need in zip(grads, needs, strict=True)), *[None] * 12)


def eval_in_torch(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    eps: float,
    act: str | None,
) -> Tensor:
    """``act(batch_norm(x) + residual)`` in eval mode by torch's operators, rounded once as the kernels round."""
    y = x if residual is None and running_mean is None else x.to(accumulator(x.dtype))
    if running_mean is not None:
        vectors = (None if v is None else v.to(y.dtype) for v in (running_mean, running_var, weight, bias))
        y = F.batch_norm(y, *vectors, False, 0.0, eps)
    if residual is not None:
        y = y + residual.to(y.dtype)
    y = y.to(x.dtype)
    return y.relu() if act == "relu" else y


@register_decomposition(torch.ops.bnkern.batch_norm_forward.default)
def _decomposition(
    x,
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
    save_mask,
    backend,
    record=False,
    record_gradient=None,
    record_affine=None,
):
    if training or record:
        return NotImplemented  # the op stays: exporters are for inference
    acc, empty = accumulator(x.dtype), x.new_empty(0)
    y = eval_in_torch(x, weight, bias, residual, running_mean, running_var, eps, act)
    mean = invstd = x.new_empty(0, dtype=acc)
    if running_mean is not None:
        mean, invstd = running_mean.to(acc, copy=True), torch.rsqrt(running_var.to(acc) + eps)
    saved = save_mask and act is not None and residual is not None
    mask = pack_mask(~(y <= 0), layout(x)) if saved else x.new_empty(0, dtype=torch.uint8)
    return y, mean, invstd, mask, empty, empty.clone(), empty.clone(), _record(x, records.ACTIVATION, False)


# FakeTensorMode takes a decomposition in place of the fake kernel where sizes are symbolic, unless the op stands in the
# table of meta kernels too.
register_decomposition(torch.ops.bnkern.batch_norm_forward.default, type="meta")(_forward_fake)

for _name, _implementation, _fake in (
    ("batch_norm_forward", _forward, _forward_fake),
    ("batch_norm_backward", _backward, _backward_fake),
):
    _library.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"bnkern::{_name}", _fake, lib=_library)
torch.library.register_autograd("bnkern::batch_norm_forward", _autograd, setup_context=_setup_context, lib=_library)
