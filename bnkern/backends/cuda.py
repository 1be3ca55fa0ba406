"""The C++/CUDA kernels (csrc/cuda), by the native module.

They serve float32, bfloat16 and float16. Tensors that two strides describe are read in place, others are copied once
to the dense form of their layout. Formulas are those of ``reference``. Calls go to torch's current stream of the
tensors' device, results come from torch's caching allocator, and nothing waits for the device.

A record takes one small launch more, which joins the blocks' parts. Only rows (channels_last, N x C) whose channels are
no multiple of 8, or that are not aligned to 16 bytes, are read once more for it. RuntimeError where a block has too
little shared memory to record rows (142 to 159 KB of it for 512 threads).
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from . import architectures, native
from .native import _native

__all__ = ["backward", "forward", "grad_input", "grad_sums", "merge", "moments", "normalize", "refuses", "try_forward"]


def refuses(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this backend cannot serve such an input, or None."""
    if device.type != "cuda":
        return f"its kernels run on CUDA devices, the input is on {device}"
    if not hasattr(_native, "cuda_device"):
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
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it has no kernels for {dtype}"
    if torch.cuda.is_available():
        _introduce_once(device.index)
    return None


_ARCHITECTURES = _native.build_info()["cuda_archs"]


def _serving(properties) -> architectures.Capability | None:
    """The capability that the code was compiled for which a device of these properties runs, or None."""
    return architectures.serving((properties.major, properties.minor), _ARCHITECTURES)


# -------------------------------------------------------------------------------------------- devices and rules


class Rule(NamedTuple):
    """When a call is one kernel that keeps on chip what it reads, instead of two that each read it."""

    single_read_from: int  # bytes of one tensor
    source: str


# By the name of the device model; "" is for every other model. benchmarks/norm/bench_strategies.py measures both
# strategies.
RULES = {"": Rule(0, "rule of thumb: one kernel for every size")}


def introduce(index: int, single_read_from: int | None = None) -> None:
    """Tell the native module what its plans for a device depend on: ``CudaDevice`` in csrc/cuda/kernels.h.

    ``single_read_from``: a :class:`Rule`'s, instead of the device's own.
    """
    found = torch.cuda.get_device_properties(index)
    rule, served = RULES.get(found.name, RULES[""]), _serving(found)
    _native.cuda_device(
        index,
        multiprocessors=found.multi_processor_count,
        shared_bytes=found.shared_memory_per_block_optin,  # type: ignore[attr-defined]  # torch's stub lacks it
        threads=512,
        # PTX for an earlier capability has no cluster instructions, also where the device that runs it has them.
        clusters=served is not None and served >= (9, 0),
        single_read_from=rule.single_read_from if single_read_from is None else single_read_from,
    )


_introduce_once = functools.cache(introduce)


# -------------------------------------------------------------------------------------------------- the functions


def _with_memory(function: Callable) -> Callable:
    """``function``, once more after torch's cache was emptied where CUDA has no memory for a stream's workspace.

    The workspace is not torch's, whose allocator may hold all that is free. torch too returns that before it raises
    torch.OutOfMemoryError, as this does.
    """

    @functools.wraps(function)
    def with_memory(*args):
        try:
            return function(*args)
        except MemoryError:
            if torch.cuda.is_current_stream_capturing():
                raise _out_of_memory() from None
        torch.cuda.empty_cache()
        try:
            return function(*args)
        except MemoryError:
            raise _out_of_memory() from None

    return with_memory


def _out_of_memory() -> torch.OutOfMemoryError:
    return torch.OutOfMemoryError("CUDA has no memory left for the workspace of this stream (about 1 MB)")


try_forward = _with_memory(native.try_forward)
forward = _with_memory(native.forward)
backward = _with_memory(native.backward)
moments = _with_memory(native.moments)
normalize = _with_memory(native.normalize)
grad_sums = _with_memory(native.grad_sums)
grad_input = _with_memory(native.grad_input)


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
    with torch.cuda.device(means.device):
        _native.cuda_merge(
            native.DTYPES.index(means.dtype),
            count.data_ptr(),
            means.data_ptr(),
            m2s.data_ptr(),
            merged_count.data_ptr(),
            merged_mean.data_ptr(),
            merged_m2.data_ptr(),
            means.shape[0],
            means.shape[1],
            native.current_stream(means),
        )
    return merged_count[0].to(counts.dtype), merged_mean, merged_m2
