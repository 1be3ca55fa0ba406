"""The C++/CUDA kernels (csrc/cuda), called through the native module.

They serve float32, bfloat16 and float16. Tensors that two strides describe are read in place, others are copied once
to the dense form of their layout. Formulas are those of ``reference``. Calls run on torch's current stream of the
tensors' device. Results come from torch's caching allocator. No function waits for the device.

A record needs one more small launch, which joins the blocks' parts. Rows (channels_last, N x C) are read once more for
it only if their number of channels is not a multiple of 8 or they are not aligned to 16 bytes. RuntimeError if a block
has too little shared memory to record rows (118 to 135 KB for 512 threads).
"""

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from . import architectures, native
from .calls import BackwardCall, Forward, ForwardCall, Gradients, Sums
from .native import _native, update

__all__ = [
    "backward",
    "compiled_for",
    "forward",
    "grad_input",
    "grad_sums",
    "merge",
    "moments",
    "normalize",
    "refuses",
    "try_forward",
    "update",
    "with_memory",
]


def refuses(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this backend cannot serve such an input, or None."""
    if device.type != "cuda":
        return f"its kernels run on CUDA devices, the input is on {device}"
    if not hasattr(_native, "cuda_device"):
        return "the native module was built without CUDA"
    if torch.cuda.is_available() and _serving(torch.cuda.get_device_properties(device)) is None:
        properties = torch.cuda.get_device_properties(device)
        return (
            f"the native module was built for {' '.join(_ARCHITECTURES)}, and the code of none of these runs on "
            f"{properties.name}, whose capability is {properties.major}.{properties.minor}: build it with "
            f"BNKERN_CUDA_ARCHS={properties.major}{properties.minor}"
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
    """The capability of the compiled code that a device with these properties runs, or None."""
    return architectures.serving((properties.major, properties.minor), _ARCHITECTURES)


def compiled_for(device: torch.device) -> architectures.Capability:
    """The capability of the compiled code that the device runs. (8, 0) if torch has no GPU, as in tests on the host."""
    if not torch.cuda.is_available():
        return 8, 0
    return _serving(torch.cuda.get_device_properties(device)) or (0, 0)


# -------------------------------------------------------------------------------------------- devices and rules


class Rule(NamedTuple):
    """What is known of a device model: when a call is one kernel that keeps its input on the chip, instead of two
    kernels that each read it, and how many clusters of 2, 4 and 8 blocks run at once.
    """

    single_read_from: int  # bytes of one tensor
    source: str
    clusters: Sequence[int] | None = None  # None: CUDA is asked once in a process


# By the name of the device model. `make gpu-check` measures both strategies, asks CUDA for the clusters, and writes
# this table with an entry for its device, which a person reads and commits.
RULES = {
    name: Rule(**entry) for name, entry in json.loads(Path(__file__).with_name("cuda_rules.json").read_text()).items()
}


def rule_of(model: str) -> Rule:
    """The rule for a device model."""
    return RULES.get(model, Rule(0, "not measured on this device: one kernel for every size"))


_queried: dict[str, Sequence[int]] = {}


def clusters_of(index: int, properties) -> Sequence[int]:
    """How many clusters of 2, 4 and 8 blocks a device with these properties runs at once (csrc/cuda/kernels.h).

    Plans of NCHW tensors depend on them, and so do the last bits of results. If the table does not have them, CUDA is
    asked once in a process, and the answer serves all devices of this name. PTX for an earlier capability than 9.0 has
    no cluster instructions, even if the device has them, so the numbers are 0 then.
    """
    compiled = _serving(properties)
    if compiled is None or compiled < (9, 0):
        return 0, 0, 0
    if recorded := rule_of(properties.name).clusters:
        return recorded
    if properties.name not in _queried:
        _queried[properties.name] = _native.cuda_clusters(index, properties.shared_memory_per_block_optin)
    return _queried[properties.name]


def introduce(index: int, single_read_from: int | None = None) -> None:
    """Registers a device with the native module, with the properties of ``CudaDevice`` in csrc/cuda/kernels.h.

    ``single_read_from`` replaces the value of the device's :class:`Rule`.
    """
    properties = torch.cuda.get_device_properties(index)
    rule = rule_of(properties.name)
    _native.cuda_device(
        index,
        multiprocessors=properties.multi_processor_count,
        shared_bytes=properties.shared_memory_per_block_optin,  # type: ignore[attr-defined]  # torch's stub lacks it
        threads=512,
        clusters=clusters_of(index, properties),
        single_read_from=rule.single_read_from if single_read_from is None else single_read_from,
    )


_introduce_once = functools.cache(introduce)


# -------------------------------------------------------------------------------------------------- the functions


def with_memory(function: Callable) -> Callable:
    """``function``, which is called again after torch's cache is emptied if CUDA has no memory for a workspace.

    The workspace does not come from torch's allocator, which may hold all free memory. Torch itself also empties this
    cache before it raises torch.OutOfMemoryError.
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


_try_forward = with_memory(native.try_forward)
_forward = with_memory(native.forward)
_backward = with_memory(native.backward)
moments = with_memory(native.moments)
normalize = with_memory(native.normalize)
_grad_sums = with_memory(native.grad_sums)
_grad_input = with_memory(native.grad_input)


def try_forward(call: ForwardCall) -> Forward | None:
    """:func:`bnkern.backends.native.try_forward`. ``num_batches_skipped`` needs two more small launches.

    It declines ``sample_weight``, for which :func:`forward` has other kernels.
    """
    return _try_forward(call) if call.num_batches_skipped is None else _with_skips(_try_forward, call)


def forward(call: ForwardCall) -> Forward:
    """:func:`bnkern.backends.native.forward`. ``num_batches_skipped`` needs two more small launches.

    Triton's kernels serve a call with ``sample_weight``.
    """
    if call.sample_weight is not None:
        return _triton().forward(call)
    return _forward(call) if call.num_batches_skipped is None else _with_skips(_forward, call)


def _triton() -> ModuleType:
    from . import triton  # imports Triton, which takes a second

    return triton


def _with_skips(function: Callable, call: ForwardCall):
    from .triton import forward_with_skips  # imports Triton, which takes a second

    return forward_with_skips(function, call)


def backward(call: BackwardCall) -> Gradients:
    """:func:`bnkern.backends.native.backward`. A kernel in Triton computes ``record_samples``, by another pass.

    Triton's kernels serve a call with ``sample_weight``.
    """
    if call.sample_weight is not None:
        return _triton().backward(call)
    return _backward(call if call.record_samples is None else _without_samples(call))


def grad_sums(call: BackwardCall) -> tuple[Tensor, Tensor]:
    """:func:`bnkern.backends.native.grad_sums`. A kernel in Triton computes ``record_samples``, by another pass."""
    return _grad_sums(call if call.record_samples is None else _without_samples(call))


def grad_input(call: BackwardCall, sums: Sums | None) -> tuple[Tensor | None, Tensor | None]:
    """:func:`bnkern.backends.native.grad_input`. Triton's kernel serves a call with ``sample_weight``."""
    return _grad_input(call, sums) if call.sample_weight is None else _triton().grad_input(call, sums)


def _without_samples(call: BackwardCall) -> BackwardCall:
    """Fills ``call.record_samples``, and returns the call without it."""
    from .triton.samples import record_samples

    record_samples(call)
    return call._replace(record_samples=None)


def merge(counts: Tensor, means: Tensor, m2s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Merges K times (count, mean [C], M2 [C]) into one, as :func:`bnkern.backends.reference.merge`, in one launch.

    means and m2s are contiguous, float32 or float64. Raises RuntimeError with CUDA's message.
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
