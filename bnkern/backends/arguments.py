"""What the native module's entries take: codes of dtypes (csrc/dtype.h), addresses."""

import torch
from torch import Tensor

CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
ABSENT = (0, 0, 0)  # a tensor's address and two strides, where there is none


def address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def vector(v: Tensor | None) -> tuple[int, int]:
    """A per-channel vector's address and dtype."""
    return (0, 0) if v is None else (v.data_ptr(), CODES[v.dtype])


def contiguous(v: Tensor | None) -> Tensor | None:
    return v if v is None or v.is_contiguous() else v.contiguous()
