"""conv2d_grad_signs at the convolutions of a CIFAR ResNet, batch 128.

The peers are torch's weight gradient alone ("eager gradient"), which every training step computes, and one of torch's
weight gradients for each requested sum ("eager identities"), with signs in the dtype of the operands.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from benchmarks.cases import shapes
from benchmarks.cases.shapes import LAYOUTS, Case
from bnkern import GradSigns, conv2d_grad_signs

# Output channels, kernel size and stride, by the shape of x.
CONVOLUTIONS = {
    "images": ((16, 3, 1),),
    "stage1": ((16, 3, 1), (32, 3, 2), (32, 1, 2)),
    "stage2": ((32, 3, 1), (64, 3, 2)),
    "stage3": ((64, 3, 1),),
    "tiny": ((8, 3, 1),),
}
WANTED = {
    "gradient": ("sum",),
    "absolute": ("abs_sum",),
    "both": ("sum", "abs_sum"),
    "signs": ("sign_sum", "nonzero"),
    "all": GradSigns._fields,
}
Data = tuple[Tensor, Tensor]


def cases(device: torch.device) -> list[Case]:
    names = tuple(name for name in CONVOLUTIONS if name != "tiny")
    return [case for case in shapes.cases(names, device) if case.dtype == "fp32" or case.shape == "stage1"]


def gradient(data: Data, kernel: int, stride: int) -> Tensor:
    x, dy = data
    weight = x.new_empty(dy.shape[1], x.shape[1], kernel, kernel)
    if x.is_contiguous(memory_format=torch.channels_last):
        weight = weight.contiguous(memory_format=torch.channels_last)
    padding, mask = [kernel // 2] * 2, [False, True, False]
    return torch.ops.aten.convolution_backward(
        dy, x, weight, None, [stride] * 2, padding, [1, 1], False, [0, 0], 1, mask
    )[1]


def identities(data: Data, kernel: int, stride: int, wanted: tuple[str, ...]) -> list[Tensor]:
    operands = {
        "sum": lambda t: t,
        "abs_sum": torch.abs,
        "sign_sum": torch.sign,
        "nonzero": lambda t: (t != 0).to(t.dtype),
    }
    return [gradient(tuple(operands[name](t) for t in data), kernel, stride) for name in wanted]


def data(case: Case, device: torch.device, outputs: int, kernel: int, stride: int) -> Data:
    n, _, h, w = case.size
    x = case.normal(device).relu_()
    sizes = [(size + 2 * (kernel // 2) - kernel) // stride + 1 for size in (h, w)]
    dy = torch.randn(n, outputs, *sizes, device=device).to(x.dtype)
    return x, dy.contiguous(memory_format=LAYOUTS[case.layout])


@pytest.mark.parametrize("wanted", WANTED)
def test_conv_grad_signs(case: Case, wanted: str, device: torch.device, mode: str, compare: Callable) -> None:
    names = WANTED[wanted]
    for outputs, kernel, stride in CONVOLUTIONS[case.shape]:
        compare(
            f"{wanted}, {case.size[1]} to {outputs}, {kernel}x{kernel}, stride {stride}",
            case,
            {
                "bnkern": lambda d, k=kernel, s=stride: conv2d_grad_signs(*d, k, s, k // 2, wanted=names),
                "eager gradient": partial(gradient, kernel=kernel, stride=stride),
                "eager identities": partial(identities, kernel=kernel, stride=stride, wanted=names),
            },
            make_data=partial(data, case, device, outputs, kernel, stride),
            mode=mode,
            budget_s=1.0,
        )
