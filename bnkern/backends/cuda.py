"""The C++/CUDA kernels (csrc/cuda): launchers over the native module.

They serve float32, bfloat16 and float16. Tensors that two strides describe are read in place, others are copied once
to the dense form of their layout. Signatures and formulas are those of ``reference``.

A ``record`` is a contiguous float64 tensor [rows, C] that the kernels fill in the same pass over memory, and one small
launch more that joins the blocks' parts: the rows ``ACTIVATION``, ``GRADIENT`` or ``AFFINE`` of ``records``. Only rows
(channels_last, N x C) whose channels are no multiple of 8, or that are not aligned to 16 bytes, are read once more for
it. RuntimeError where a block has too little shared memory to record rows (142 to 159 KB of it for 512 threads).
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _native
from . import architectures
from .arguments import ABSENT, CODES, address, contiguous, vector
from .layout import Layout, addressed, empty_like, layout, strides
from .records import activation_of_nothing

__all__ = ["backward", "forward", "grad_input", "grad_sums", "merge", "moments", "normalize", "refuses"]


def refuses(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this backend cannot serve such an input, or None."""
    if device.type != "cuda":
        return f"its kernels run on CUDA devices, the input is on {device}"
    if not hasattr(_native, "cuda_forward"):
        return "the native module was built without CUDA"
    if torch.cuda.is_available() and _serving(torch.cuda.get_device_properties(device)) is None:
        found = torch.cuda.get_device_properties(device)
        return (
            f"the native module was built for {' '.join(_ARCHITECTURES)}, and the code of none of these runs on "
            f"{found.name}, whose capability is {found.major}.{found.minor}: build it with "
            f"BNKERN_CUDA_ARCHS={found.major}{found.minor}"
        )
    if dtype is torch.float64:
        return "it has no float64 kernels, the Triton backend has"
    return None if dtype in CODES else f"it has no kernels for {dtype}"


_ARCHITECTURES = _native.build_info()["cuda_archs"]


def _serving(properties) -> architectures.Capability | None:
    """The capability that the code was compiled for which a device of these properties runs, or None."""
    return architectures.serving((properties.major, properties.minor), _ARCHITECTURES)


# -------------------------------------------------------------------------------------------- devices and rules


class Device(NamedTuple):
    """What the kernels' partition depends on besides shape, layout and dtype: ``CudaDevice`` in csrc/cuda/kernels.h."""

    multiprocessors: int
    shared_bytes: int  # that one block may ask for
    threads: int  # of a block, at most
    clusters: bool  # blocks can read each other's shared memory: device and code of capability 9.0 and later


class Rule(NamedTuple):
    """When a call is one kernel that keeps on chip what it reads, instead of two that each read it."""

    single_read_from: int  # bytes of one tensor
    source: str


# By the name of the device model. "" stands for all that is not there. benchmarks/bench_strategies.py measures both.
RULES = {"": Rule(0, "rule of thumb: one kernel for every size")}


@functools.cache
def _device(index: int) -> tuple[Device, Rule]:
    found = torch.cuda.get_device_properties(index)
    # PTX for an earlier capability has no cluster instructions, also where the device that runs it has them.
    clusters = _serving(found) >= (9, 0)
    device = Device(found.multi_processor_count, found.shared_memory_per_block_optin, 512, clusters)
    return device, RULES.get(found.name, RULES[""])


# -------------------------------------------------------------------------------------------------- launchers


def _current(function: Callable) -> Callable:
    """``function`` with the device of its first argument made current."""

    @functools.wraps(function)
    def on_its_device(first: Tensor, *args, **kwargs):
        if first.device.index == torch.cuda.current_device():
            return function(first, *args, **kwargs)
        with torch.cuda.device(first.device):
            return function(first, *args, **kwargs)

    return on_its_device


def _view(t: Tensor | None, rows: bool) -> tuple[int, int, int]:
    return ABSENT if t is None else (t.data_ptr(), *strides(t, rows))


def _launch(entry: Callable[..., None], x: Tensor, *call) -> None:
    """Queues a call of the native module on the current stream.

    RuntimeError with CUDA's words; torch.OutOfMemoryError where there is no memory for the stream's workspace.
    """
    index = x.device.index
    device, rule = _device(index)
    strategy = int(x.nbytes >= rule.single_read_from)
    stream = torch._C._cuda_getCurrentRawStream(index)  # as Triton's launcher: a third of the cost of current_stream()
    try:
        entry(*call, device, strategy, stream)
    except MemoryError:
        # The workspace is not torch's, whose allocator may hold all that is free. It too returns that before it raises.
        if torch.cuda.is_current_stream_capturing():
            raise _out_of_memory() from None
        torch.cuda.empty_cache()
        try:
            entry(*call, device, strategy, stream)
        except MemoryError:
            raise _out_of_memory() from None


def _out_of_memory() -> torch.OutOfMemoryError:
    return torch.OutOfMemoryError("CUDA has no memory left for the workspace of this stream (about 1 MB)")


def _empty_mask(x: Tensor, like: Layout, act: str | None, residual: Tensor | None) -> Tensor | None:
    wanted = act is not None and residual is not None
    return torch.empty(like.mask_shape, dtype=torch.uint8, device=x.device) if wanted else None


def _run_forward(
    x: Tensor,
    like: Layout,
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
    x = addressed(x, like.rows)
    residual = None if residual is None else addressed(residual, like.rows)
    weight, bias = contiguous(weight), contiguous(bias)
    _launch(
        _native.cuda_forward,
        x,
        CODES[x.dtype],
        like,
        moments,
        normalize,
        act is not None,
        _view(x, like.rows),
        _view(residual, like.rows),
        _view(y, like.rows),
        address(mask),
        vector(weight),
        vector(bias),
        address(mean),
        address(spread),
        vector(running_mean),
        vector(running_var),
        address(counter),
        momentum is None,
        momentum or 0.0,
        eps,
        address(record),
    )


@_current
def moments(x: Tensor) -> tuple[int, Tensor, Tensor]:
    """Count, mean [C] and M2 [C] of x."""
    like = layout(x)
    mean, m2 = (torch.zeros(like.c, dtype=torch.float32, device=x.device) for _ in range(2))
    if x.numel():
        _run_forward(x, like, True, False, mean, m2)
    return like.count, mean, m2


@_current
def merge(counts: Tensor, means: Tensor, m2s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One (count, mean [C], M2 [C]) from K of them, as :func:`bnkern.backends.reference.merge`, in one launch.

    means and m2s are contiguous, float32 or float64. Raises RuntimeError with CUDA's words.
    """
    count = counts.to(means.dtype)
    merged_count, merged_mean, merged_m2 = (
        torch.empty_like(count[:1]),
        torch.empty_like(means[0]),
        torch.empty_like(m2s[0]),
    )
    _native.cuda_merge(
        CODES[means.dtype],
        *(t.data_ptr() for t in (count, means, m2s, merged_count, merged_mean, merged_m2)),
        *means.shape,
        torch._C._cuda_getCurrentRawStream(means.device.index),
    )
    return merged_count[0].to(counts.dtype), merged_mean, merged_m2


@_current
def normalize(
    x: Tensor,
    mean: Tensor | None,
    invstd: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    act: str | None,
    *,
    record: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """y and, with residual and ReLU, its mask. ``record`` [8, C] is filled with the rows ``ACTIVATION``."""
    like = layout(x)
    y, mask = empty_like(x, like.rows), _empty_mask(x, like, act, residual)
    if x.numel():
        statistics = (contiguous(mean), contiguous(invstd))
        _run_forward(x, like, False, True, *statistics, y, weight, bias, residual, mask, act, record=record)
    elif record is not None:
        activation_of_nothing(record)
    return y, mask


@_current
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
    record: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """y, mean, invstd and the mask, as :func:`bnkern.backends.reference.forward`: one launch, or two.

    ``record`` [8, C] is filled with the rows ``ACTIVATION``.
    """
    like = layout(x)
    y = empty_like(x, like.rows)
    mask = _empty_mask(x, like, act, residual) if save_mask else None
    mean = invstd = None
    if training or running_mean is not None:
        mean, invstd = (torch.empty(like.c, dtype=torch.float32, device=x.device) for _ in range(2))
    if x.numel():
        running = (running_mean, running_var, num_batches_tracked, momentum, eps, record)
        _run_forward(x, like, training, True, mean, invstd, y, weight, bias, residual, mask, act, *running)
    elif mean is not None:
        mean.zero_(), invstd.zero_()
        if training and num_batches_tracked is not None:
            num_batches_tracked += 1
    if record is not None and not x.numel():
        activation_of_nothing(record)
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
    dy, x = addressed(dy, like.rows), addressed(x, like.rows)
    mean, invstd, weight, bias = (contiguous(v) for v in (mean, invstd, weight, bias))
    _launch(
        _native.cuda_backward,
        x,
        CODES[x.dtype],
        like,
        sums,
        input,
        act is not None,
        training,
        _view(dy, like.rows),
        _view(x, like.rows),
        _view(dx, like.rows),
        _view(dresidual, like.rows),
        address(mask),
        vector(weight),
        vector(bias),
        address(mean),
        address(invstd),
        address(sum_dy),
        address(sum_dy_xhat),
        vector(dweight),
        vector(dbias),
        address(record_gradient),
        address(record_affine),
    )


@_current
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
    """sum g [C] and sum g * xhat [C]. ``record`` [8, C] is filled with the rows ``AFFINE``."""
    like = layout(x)
    sums = tuple(torch.zeros(like.c, dtype=torch.float32, device=x.device) for _ in range(2))
    if x.numel():
        phase, results = (True, False, True), (None, None, *sums)
        _run_backward(dy, x, like, mean, invstd, weight, bias, mask, act, *phase, *results, record_affine=record)
    elif record is not None:
        record.zero_()
    return sums


@_current
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
    record: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """dx and the residual's gradient, where needed; ``sums`` is (sum g, sum g * xhat, M), or None in eval mode.

    ``record`` [7, C] is filled with the rows ``GRADIENT`` where dx is needed.
    """
    like = layout(x)
    dx, dresidual = (empty_like(x, like.rows) if want else None for want in (need_dx, need_dresidual))
    sum_dy, sum_dy_xhat, count = (None, None, like.count) if sums is None else sums
    if count != like.count:  # other ranks' values are in the sums; the kernel divides by this tensor's own count
        scale = like.count / count
        sum_dy, sum_dy_xhat = sum_dy * scale, sum_dy_xhat * scale
    if x.numel() and (need_dx or need_dresidual):
        results = (dx, dresidual, contiguous(sum_dy), contiguous(sum_dy_xhat))
        phase = (False, True, sums is not None)
        _run_backward(dy, x, like, mean, invstd, weight, bias, mask, act, *phase, *results, record_gradient=record)
    elif record is not None and need_dx:
        record.zero_()
    return dx, dresidual


@_current
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
    record_gradient: Tensor | None = None,
    record_affine: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """grad_sums and grad_input as one call: (dx, dweight, dbias, dresidual), each where ``needs`` says so.

    ``record_gradient`` [7, C] is filled with the rows ``GRADIENT`` where dx is needed, ``record_affine`` [8, C] with
    ``AFFINE`` unless the normalisation is the identity.
    """
    need_x, need_weight, need_bias, need_residual = needs
    record_gradient = record_gradient if need_x else None
    record_affine = None if mean is None else record_affine
    like = layout(x)
    dx, dresidual = (empty_like(x, like.rows) if want else None for want in (need_x, need_residual))
    dweight = torch.empty(like.c, dtype=weight.dtype, device=x.device) if need_weight else None
    dbias = torch.empty(like.c, dtype=bias.dtype, device=x.device) if need_bias else None
    if x.numel():
        sums = need_weight or need_bias or (need_x and training) or record_affine is not None
        input = need_x or need_residual
        if sums or input:
            results = (dx, dresidual, None, None, dweight, dbias, record_gradient, record_affine)
            # Without dx nothing is to be centred, and without sums there is nothing to centre by.
            centred = training and need_x
            _run_backward(dy, x, like, mean, invstd, weight, bias, mask, act, sums, input, centred, *results)
    else:
        for total in (dweight, dbias, record_gradient, record_affine):
            if total is not None:
                total.zero_()
    return dx, dweight, dbias, dresidual
