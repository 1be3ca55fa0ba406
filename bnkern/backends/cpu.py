"""The C++ CPU kernels (csrc/cpu): launchers over the native module.

They read planes with unit stride within a plane, and rows that are dense or have a multiple of 16 channels;
anything else is copied once to the dense form of its layout. Signatures and formulas are those of ``reference``.
Phases take an optional ``out`` to write into, which must be addressable like the input.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

# torch comes first: it brings the OpenMP runtime that the native module then shares.
from .. import _native
from .arguments import ABSENT, CODES, address, contiguous, vector
from .cpu_convolutions import conv3x3, conv_grad_signs
from .layout import Layout, dense, layout, output_strides, strides
from .records import activation_of_nothing
from .reference import accumulator, merge

__all__ = [
    "augment",
    "backward",
    "conv3x3",
    "conv_grad_signs",
    "forward",
    "grad_input",
    "grad_sums",
    "merge",
    "moments",
    "normalize",
    "refuses",
]

_BYTE = 4  # the code of uint8

# Where torch offers DLPack's exchange table, the native module reads and makes tensors by itself: forward and backward
# of plain dense tensors are then one native call each (csrc/call.cpp), and the Python below serves the others.
_reads_tensors = _native.exchange(
    getattr(torch.Tensor, "__dlpack_c_exchange_api__", None), (Tensor, torch.nn.Parameter), Tensor.is_neg
)
# Whether arguments of batch_norm are plainly valid, on any device: functional._usual in C++, or None.
usual = _native.usual if _reads_tensors else None


def refuses(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this backend cannot serve such an input, or None."""
    return None if device.type == "cpu" else f"its kernels run on the CPU, the input is on {device}"


class _Plan(NamedTuple):
    """What a call needs to know of its input's sizes and strides, worked out once for each."""

    like: Layout
    stride: tuple[int, ...]
    source: tuple[int, int] | None  # (outer, inner) strides of the input, None where it must be copied
    result_stride: tuple[int, ...]
    result: tuple[int, int]


@functools.lru_cache(maxsize=4096)
def _plan(shape: torch.Size, stride: tuple[int, ...]) -> _Plan:
    x = torch.empty_strided(shape, stride, device="meta")
    like = layout(x)
    result_stride = output_strides(x, like.rows)
    result = strides(torch.empty_strided(shape, result_stride, device="meta"), like.rows)
    return _Plan(like, stride, _source(x, like.rows), result_stride, result)


def _source(t: Tensor, rows: bool) -> tuple[int, int] | None:
    """The strides by which the kernels can read ``t``, or None."""
    source = strides(t, rows)
    if rows and t.shape[1] % 16 and source is not None and source[0] != t.shape[1]:
        return None
    return source


def _readable(t: Tensor, plan: _Plan) -> tuple[Tensor, int, int, int]:
    """``t``, or its dense copy where the kernels cannot address it, to be kept alive; its address and strides."""
    source = plan.source if t.stride() == plan.stride else _source(t, plan.like.rows)
    if source is None:
        t = dense(t, plan.like.rows).copy_(t)
        source = strides(t, plan.like.rows)
    return t, t.data_ptr(), *source


def _empty(x: Tensor, plan: _Plan) -> Tensor:
    """A result for x, a large one in memory that earlier results gave back: fresh pages cost more than the kernel."""
    return torch.from_dlpack(_native.cpu_empty(CODES[x.dtype], x.shape, plan.result_stride))


def _empty_mask(like: Layout) -> Tensor:
    shape = like.mask_shape
    steps = (1,) if like.rows else (shape[1] * shape[2], shape[2], 1)
    return torch.from_dlpack(_native.cpu_empty(_BYTE, shape, steps))


def release_memory() -> None:
    """Return to the system the memory kept of freed results (at most BNKERN_POOL_MB, default an eighth of it)."""
    _native.pool_clear()


def _result(t: Tensor | None, plan: _Plan) -> tuple[int, int, int]:
    if t is None:
        return ABSENT
    return (t.data_ptr(), *(plan.result if t.stride() == plan.result_stride else strides(t, plan.like.rows)))


def _run_forward(
    x: Tensor,
    plan: _Plan,
    moments: bool,
    normalize: bool,
    mean: Tensor | None,
    spread: Tensor | None,
    y: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    act: str | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    counter: Tensor | None = None,
    momentum: float | None = 0.0,
    eps: float = 0.0,
    record: Tensor | None = None,
) -> None:
    x, *source = _readable(x, plan)
    residual, *added = (None, *ABSENT) if residual is None else _readable(residual, plan)
    weight, bias = contiguous(weight), contiguous(bias)
    _native.cpu_forward(
        CODES[x.dtype],
        *plan.like,
        moments,
        normalize,
        act is not None,
        *source,
        *added,
        *_result(y, plan),
        address(mask),
        *vector(weight),
        *vector(bias),
        address(mean),
        address(spread),
        *vector(running_mean),
        *vector(running_var),
        address(counter),
        momentum is None,
        momentum or 0.0,
        eps,
        address(record),
        torch.get_num_threads(),
    )


def moments(x: Tensor) -> tuple[int, Tensor, Tensor]:
    """Count, mean [C] and M2 [C] of x."""
    plan = _plan(x.shape, x.stride())
    mean, m2 = torch.zeros((2, plan.like.c), dtype=accumulator(x.dtype)).unbind()
    if x.numel():
        _run_forward(x, plan, True, False, mean, m2)
    return plan.like.count, mean, m2


def normalize(
    x: Tensor,
    mean: Tensor | None,
    invstd: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    act: str | None,
    *,
    out: tuple[Tensor, Tensor | None] | None = None,
    record: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """y and, with residual and ReLU, its mask. ``out`` gives both to write into.

    ``record``, a contiguous float64 [8, C], is filled in the same pass over memory with the rows ``ACTIVATION``.
    """
    plan = _plan(x.shape, x.stride())
    if out is not None:
        y, mask = out
    else:
        y, mask = _empty(x, plan), _empty_mask(plan.like) if act and residual is not None else None
    if x.numel():
        _run_forward(x, plan, False, True, mean, invstd, y, weight, bias, residual, mask, act, record=record)
    elif record is not None:
        activation_of_nothing(record)
    return y, mask


def forward(
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
    save_mask: bool,
    *,
    out: Tensor | None = None,
    record: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """moments and normalize as one call: y, mean, invstd, mask. Running statistics and counter change in place.

    ``record``, a contiguous float64 [8, C], is filled in the same pass over memory with the rows ``ACTIVATION``.
    """
    if _reads_tensors and out is None:
        vectors = (weight, bias, residual, running_mean, running_var, num_batches_tracked)
        results = _native.forward(x, *vectors, training, momentum, eps, act, save_mask, record, torch.get_num_threads())
        if results is not None:
            return results
    plan = _plan(x.shape, x.stride())
    y = _empty(x, plan) if out is None else out
    mask = _empty_mask(plan.like) if save_mask and act and residual is not None else None
    mean = invstd = None
    if training or running_mean is not None:
        acc = accumulator(x.dtype)
        mean, invstd = torch.empty(plan.like.c, dtype=acc), torch.empty(plan.like.c, dtype=acc)
    if x.numel():
        running = (running_mean, running_var, num_batches_tracked, momentum, eps)
        _run_forward(x, plan, training, True, mean, invstd, y, weight, bias, residual, mask, act, *running, record)
    else:
        if mean is not None:
            mean.zero_(), invstd.zero_()
            if training and num_batches_tracked is not None:
                num_batches_tracked += 1
        if record is not None:
            activation_of_nothing(record)
    return y, mean, invstd, mask


def _run_backward(
    dy: Tensor,
    x: Tensor,
    plan: _Plan,
    mean: Tensor | None,
    invstd: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    act: str | None,
    sums: bool,
    input: bool,
    training: bool,
    dx: Tensor | None = None,
    dresidual: Tensor | None = None,
    sum_dy: Tensor | None = None,
    sum_dy_xhat: Tensor | None = None,
    dweight: Tensor | None = None,
    dbias: Tensor | None = None,
    record_gradient: Tensor | None = None,
    record_affine: Tensor | None = None,
) -> None:
    dy, *incoming = _readable(dy, plan)
    x, *source = _readable(x, plan)
    weight, bias = contiguous(weight), contiguous(bias)
    _native.cpu_backward(
        CODES[x.dtype],
        *plan.like,
        sums,
        input,
        act is not None,
        training,
        *incoming,
        *source,
        *_result(dx, plan),
        *_result(dresidual, plan),
        address(mask),
        *vector(weight),
        *vector(bias),
        address(mean),
        address(invstd),
        address(sum_dy),
        address(sum_dy_xhat),
        *vector(dweight),
        *vector(dbias),
        address(record_gradient),
        address(record_affine),
        torch.get_num_threads(),
    )


def grad_sums(
    dy: Tensor,
    x: Tensor,
    mean: Tensor | None,
    invstd: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    act: str | None,
    *,
    record: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """sum g [C] and sum g * xhat [C]. ``record``, a contiguous float64 [8, C], is filled with the rows ``AFFINE``."""
    plan = _plan(x.shape, x.stride())
    sums = torch.zeros((2, plan.like.c), dtype=accumulator(x.dtype)).unbind()
    if x.numel():
        phase, results = (True, False, True), (None, None, *sums)
        _run_backward(dy, x, plan, mean, invstd, weight, bias, mask, act, *phase, *results, record_affine=record)
    elif record is not None:
        record.zero_()
    return sums


def grad_input(
    dy: Tensor,
    x: Tensor,
    mean: Tensor | None,
    invstd: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    act: str | None,
    sums: tuple[Tensor, Tensor, int] | None,
    need_dx: bool = True,
    need_dresidual: bool = True,
    *,
    out: tuple[Tensor | None, Tensor | None] | None = None,
    record: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """dx and the residual's gradient, where needed; ``sums`` is (sum g, sum g * xhat, M), or None in eval mode.

    ``out`` gives both to write into, and says which. ``record``, a contiguous float64 [7, C], is filled with the rows
    ``GRADIENT`` where dx is needed.
    """
    plan = _plan(x.shape, x.stride())
    wanted = (need_dx, need_dresidual)
    dx, dresidual = (_empty(x, plan) if want else None for want in wanted) if out is None else out
    sum_dy, sum_dy_xhat, count = (None, None, plan.like.count) if sums is None else sums
    if count != plan.like.count:  # other ranks' values are in the sums; the kernel divides by this tensor's own count
        scale = plan.like.count / count
        sum_dy, sum_dy_xhat = sum_dy * scale, sum_dy_xhat * scale
    if x.numel():
        phase, results = (False, True, sums is not None), (dx, dresidual, sum_dy, sum_dy_xhat)
        record = None if dx is None else record
        _run_backward(dy, x, plan, mean, invstd, weight, bias, mask, act, *phase, *results, record_gradient=record)
    elif record is not None and dx is not None:
        record.zero_()
    return dx, dresidual


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    invstd: Tensor | None,
    mask: Tensor | None,
    act: str | None,
    training: bool,
    needs: tuple[bool, bool, bool, bool],
    *,
    out: tuple[Tensor | None, Tensor | None] | None = None,
    record_gradient: Tensor | None = None,
    record_affine: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """grad_sums and grad_input as one call: (dx, dweight, dbias, dresidual), each where ``needs`` says so.

    Filled in the same passes over memory, contiguous and float64: ``record_gradient`` [7, C] with the rows
    ``GRADIENT`` where dx is needed, ``record_affine`` [8, C] with ``AFFINE`` unless the normalisation is the identity.
    """
    if _reads_tensors and out is None:
        saved = (x, weight, bias, mean, invstd, mask)
        records = (record_gradient, record_affine)
        grads = _native.backward(dy, *saved, act, training, needs, *records, torch.get_num_threads())
        if grads is not None:
            return grads
    need_x, need_weight, need_bias, need_residual = needs
    plan = _plan(x.shape, x.stride())
    if out is not None:
        dx, dresidual = out
    else:
        dx = _empty(x, plan) if need_x else None
        dresidual = _empty(x, plan) if need_residual else None
    dweight = torch.empty(plan.like.c, dtype=weight.dtype) if need_weight else None
    dbias = torch.empty(plan.like.c, dtype=bias.dtype) if need_bias else None
    if not need_x:
        record_gradient = None
    if mean is None:
        record_affine = None
    if x.numel():
        sums = need_weight or need_bias or (need_x and training) or record_affine is not None
        input = need_x or need_residual
        results = (dx, dresidual, None, None, dweight, dbias, record_gradient, record_affine)
        # Without dx nothing is to be centred, and without sums there is nothing to centre by.
        _run_backward(dy, x, plan, mean, invstd, weight, bias, mask, act, sums, input, training and need_x, *results)
    else:
        for sums in (dweight, dbias, record_gradient, record_affine):
            if sums is not None:
                sums.zero_()
    return dx, dweight, dbias, dresidual


def augment(
    images: Tensor,
    labels: Tensor,
    order: Tensor,
    state: Tensor,
    position: Tensor,
    table: Tensor,
    out: Tensor,
    labels_out: Tensor,
    size: int,
    first: int,
    random: bool,
) -> None:
    """One batch of an epoch into ``out`` and ``labels_out``. Raises IndexError where the order has no such batch."""
    batch = position.item()
    if not 0 <= batch < len(order) // size:
        raise IndexError(f"position must be 0 to {len(order) // size - 1}, got {batch}")
    seed, epoch = state.tolist()
    _native.cpu_augment(
        CODES[out.dtype],
        layout(out).rows,
        random,
        seed & 2**64 - 1,
        epoch,
        images.data_ptr(),
        labels.data_ptr(),
        order.data_ptr() + order.itemsize * (batch * size + first),
        len(out),
        table.data_ptr(),
        out.data_ptr(),
        labels_out.data_ptr(),
        torch.get_num_threads(),
    )
