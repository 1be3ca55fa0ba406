"""The dtype of sums."""

import torch


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and saved statistics: float64 for float64, otherwise float32."""
    return torch.float64 if dtype is torch.float64 else torch.float32
