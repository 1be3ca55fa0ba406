"""Batch norm modules of bnkern and of torch in the same state, and inputs for them."""

import inspect

import pytest
import torch
from torch import Tensor, nn

import bnkern

KINDS = [
    ("BatchNorm1d", (6, 5)),
    ("BatchNorm1d", (6, 5, 7)),
    ("BatchNorm2d", (6, 5, 4, 3)),
    ("BatchNorm3d", (4, 5, 2, 3, 2)),
]
EACH_KIND = pytest.mark.parametrize(("name", "shape"), KINDS, ids=lambda v: v if isinstance(v, str) else f"{len(v)}d")


def pair(name: str, device: str = "cpu", **arguments: object) -> tuple[nn.Module, nn.Module]:
    """bnkern's module and torch's with the same random parameters and statistics.

    Skips if torch has no such argument.
    """
    for argument in arguments:
        if argument not in inspect.signature(nn.BatchNorm2d.__init__).parameters:
            pytest.skip(f"this torch's batch norm has no {argument}")
    ours = getattr(bnkern.nn, name)(5, device=device, **arguments)
    theirs = getattr(nn, name)(5, device=device, **arguments)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for key, value in theirs.state_dict().items():
            if value.is_floating_point():
                value.copy_(torch.rand(5, generator=generator) + 0.5)
            assert ours.state_dict()[key].shape == value.shape
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str, count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randn(shape, generator=generator).to(device, dtype) for _ in range(count)]
