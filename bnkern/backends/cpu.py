"""The C++ CPU kernels (csrc/cpu): launchers over the native module.

They read planes with unit stride within a plane, and rows that are dense or have a multiple of 16 channels;
anything else is copied once to the dense form of its layout. Signatures and formulas are those of ``reference``.
Phases take an optional ``out`` to write into, which must be addressable like the input.
"""

import math

import torch
from torch import Tensor

# torch comes first: it brings the OpenMP runtime that the native module then shares.
from .. import _native
from .layout import Layout, addressed, dense, empty_like, layout, output_strides, strides
from .reference import accumulator, merge

__all__ = ["backward", "forward", "grad_input", "grad_sums", "merge", "moments", "normalize", "refuses"]

_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3, torch.uint8: 4}
# Results from this size on come from the pool; malloc keeps smaller ones in reach by itself.
_POOLED_BYTES = 256 << 10


def refuses(device_type: str, dtype: torch.dtype) -> str | None:
    """Why this backend cannot serve such an input, or None."""
    return None if device_type == "cpu" else f"its kernels run on the CPU, the input is on {device_type}"


def _readable(t: Tensor, rows: bool) -> Tensor:
    """``t``, or its dense copy where the kernels cannot address it."""
    t = addressed(t, rows)
    if rows and t.shape[1] % 16 and strides(t, rows)[0] != t.shape[1]:
        return dense(t, rows).copy_(t)
    return t


def _empty(x: Tensor, rows: bool) -> Tensor:
    """``empty_like``, large ones in memory that earlier results gave back: fresh pages cost more than the kernel."""
    if x.numel() * x.element_size() < _POOLED_BYTES:
        return empty_like(x, rows)
    return torch.from_dlpack(_native.cpu_empty(_CODES[x.dtype], x.shape, output_strides(x, rows)))


def _empty_mask(like: Layout) -> Tensor:
    shape = like.mask_shape
    if math.prod(shape) < _POOLED_BYTES:
        return torch.empty(shape, dtype=torch.uint8)
    steps = (1,) if like.rows else (shape[1] * shape[2], shape[2], 1)
    return torch.from_dlpack(_native.cpu_empty(_CODES[torch.uint8], shape, steps))


def release_memory() -> None:
    """Return to the system the memory kept of freed results (at most BNKERN_POOL_MB, default an eighth of it)."""
    _native.pool_clear()


def _view(t: Tensor | None, rows: bool) -> tuple[int, int, int]:
    return (0, 0, 0) if t is None else (t.data_ptr(), *strides(t, rows))


def _vector(v: Tensor | None) -> tuple[int, int]:
    return (0, 0) if v is None else (v.data_ptr(), _CODES[v.dtype])


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _contiguous(v: Tensor | None) -> Tensor | None:
    return v if v is None or v.is_contiguous() else v.contiguous()


def _run_forward(
    x: Tensor,
    like: Layout,
    *,
    moments: bool,
    normalize: bool,
    mean: Tensor | None,
    spread: Tensor | None,
    y: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    mask: Tensor | None = None,
    relu: bool = False,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    counter: Tensor | None = None,
    momentum: float | None = 0.0,
    eps: float = 0.0,
) -> None:
    rows = like.rows
    x = _readable(x, rows)
    residual = None if residual is None else _readable(residual, rows)
    weight, bias = _contiguous(weight), _contiguous(bias)
    _native.cpu_forward(
        _CODES[x.dtype],
        *like,
        moments,
        normalize,
        relu,
        *_view(x, rows),
        *_view(residual, rows),
        *_view(y, rows),
        _address(mask),
        *_vector(weight),
        *_vector(bias),
        _address(mean),
        _address(spread),
        *_vector(running_mean),
        *_vector(running_var),
        _address(counter),
        momentum is None,
        momentum or 0.0,
        eps,
        torch.get_num_threads(),
    )


def moments(x: Tensor) -> tuple[int, Tensor, Tensor]:
    """Count, mean [C] and M2 [C] of x."""
    like = layout(x)
    mean, m2 = torch.zeros((2, like.c), dtype=accumulator(x.dtype)).unbind()
    if x.numel():
        _run_forward(x, like, moments=True, normalize=False, mean=mean, spread=m2)
    return like.count, mean, m2


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
) -> tuple[Tensor, Tensor | None]:
    """y and, with residual and ReLU, its mask. ``out`` gives both to write into."""
    like = layout(x)
    if out is not None:
        y, mask = out
    else:
        y = _empty(x, like.rows)
        mask = _empty_mask(like) if act and residual is not None else None
    if x.numel():
        _run_forward(
            x,
            like,
            moments=False,
            normalize=True,
            mean=mean,
            spread=invstd,
            y=y,
            weight=weight,
            bias=bias,
            residual=residual,
            mask=mask,
            relu=act == "relu",
        )
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
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """moments and normalize as one call: y, mean, invstd, mask. Running statistics and counter change in place."""
    like = layout(x)
    y = _empty(x, like.rows) if out is None else out
    mask = _empty_mask(like) if save_mask and act and residual is not None else None
    mean = invstd = None
    if training or running_mean is not None:
        mean, invstd = torch.empty((2, like.c), dtype=accumulator(x.dtype)).unbind()
    if x.numel():
        _run_forward(
            x,
            like,
            moments=training,
            normalize=True,
            mean=mean,
            spread=invstd,
            y=y,
            weight=weight,
            bias=bias,
            residual=residual,
            mask=mask,
            relu=act == "relu",
            running_mean=running_mean,
            running_var=running_var,
            counter=num_batches_tracked,
            momentum=momentum,
            eps=eps,
        )
    elif mean is not None:
        mean.zero_(), invstd.zero_()
        if training and num_batches_tracked is not None:
            num_batches_tracked += 1
    return y, mean, invstd, mask


def _run_backward(
    dy: Tensor,
    x: Tensor,
    like: Layout,
    mean: Tensor | None,
    invstd: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    act: str | None,
    *,
    sums: bool,
    input: bool,
    training: bool,
    dx: Tensor | None = None,
    dresidual: Tensor | None = None,
    sum_dy: Tensor | None = None,
    sum_dy_xhat: Tensor | None = None,
    dweight: Tensor | None = None,
    dbias: Tensor | None = None,
) -> None:
    rows = like.rows
    dy, x = _readable(dy, rows), _readable(x, rows)
    weight, bias = _contiguous(weight), _contiguous(bias)
    _native.cpu_backward(
        _CODES[x.dtype],
        *like,
        sums,
        input,
        act == "relu",
        training,
        *_view(dy, rows),
        *_view(x, rows),
        *_view(dx, rows),
        *_view(dresidual, rows),
        _address(mask),
        *_vector(weight),
        *_vector(bias),
        _address(mean),
        _address(invstd),
        _address(sum_dy),
        _address(sum_dy_xhat),
        *_vector(dweight),
        *_vector(dbias),
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
) -> tuple[Tensor, Tensor]:
    """sum g [C] and sum g * xhat [C]."""
    like = layout(x)
    sum_dy, sum_dy_xhat = torch.zeros((2, like.c), dtype=accumulator(x.dtype)).unbind()
    if x.numel():
        _run_backward(
            dy,
            x,
            like,
            mean,
            invstd,
            weight,
            bias,
            mask,
            act,
            sums=True,
            input=False,
            training=True,
            sum_dy=sum_dy,
            sum_dy_xhat=sum_dy_xhat,
        )
    return sum_dy, sum_dy_xhat


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
    *,
    out: tuple[Tensor | None, Tensor | None] | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """dx and the residual's gradient; ``sums`` is (sum g, sum g * xhat, M), or None in eval mode. ``out``: which."""
    like = layout(x)
    dx, dresidual = (_empty(x, like.rows), _empty(x, like.rows)) if out is None else out
    sum_dy, sum_dy_xhat, count = (None, None, like.count) if sums is None else sums
    if count != like.count:  # the sums of other ranks are in: the kernel divides by this tensor's own count
        scale = like.count / count
        sum_dy, sum_dy_xhat = sum_dy * scale, sum_dy_xhat * scale
    if x.numel():
        _run_backward(
            dy,
            x,
            like,
            mean,
            invstd,
            weight,
            bias,
            mask,
            act,
            sums=False,
            input=True,
            training=sums is not None,
            dx=dx,
            dresidual=dresidual,
            sum_dy=sum_dy,
            sum_dy_xhat=sum_dy_xhat,
        )
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
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """grad_sums and grad_input as one call: (dx, dweight, dbias, dresidual), each where ``needs`` says so."""
    need_x, need_weight, need_bias, need_residual = needs
    like = layout(x)
    if out is not None:
        dx, dresidual = out
    else:
        dx = _empty(x, like.rows) if need_x else None
        dresidual = _empty(x, like.rows) if need_residual else None
    dweight = torch.zeros(like.c, dtype=weight.dtype) if need_weight else None
    dbias = torch.zeros(like.c, dtype=bias.dtype) if need_bias else None
    if x.numel():
        _run_backward(
            dy,
            x,
            like,
            mean,
            invstd,
            weight,
            bias,
            mask,
            act,
            sums=need_weight or need_bias or (need_x and training),
            input=need_x or need_residual,
            training=training,
            dx=dx,
            dresidual=dresidual,
            dweight=dweight,
            dbias=dbias,
        )
    return dx, dweight, dbias, dresidual
