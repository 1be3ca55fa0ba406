"""The functions of a backend for CPU and CUDA tensors, by calls of the native module, and the objects that C++ reads.

``bnkern._native`` reads a call's tensors, checks them, makes the results and runs the kernels (csrc/call). It returns
None for calls that it cannot read. The reference serves empty batches. Tensors that two strides do not describe are
copied once to the dense form of their layout. Subclasses are replaced by plain tensors with the same memory.

The native module must be imported after torch, so that both use the OpenMP runtime that torch loads.
"""

import functools
import sys
from typing import TypeVar, cast

import torch
from torch import Tensor

from .. import _native
from . import layout as layouts
from . import reference
from .activations import ACTIVATIONS
from .calls import BackwardCall, Forward, ForwardCall, Gradients, Sums, UpdateCall
from .layout import dense, layout, strides

# ------------------------------------------------------------------------------- read by _native.connect, by name

PLAIN_TYPES = (Tensor, torch.nn.Parameter)  # the types that C++ reads; subclasses may change the meaning of a tensor
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.uint8, torch.int64, torch.int32)
is_neg = Tensor.is_neg
from_dlpack = torch.from_dlpack
empty_strided = torch.empty_strided
get_num_threads = torch.get_num_threads
# torch 2.10 offers DLPack's table of functions by its address, later versions in a capsule.
exchange_table = getattr(Tensor, "__dlpack_c_exchange_api__", getattr(Tensor, "__c_dlpack_exchange_api__", None))

_CODES = {dtype: code for code, dtype in enumerate(DTYPES)}
_DEVICE_TYPES = {"cpu": 1, "cuda": 2}  # DLPack's


def current_stream(t: Tensor) -> int:
    """The current stream of a CUDA tensor's device, if the exchange table has no function for it."""
    return torch._C._cuda_getCurrentRawStream(t.device.index)


def describe(t: Tensor) -> tuple[int, int, int, int, tuple[int, ...], tuple[int, ...]] | None:
    """Address, device type and index, dtype, shape and strides; None if ``t`` has no elements in memory.

    It is used if torch has no exchange table.
    """
    device_type, dtype = _DEVICE_TYPES.get(t.device.type), _CODES.get(t.dtype)
    if device_type is None or dtype is None or t.layout is not torch.strided:
        return None
    try:
        address = t.data_ptr()
    except RuntimeError:  # a tensor of a functorch transform
        return None
    return address, device_type, t.device.index or 0, dtype, tuple(t.shape), t.stride()


@functools.lru_cache(maxsize=4096)
def output_strides(shape: tuple[int, ...], stride: tuple[int, ...]) -> tuple[int, ...]:
    """:func:`bnkern.backends.layout.output_strides` for a tensor with these sizes and strides."""
    x = torch.empty_strided(shape, stride, device="meta")
    return layouts.output_strides(x, layout(x).rows)


def _connect() -> bool:
    if _native.fields() != (ForwardCall._fields, BackwardCall._fields, tuple(ACTIVATIONS)):
        raise ImportError("bnkern._native was built from other sources than this package; build it again")
    return _native.connect(sys.modules[__name__])


READS_TABLE = _connect()  # whether tensors are read through the exchange table

# ------------------------------------------------------------------------------------------------- readable operands
# C++ reads all operands that these functions return, so its result for them is not None.

_RUNNING = ("running_mean", "running_var", "num_batches_tracked", "num_batches_skipped")
OptionalTensor = TypeVar("OptionalTensor", Tensor, Tensor | None)


def _readable(t: OptionalTensor, rows: bool) -> OptionalTensor:
    """``t`` itself if the kernels can read it in this layout, otherwise a dense copy."""
    if t is None:
        return None
    t = plain(t)
    step = strides(t, rows)
    narrow = rows and t.device.type == "cpu" and t.shape[1] % 16 and step is not None and step[0] != t.shape[1]
    return dense(t, rows).copy_(t) if step is None or narrow else t


def _vector(v: OptionalTensor) -> OptionalTensor:
    return None if v is None else plain(v).contiguous()


def plain(t: OptionalTensor) -> OptionalTensor:
    """The same memory as an instance of torch.Tensor."""
    if t is None or type(t) in PLAIN_TYPES:
        return t
    with torch._C.DisableTorchFunctionSubclass():
        return t.as_subclass(Tensor)


def _readable_forward(call: ForwardCall) -> ForwardCall:
    rows = layout(call.x).rows
    x, residual = _readable(call.x, rows), _readable(call.residual, rows)
    weight, bias = _vector(call.weight), _vector(call.bias)
    running = {name: plain(getattr(call, name)) for name in _RUNNING}
    call = call._replace(x=x, weight=weight, bias=bias, residual=residual, **running)
    return call if call.sample_weight is None else call._replace(sample_weight=_vector(call.sample_weight))


def _readable_backward(call: BackwardCall) -> BackwardCall:
    rows = layout(call.x).rows
    dy, x = _readable(call.dy, rows), _readable(call.x, rows)
    weight, bias, mean, invstd = _vector(call.weight), _vector(call.bias), _vector(call.mean), _vector(call.invstd)
    call = BackwardCall(dy, x, weight, bias, mean, invstd, plain(call.mask), *call[7:])
    return call if call.sample_weight is None else call._replace(sample_weight=_vector(call.sample_weight))


# ----------------------------------------------------------------------------------------- the functions of a backend


def try_forward(call: ForwardCall) -> Forward | None:
    """:func:`forward` of a call that was not validated. None if the short check does not accept it."""
    return _native.forward(call, False)


def forward(call: ForwardCall) -> Forward:
    """``moments`` and ``normalize``: y, mean, invstd, mask. Updates running statistics and counter in place."""
    if not call.x.numel():
        return reference.forward(call)
    return _native.forward(call, True) or cast(Forward, _native.forward(_readable_forward(call), True))


def backward(call: BackwardCall) -> Gradients:
    """``grad_sums`` and ``grad_input``: (dx, dweight, dbias, dresidual), with None for those not in ``call.needs``."""
    if not call.x.numel():
        return reference.backward(call)
    return _native.backward(call) or cast(Gradients, _native.backward(_readable_backward(call)))


def moments(x: Tensor) -> tuple[int, Tensor, Tensor]:
    """Count, mean [C] and M2 [C] of x."""
    if not x.numel():
        return reference.moments(x)
    results = _native.moments(x) or _native.moments(_readable(x, layout(x).rows))
    return layout(x).count, *cast("tuple[Tensor, Tensor]", results)


def normalize(call: ForwardCall, mean: Tensor | None, invstd: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """y, and its mask if the call requests one."""
    if not call.x.numel():
        return reference.normalize(call, mean, invstd)
    results = _native.normalize(call, mean, invstd)
    results = results or _native.normalize(_readable_forward(call), _vector(mean), _vector(invstd))
    return cast("tuple[Tensor, Tensor | None]", results)


def grad_sums(call: BackwardCall) -> tuple[Tensor, Tensor]:
    """sum g [C] and sum g * xhat [C]."""
    if not call.x.numel():
        return reference.grad_sums(call)
    return cast("tuple[Tensor, Tensor]", _native.grad_sums(call) or _native.grad_sums(_readable_backward(call)))


def grad_input(call: BackwardCall, sums: Sums | None) -> tuple[Tensor | None, Tensor | None]:
    """dx and the residual's gradient, if needed. ``sums`` is (sum g, sum g * xhat, M), or None in eval mode.

    With weights the kernel divides by their sum, and M is not read.
    """
    if not call.x.numel():
        return reference.grad_input(call, sums)
    sum_dy, sum_dy_xhat, count = (None, None, 0) if sums is None else sums
    own_count = layout(call.x).count if call.sample_weight is None else count
    if sums is not None and count != own_count:  # the sums are those of all ranks; the kernel divides by its own count
        sum_dy, sum_dy_xhat = sums[0] * (own_count / count), sums[1] * (own_count / count)
    results = _native.grad_input(call, sum_dy, sum_dy_xhat)
    results = results or _native.grad_input(_readable_backward(call), _vector(sum_dy), _vector(sum_dy_xhat))
    return cast("tuple[Tensor | None, Tensor | None]", results)


def update(call: UpdateCall) -> None:
    """One step of SGD for all parameters in one pass. The kernels read the gradients where autograd left them."""
    _native.update(*call)
