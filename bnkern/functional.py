"""Batch norm with fused ReLU and residual add: validation at the door and one autograd.Function, nothing else.

Nothing here knows a device: :mod:`bnkern.backends` chooses the kernels, :mod:`bnkern.ops` what torch.compile sees.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from . import backends, ensembles, ops
from .backends import reference
from .backends.layout import formats_conflict, layout, relaid

if TYPE_CHECKING:
    from .probes.buffer import Records


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

    Per channel c over the M = N * S values of the batch::

        mean = sum x / M,  var = sum (x - mean)^2 / M          (training; else the running statistics)
        y    = act(weight * (x - mean) / sqrt(var + eps) + bias + residual)
        running = (1 - momentum) * running + momentum * batch, the variance unbiased (M - 1)

    Arithmetic and statistics are float32 for float32, bfloat16 and float16 input, float64 for float64 input; the
    sum is rounded once, to the dtype of ``input``, before the activation.

    Args:
        input: [N, C, ...] of 2 to 5 or more dimensions; float32, bfloat16, float16 or float64. NCHW, channels_last,
            and views of them whose samples, channels or rows are strided are read in place; other strides are
            copied once to the dense form of their layout.
        running_mean, running_var: [C], updated in place in training; both or neither.
        weight, bias: [C] or None, each on its own.
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
        records: where the kernels write what they see, in the same pass (:mod:`bnkern.probes` gives it); the results
            keep their bits.

    Vectors of size C have the dtype of ``input``, or float32 for bfloat16 and float16 input.

    Returns:
        y, of the shape, dtype and memory format of ``input``. Differentiable in input, weight, bias and residual,
        each gradient in the memory format of its tensor (under torch.compile the format of the residual's gradient is
        the compiler's choice until autograd accumulates it into a leaf, as for torch's own addition);
        a second time, and in forward mode (torch.func.jvp, dual tensors), through the reference formula. torch.func's
        vmap and grad run the kernels, an ensemble's members folded into the channels (:mod:`bnkern.ensembles`),
        unless running statistics are to be updated: then the reference formula serves. Saved for backward: input,
        weight, bias, two vectors, and with residual and ReLU one bit per element.

    Raises:
        TypeError, ValueError: an argument is not as above; names it. Nothing was written by then.
        RuntimeError: a forced backend cannot serve the call; says why.

    Source: Ioffe and Szegedy, "Batch Normalization", 2015.
    """
    tensors = (input, weight, bias, residual)
    settings = (running_mean, running_var, num_batches_tracked, training, momentum, eps, act)
    if ops.nobody_looks() and (backends.native_usual() or _usual)(*tensors, *settings):
        return _eager(tensors, settings, records, _apply)
    node = ops.fx_node(
        batch_norm,
        input,
        (running_mean, running_var, weight, bias, training, momentum, eps),
        {"residual": residual, "act": act, "num_batches_tracked": num_batches_tracked},
    )
    if node is not None:
        return node
    if torch.jit.is_tracing() and not training:  # a trace in training records bnkern's op
        return ops.eval_in_torch(*tensors, running_mean, running_var, eps, act)
    _check("batch_norm", input, residual, act)
    _check_statistics(input, running_mean, running_var, weight, bias, training, momentum, eps, num_batches_tracked)
    return _call((input, weight, bias, in_format_of(input, residual)), settings, records)


def add_act(
    x: Tensor, residual: Tensor | None = None, act: str | None = "relu", *, records: "Records | None" = None
) -> Tensor:
    """``act(x + residual)`` by the kernels of :func:`batch_norm` without normalisation.

    x and residual are as ``input`` and ``residual`` there, and so is ``records``; the sum is rounded once, before the
    activation. A residual in another memory format than x is copied once, as there. Differentiable in both. Raises
    TypeError or ValueError naming the argument that is wrong.
    """
    node = ops.fx_node(add_act, x, (residual, act), {})
    if node is not None:
        return node
    tensors, settings = (x, None, None, residual), (None, None, None, False, None, 0.0, act)
    if torch.jit.is_tracing():
        return ops.eval_in_torch(*tensors, None, None, 0.0, act)
    _check("add_act", x, residual, act)
    return _call((x, None, None, in_format_of(x, residual)), settings, records)


class Moments(NamedTuple):
    """Per-channel moments: ``count`` values each, ``mean`` [C] and biased ``var`` [C]."""

    count: int
    mean: Tensor
    var: Tensor


def channel_moments(x: Tensor) -> Moments:
    """Mean and biased variance of each channel of x [N, C, ...] over all other axes, in one pass over memory.

    mean = sum x / M and var = sum (x - mean)^2 / M, float32 (float64 for float64 input), by sums of distances
    from a value near the mean, merged with Chan's formula. Not differentiable: the results carry no graph. Raises
    TypeError or ValueError, and RuntimeError under torch.jit.trace, which would record the results as constants.
    """
    _check("channel_moments", x, None, None)
    if torch.jit.is_tracing():
        raise RuntimeError("channel_moments: torch.jit.trace cannot record this call, only its results as constants")
    x = x.detach()
    count, mean, m2 = _backend(x).moments(x)
    return Moments(count, mean, m2 / count)


def explain(input: Tensor, *args: object, **kwargs: object) -> str:
    """Which backend serves ``batch_norm(input, ...)`` here, and why not the others, as a table.

    The device type and dtype of input decide. ``residual`` and ``act`` are checked where they are given by name; other
    arguments are ignored. Raises TypeError or ValueError as :func:`batch_norm` does.
    """
    _check("explain", input, kwargs.get("residual"), kwargs.get("act"))
    return backends.explain(input.device, input.dtype)


# --------------------------------------------------------------------------------------------------- the call


def _backend(x: Tensor):
    return backends.choose(backends.forced(), x.device, x.dtype)


def _grad_wanted(tensors: tuple[Tensor | None, ...]) -> bool:
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False


# Of a call: x, weight, bias, residual; and running_mean, running_var, num_batches_tracked, training, momentum, eps,
# act.
_Tensors = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]
_Settings = tuple[Tensor | None, Tensor | None, Tensor | None, bool, float | None, float, str | None]


def _call(tensors: _Tensors, settings: _Settings, records: "Records | None") -> Tensor:
    """The three ways in: the launcher, plain torch for torch.func, and the op for all who must see the call."""
    x, _, _, residual = tensors
    *statistics, training, _, _, act = settings
    if ops.transformed():
        running_mean, running_var, _ = statistics
        if ensembles.serves(running_mean, training):
            return ensembles.batch_norm(*tensors, running_mean, running_var, settings[5], act, backends.forced())
        # Forward mode, and running statistics under torch.func: the reference formula, as for double backward.
        if training and running_mean is not None and ops.over_members(x) and not ops.over_members(running_mean):
            raise RuntimeError(
                "batch_norm: vmap maps over input but not over running_mean and running_var, which cannot take every "
                "member's update; make the module with track_running_stats=False, or call it in eval mode"
            )
        return reference.forward(*tensors, *settings, False)[0]
    if ops.direct(*tensors, *statistics):
        return _eager(tensors, settings, records)
    if records is not None and records.mirrors:
        raise RuntimeError("several recordings of one layer at once are for eager calls, not for torch.compile")
    save_mask = act is not None and residual is not None and (_grad_wanted(tensors) or ops.recorded())
    wanted = (None, None, None) if records is None else records[:3]
    y, _, _, _, *new, activation = torch.ops.bnkern.batch_norm_forward(
        *tensors, *settings, save_mask, backends.forced(), wanted[0] is not None, *wanted[1:]
    )
    if training:
        for buffer, value in zip(statistics, new, strict=True):
            if buffer is not None:
                buffer.copy_(value)
    if wanted[0] is not None:
        wanted[0].copy_(activation)
    return y


def _eager(tensors: _Tensors, settings: _Settings, records: "Records | None", apply: Callable | None = None) -> Tensor:
    backend = _backend(tensors[0])
    if _grad_wanted(tensors):
        y = (apply or _BatchNorm.apply)(*tensors, settings, backend, records)
    elif records is None:
        y = backend.forward(*tensors, *settings, False)[0]
    else:
        y = backend.forward(*tensors, *settings, False, record=records.activation)[0]
        records.forward_written()
    if settings[3]:
        # The kernels write through addresses; autograd's version counters must hear of it.
        torch.autograd.graph.increment_version([t for t in settings[:3] if t is not None])
    return y


class _BatchNorm(torch.autograd.Function):
    """The eager path: the backend's forward and backward, and for double backward the reference formula."""

    @staticmethod
    def forward(ctx, x, weight, bias, residual, settings, backend, records):
        _, _, _, training, _, eps, act = settings
        save_mask = act is not None and residual is not None
        if records is None:
            y, mean, invstd, mask = backend.forward(x, weight, bias, residual, *settings, save_mask)
        else:
            y, mean, invstd, mask = backend.forward(
                x, weight, bias, residual, *settings, save_mask, record=records.activation
            )
            records.forward_written()
        ctx.save_for_backward(x, weight, bias, mean, invstd, mask)
        ctx.call = act, training, eps, backend, records
        return y

    @staticmethod
    def backward(ctx, dy):
        saved = ctx.saved_tensors
        needs = ctx.needs_input_grad[:4]
        act, training, eps, backend, records = ctx.call
        if torch.is_grad_enabled() or ops.batched(dy):
            grads = reference.differentiable_backward(dy, *saved, act, training, eps, needs)
        elif records is None:
            grads = backend.backward(dy.resolve_neg(), *saved, act, training, needs)
        else:
            places = {"record_gradient": records.gradient, "record_affine": records.affine}
            grads = backend.backward(dy.resolve_neg(), *saved, act, training, needs, **places)
            records.backward_written()
        return (*grads, None, None, None)


# What Function.apply comes down to where no transform is at work and no tensor has outlived one, without the 2 µs that
# it takes to find that out.
_apply = super(torch.autograd.Function, _BatchNorm).apply


# --------------------------------------------------------------------------------- a residual in another format


def in_format_of(x: Tensor, residual: Tensor | None) -> Tensor | None:
    """The residual as the kernels read it: itself, or its one copy where its memory format is not that of ``x``."""
    if residual is None or residual.stride() == x.stride() or not formats_conflict(x, residual):
        return residual
    rows = layout(x).rows
    if torch.compiler.is_compiling():  # torch.compile traces no Function that has a forward mode
        return relaid(residual, rows)
    return _Relaid.apply(residual, rows)


class _Relaid(torch.autograd.Function):
    """A copy in the given layout of a tensor that has the other one. Its gradient is copied back to that other one."""

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


# ------------------------------------------------------------------------------------------- checks at the door


def _usual(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    act: str | None,
) -> bool:
    """Whether this is plainly a valid call on plain tensors: the checks below in brief, for the path of every step.

    The kernels leave the caches cold, so every line here costs several times what it does in a loop of its own.
    """
    if not ops.plain(x) or x.layout is not torch.strided or x.dim() < 2:
        return False
    dtype, device, channels = x.dtype, x.device, x.shape[1]
    if dtype not in backends.DTYPES or device.type == "meta" or (training and x.numel() == channels):
        return False
    if (act is not None and act != "relu") or type(eps) is not float or type(momentum) is not float:
        return False
    if type(training) is not bool or not (eps > 0 or (eps == 0 and not training)):
        return False
    if (running_mean is None) != (running_var is None) or (running_mean is None and not training):
        return False
    for vector in (weight, bias, running_mean, running_var):
        if vector is not None and not (
            ops.plain(vector)
            and vector.shape == (channels,)
            and (vector.dtype is dtype or (vector.dtype is torch.float32 and dtype is not torch.float64))
            and vector.device == device
            and vector.layout is torch.strided
            and vector.is_contiguous()
        ):
            return False
    if num_batches_tracked is not None and not (
        ops.plain(num_batches_tracked)
        and num_batches_tracked.dtype is torch.int64
        and num_batches_tracked.numel() == 1
        and num_batches_tracked.device == device
    ):
        return False
    return residual is None or (
        ops.plain(residual)
        and residual.layout is torch.strided
        and residual.shape == x.shape
        and residual.dtype is dtype
        and residual.device == device
        and residual.stride() == x.stride()
    )


def _check(name: str, x: Tensor, residual: Tensor | None, act: str | None) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: input must be a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in backends.DTYPES:
        raise TypeError(f"{name}: input must be float32, bfloat16, float16 or float64, got {x.dtype}")
    if x.layout is not torch.strided:
        raise TypeError(f"{name}: input must be a strided (dense) tensor, got {x.layout}")
    if x.dim() < 2:
        raise ValueError(f"{name}: input must be [N, C, ...] with at least 2 dimensions, got shape {list(x.shape)}")
    if act is not None and act != "relu":
        raise ValueError(f'{name}: act must be None or "relu", got {act!r}')
    if residual is None:
        return
    if not isinstance(residual, Tensor):
        raise TypeError(f"{name}: residual must be a torch.Tensor or None, got {type(residual).__name__}")
    if residual.layout is not torch.strided:
        raise TypeError(f"{name}: residual must be a strided (dense) tensor, got {residual.layout}")
    if residual.shape != x.shape:
        raise ValueError(
            f"{name}: residual must have the shape of input, {list(x.shape)}, got {list(residual.shape)}; "
            "it is not broadcast"
        )
    if residual.dtype != x.dtype:
        raise TypeError(f"{name}: residual must have the dtype of input, {x.dtype}, got {residual.dtype}")
    if residual.device != x.device:
        raise ValueError(f"{name}: residual must be on the device of input, {x.device}, got {residual.device}")


def _check_statistics(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    num_batches_tracked: Tensor | None,
    others: bool = False,
) -> None:
    """``others``: ranks of a distributed run add their values, so that a single one here may do."""
    if not isinstance(training, bool):
        raise TypeError(f"batch_norm: training must be True or False, got {training!r}")
    if (running_mean is None) != (running_var is None):
        missing, given = ("running_mean", "running_var") if running_mean is None else ("running_var", "running_mean")
        raise ValueError(f"batch_norm: {missing} must be given too, since {given} is; both or neither")
    if not training and running_mean is None:
        raise ValueError("batch_norm: running_mean and running_var must be given when training=False")
    if not isinstance(eps, (float, int)) or isinstance(eps, bool):
        raise TypeError(f"batch_norm: eps must be a number, got {type(eps).__name__}")
    if training and not eps > 0:
        raise ValueError(f"batch_norm: eps must be positive during training, got {eps}")
    if not eps >= 0:
        raise ValueError(f"batch_norm: eps must not be negative, got {eps}")
    if momentum is not None and (not isinstance(momentum, (float, int)) or isinstance(momentum, bool)):
        raise TypeError(f"batch_norm: momentum must be a number or None, got {type(momentum).__name__}")
    for name, vector in (
        ("running_mean", running_mean),
        ("running_var", running_var),
        ("weight", weight),
        ("bias", bias),
    ):
        if vector is not None:
            _check_vector(name, vector, x)
    for name, vector in (("running_mean", running_mean), ("running_var", running_var)):
        if vector is not None and not vector.is_contiguous():
            raise ValueError(f"batch_norm: {name} must be contiguous, since it is updated in place")
    if num_batches_tracked is not None:
        counter = num_batches_tracked
        if not isinstance(counter, Tensor) or counter.dtype is not torch.int64 or counter.numel() != 1:
            raise TypeError("batch_norm: num_batches_tracked must be an int64 tensor of one element or None")
        if counter.device != x.device:
            raise ValueError(
                f"batch_norm: num_batches_tracked must be on the device of input, {x.device}, got {counter.device}"
            )
    elif training and momentum is None and running_mean is not None:
        raise ValueError("batch_norm: num_batches_tracked must be given when momentum is None (cumulative mean)")
    if training and not others and x.shape[0] * x.shape[2:].numel() == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {list(x.shape)}")


def _check_vector(name: str, vector: Tensor, x: Tensor) -> None:
    if not isinstance(vector, Tensor):
        raise TypeError(f"batch_norm: {name} must be a torch.Tensor or None, got {type(vector).__name__}")
    if vector.layout is not torch.strided:
        raise TypeError(f"batch_norm: {name} must be a strided (dense) tensor, got {vector.layout}")
    if vector.dim() != 1 or vector.shape[0] != x.shape[1]:
        raise ValueError(
            f"batch_norm: {name} must have one element per channel of input, shape [{x.shape[1]}], "
            f"got {list(vector.shape)}"
        )
    if vector.device != x.device:
        raise ValueError(f"batch_norm: {name} must be on the device of input, {x.device}, got {vector.device}")
    if vector.dtype != x.dtype and (vector.dtype is not torch.float32 or x.dtype is torch.float64):
        expected = f"{x.dtype}" if x.dtype in (torch.float32, torch.float64) else f"torch.float32 or {x.dtype}"
        raise TypeError(f"batch_norm: {name} must be {expected} for {x.dtype} input, got {vector.dtype}")
