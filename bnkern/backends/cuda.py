"""The C++/CUDA kernels (csrc/cuda): launchers over the native module. Compiled in every CUDA build, not yet run on one.

So far they are one phase, ``merge``; the Triton kernels serve CUDA devices.
"""

import torch
from torch import Tensor

from .. import _native

__all__ = ["merge", "refuses"]

_CODES = {torch.float32: 0, torch.float64: 3}


def refuses(device_type: str, dtype: torch.dtype) -> str | None:
    """Why this backend cannot serve such an input."""
    if device_type != "cuda":
        return f"its kernels run on CUDA devices, the input is on {device_type}"
    if not hasattr(_native, "cuda_merge"):
        return "the native module was built without CUDA"
    return "of the five phases only merge has a CUDA kernel so far"


def merge(counts: Tensor, means: Tensor, m2s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One (count, mean [C], M2 [C]) from K of them, as :func:`bnkern.backends.reference.merge`, in one launch.

    means and m2s are contiguous, float32 or float64, on the current CUDA device. Raises RuntimeError with CUDA's words.
    """
    count = counts.to(means.dtype)
    merged_count, merged_mean, merged_m2 = (
        torch.empty_like(count[:1]),
        torch.empty_like(means[0]),
        torch.empty_like(m2s[0]),
    )
    _native.cuda_merge(
        _CODES[means.dtype],
        *(t.data_ptr() for t in (count, means, m2s, merged_count, merged_mean, merged_m2)),
        *means.shape,
        torch.cuda.current_stream().cuda_stream,
    )
    return merged_count[0].to(counts.dtype), merged_mean, merged_m2
