"""The operator that torch.compile, export, fake tensors and modes record: one functional forward and its backward.

The operator writes nothing in place. It returns the new running statistics and the caller copies them back, so
functionalisation has nothing to undo. Absent results are tensors without elements, because an operator cannot return
None.

The arguments are the fields of :class:`ForwardCall` without ``record``, and those of :class:`Extra`. With a group, the
statistics and the sums of the backward are those of all its ranks (:mod:`bnkern.norm.ranks`).

``torch._decomp`` has a decomposition of the forward in eval mode into torch's operators. torch.onnx.export uses it, and
``ExportedProgram.run_decompositions(torch._decomp.get_decompositions([op]))`` applies it on request. torch.compile and
torch.export keep the operator. torch.jit.trace records torch's operators in eval mode and the operator in training.
torch.fx.symbolic_trace records the call.
"""

import os
import sys
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._decomp import register_decomposition

from .. import backends
from ..backends.activations import ACTIVATIONS
from ..backends.calls import BackwardCall, ForwardCall
from ..backends.layout import empty_like, layout
from ..backends.records import ACTIVATION, AFFINE, GRADIENT, SAMPLES, Records
from ..backends.reference import accumulator, pack_mask
from . import context, ranks


class Extra(NamedTuple):
    """The arguments of the forward operator that follow those of the call."""

    backend: str  # the forced backend's name, or "" for the table's choice; also for the backward
    group: str = ""  # the name of the process group with joint statistics, or "" for this process alone
    ranks: int = 1
    record: bool = False  # whether to return the record ACTIVATION
    record_gradient: Tensor | None = None  # the buffers of the records of the backward
    record_affine: Tensor | None = None
    record_samples: Tensor | None = None


class BackwardExtra(NamedTuple):
    """The arguments of the backward operator that follow those of the call."""

    backend: str
    group: str = ""
    # The number of values per channel on all ranks, int64. None without a group.
    count: Tensor | None = None  # type: ignore[assignment]  # hides tuple.count
    record_gradient: bool = False
    record_affine: bool = False
    record_samples: bool = False


_FORWARD = tuple(name for name in ForwardCall._fields if name != "record")
_BACKWARD = tuple(name for name in BackwardCall._fields if not name.startswith("record_"))
_RUNNING = ("running_mean", "running_var", "num_batches_tracked", "num_batches_skipped")  # updated in training


# ---------------------------------------------------------------------------------------------------- the schema

_SCHEMA_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    bool: "bool",
    int: "int",
    float: "float",
    float | None: "float?",
    str: "str",
    str | None: "str?",
    tuple[bool, bool, bool, bool]: "bool[]",
}
_SCHEMA_VALUES = {"": '""', None: "None", False: "False", 1: "1"}


def _arguments(
    call: type[ForwardCall] | type[BackwardCall], fields: tuple[str, ...], extra: type[Extra] | type[BackwardExtra]
) -> str:
    """The schema of the arguments of an operator. Only the arguments of ``extra`` have defaults."""
    arguments = [f"{_SCHEMA_TYPES[call.__annotations__[name]]} {name}" for name in fields]
    for name, kind in extra.__annotations__.items():
        default = f"={_SCHEMA_VALUES[extra._field_defaults[name]]}" if name in extra._field_defaults else ""
        arguments.append(f"{_SCHEMA_TYPES[kind]} {name}{default}")
    return ", ".join(arguments)


_library = torch.library.Library("bnkern", "DEF")
_library.define(
    f"batch_norm_forward({_arguments(ForwardCall, _FORWARD, Extra)})"
    " -> (Tensor y, Tensor mean, Tensor invstd, Tensor mask, Tensor new_running_mean, Tensor new_running_var,"
    " Tensor new_num_batches_tracked, Tensor new_num_batches_skipped, Tensor count, Tensor activation)"
)
_library.define(
    f"batch_norm_backward({_arguments(BackwardCall, _BACKWARD, BackwardExtra)})"
    " -> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dresidual, Tensor gradient, Tensor affine, Tensor samples)"
)


def batch_norm(call: ForwardCall, records: Records | None, group: tuple[str, int] = ("", 1)) -> Tensor:
    """y of a valid call through the operator. Then copies the new running statistics and records to their buffers."""
    if records is not None and records.mirrors and torch.compiler.is_compiling():
        raise RuntimeError("torch.compile does not support several recordings of one layer at once; eager calls do")
    needs_backward = context.grad_needed(call.x, call.weight, call.bias, call.residual) or context.is_recorded()
    save_mask = call.act is not None and call.residual is not None and needs_backward
    buffers = (None,) * 4 if records is None else records[:4]
    y, _, _, _, *new, _, activation = torch.ops.bnkern.batch_norm_forward(
        *operands(call._replace(save_mask=save_mask)), backends.forced(), *group, buffers[0] is not None, *buffers[1:]
    )
    if call.training:
        for name, value in zip(_RUNNING, new, strict=True):
            buffer = getattr(call, name)
            if buffer is not None:
                buffer.copy_(value)
    if buffers[0] is not None:
        buffers[0].copy_(activation)
    if records is not None and records.mirrors:
        records.forward_written()
        if y.grad_fn is not None:
            y.grad_fn.register_hook(lambda *_: records.backward_written())
    return y


# ------------------------------------------------------------------------------------------------- the forward


def _split(arguments: tuple) -> tuple[ForwardCall, Extra]:
    fields = dict(zip(_FORWARD, arguments, strict=False))
    return ForwardCall(**fields), Extra(*arguments[len(_FORWARD) :])


def operands(call: ForwardCall) -> list:
    """The arguments of the forward operator for a call, without those of :class:`Extra`."""
    return [getattr(call, name) for name in _FORWARD]


def _split_backward(arguments: tuple) -> tuple[BackwardCall, BackwardExtra]:
    fields = dict(zip(_BACKWARD, arguments, strict=False))
    return BackwardCall(**fields), BackwardExtra(*arguments[len(_BACKWARD) :])


def _or_empty(t: Tensor | None, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return x.new_empty(0, dtype=dtype) if t is None else t


def _or_none(t: Tensor) -> Tensor | None:
    return t if t.numel() else None


def _record(x: Tensor, rows: tuple[str, ...], requested: bool) -> Tensor:
    """A buffer for the record [rows, C] of a kernel. It has no elements if the record is not requested."""
    return x.new_empty((len(rows), x.shape[1]) if requested else 0, dtype=torch.float64)


def _forward(*arguments):
    call, extra = _split(arguments)
    x, running = call.x, {name: getattr(call, name) for name in _RUNNING}
    if call.training:
        running = {name: None if t is None else t.clone() for name, t in running.items()}
    activation = _record(x, ACTIVATION, extra.record)
    call = call._replace(**running, record=activation if extra.record else None)
    kernels = backends.choose(extra.backend, x.device, x.dtype)
    mean: Tensor | None
    invstd: Tensor | None
    count: Tensor | None = None
    if extra.group:
        y, mean, invstd, mask, count = ranks.forward(kernels, call, extra.group, extra.ranks)
    else:
        y, mean, invstd, mask = kernels.forward(call)
    if not call.training:
        running = dict.fromkeys(_RUNNING)
    acc = accumulator(x.dtype)
    statistics = (_or_empty(mean, x, acc), _or_empty(invstd, x, acc), _or_empty(mask, x, torch.uint8))
    return (y, *statistics, *(_or_empty(t, x) for t in running.values()), _or_empty(count, x, torch.int64), activation)


def _forward_fake(*arguments):
    _allow_in_inductor()
    call, extra = _split(arguments)
    x, like = call.x, layout(call.x)
    statistic = [x.new_empty(like.c if call.normalizes else 0, dtype=accumulator(x.dtype)) for _ in range(2)]
    mask = x.new_empty(like.mask_shape if call.has_mask else 0, dtype=torch.uint8)
    buffers = [getattr(call, name) for name in _RUNNING]
    running = [torch.empty_like(t) if call.training and t is not None else x.new_empty(0) for t in buffers]
    count = x.new_empty(() if extra.group else 0, dtype=torch.int64)
    return (empty_like(x, like.rows), *statistic, mask, *running, count, _record(x, ACTIVATION, extra.record))


def _allow_in_inductor() -> None:
    """Registers the operator with Inductor as one to be called, although it also has a decomposition.

    Inductor does this itself, unless the environment variable CI is set, as on GitHub's runners. It then raises an
    error for an operator that has a decomposition. The import of Inductor's module takes a second, so the operator is
    registered when a graph is traced. Inductor has imported the module by then.
    """
    lowering = sys.modules.get("torch._inductor.lowering") if os.environ.get("CI") else None
    op = torch.ops.bnkern.batch_norm_forward.default
    if lowering is not None and op not in lowering.lowerings:
        tag = torch._library.utils.get_layout_constraint_tag(op, with_default=True)
        lowering.make_fallback(op, layout_constraint=lowering.tag_to_layout_constraint(tag), warn=False)


# ------------------------------------------------------------------------------------------------ the backward


def _backward(*arguments):
    call, extra = _split_backward(arguments)
    x = call.x
    records = _backward_records(x, extra)
    gradient, affine, samples = (t if flag else None for t, flag in zip(records, extra[-3:], strict=True))
    need_x, need_weight, need_bias, need_residual = call.needs  # an operator receives a list
    needs = (need_x, need_weight, need_bias, need_residual)
    call = call._replace(needs=needs, record_gradient=gradient, record_affine=affine, record_samples=samples)
    kernels = backends.choose(extra.backend, x.device, x.dtype)
    if extra.group:
        assert extra.count is not None, "the backward with a group requires the count that the forward returned"
        grads = ranks.backward(kernels, call, extra.group, extra.count)
    else:
        grads = kernels.backward(call)
    return (*(_or_empty(grad, x) for grad in grads), *records)


def _backward_records(x: Tensor, extra: BackwardExtra) -> tuple[Tensor, ...]:
    """The buffers of the records, in the order of the last fields of ``extra``."""
    rows = (GRADIENT, AFFINE, SAMPLES)
    return tuple(_record(x, names, flag) for names, flag in zip(rows, extra[-3:], strict=True))


def _backward_fake(*arguments):
    call, extra = _split_backward(arguments)
    x, rows = call.x, layout(call.x).rows
    need_x, need_weight, need_bias, need_residual = call.needs
    return (
        empty_like(x, rows) if need_x else x.new_empty(0),
        torch.empty_like(call.weight) if need_weight and call.weight is not None else x.new_empty(0),
        torch.empty_like(call.bias) if need_bias and call.bias is not None else x.new_empty(0),
        empty_like(x, rows) if need_residual else x.new_empty(0),
        *_backward_records(x, extra),
    )


# -------------------------------------------------------------------------------------------------- autograd


def _setup_context(ctx, inputs, output):
    call, ctx.extra = _split(inputs)
    _, mean, invstd, mask, *_, count, _ = output
    ctx.act, ctx.training = call.act, call.training
    ctx.lacks_mask = call.act is not None and call.residual is not None and not call.save_mask
    ctx.save_for_backward(call.x, call.weight, call.bias, call.sample_weight, mean, invstd, mask, count)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # only y has a gradient, so no zeros for the others


def _autograd(ctx, dy, *_):
    if ctx.lacks_mask:
        raise RuntimeError(
            "batch_norm: this graph was recorded where no gradient was needed and keeps no activation mask for the "
            "backward; record the graph with an input or parameter that requires a gradient"
        )
    x, weight, bias, sample_weight, *saved = ctx.saved_tensors
    mean, invstd, mask, count = map(_or_none, saved)
    needs, extra = ctx.needs_input_grad[:4], ctx.extra
    buffers = extra[-3:]  # they are written, so they are not saved tensors
    possible = (needs[0], mean is not None, mean is not None)
    flags = [buffer is not None and need for buffer, need in zip(buffers, possible, strict=True)]
    *grads, gradient, affine, samples = torch.ops.bnkern.batch_norm_backward(
        *(dy, x, weight, bias, mean, invstd, mask, ctx.act, ctx.training, needs, sample_weight),
        *(extra.backend, extra.group, count, *flags),
    )
    for buffer, record, flag in zip(buffers, (gradient, affine, samples), flags, strict=True):
        if flag:
            buffer.copy_(record)
    others = [None] * (len(_FORWARD) + len(Extra._fields) - 4)
    return (*(grad if need else None for grad, need in zip(grads, needs, strict=True)), *others)


def _no_second_derivative(ctx, *_):
    raise RuntimeError(
        "batch_norm: double backward across ranks is not supported, nor is double backward through the operator that "
        "torch.compile and dispatch modes use; eager calls within one process support it"
    )


# ------------------------------------------------------------------------------------------- in torch's operators


def eval_in_torch(call: ForwardCall) -> Tensor:
    """y of a call in eval mode by torch's operators, rounded once, as in the kernels."""
    x, weight, bias, residual, running_mean, running_var, *_ = call
    y = x if residual is None and running_mean is None else x.to(accumulator(x.dtype))
    if running_mean is not None:
        mean, var, scale, shift = (
            None if v is None else v.to(y.dtype) for v in (running_mean, running_var, weight, bias)
        )
        y = F.batch_norm(y, mean, var, scale, shift, False, 0.0, call.eps)
    if residual is not None:
        y = y + residual.to(y.dtype)
    y = y.to(x.dtype)
    return y if call.act is None else ACTIVATIONS[call.act].value(y)


@register_decomposition(torch.ops.bnkern.batch_norm_forward.default)
def _decomposition(*arguments):
    call, extra = _split(arguments)
    if call.training or extra.record:
        return NotImplemented  # the operator is kept: exporters are for inference
    x, acc = call.x, accumulator(call.x.dtype)
    y = eval_in_torch(call)
    mean, invstd, empty = x.new_empty(0, dtype=acc), x.new_empty(0, dtype=acc), x.new_empty(0)
    if call.running_mean is not None and call.running_var is not None:
        mean, invstd = call.running_mean.to(acc, copy=True), torch.rsqrt(call.running_var.to(acc) + call.eps)
    mask = pack_mask(~(y <= 0), layout(x)) if call.has_mask else x.new_empty(0, dtype=torch.uint8)
    running = (empty, empty.clone(), empty.clone(), empty.clone())
    return y, mean, invstd, mask, *running, x.new_empty(0, dtype=torch.int64), _record(x, ACTIVATION, False)


# If sizes are symbolic, FakeTensorMode uses a decomposition instead of the fake kernel, unless the operator is also in
# the table of meta kernels.
register_decomposition(torch.ops.bnkern.batch_norm_forward.default, type="meta")(_forward_fake)

for _name, _implementation, _fake in (
    ("batch_norm_forward", _forward, _forward_fake),
    ("batch_norm_backward", _backward, _backward_fake),
):
    _library.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"bnkern::{_name}", _fake, lib=_library)
torch.library.register_autograd("bnkern::batch_norm_forward", _autograd, setup_context=_setup_context, lib=_library)
torch.library.register_autograd("bnkern::batch_norm_backward", _no_second_derivative, lib=_library)
