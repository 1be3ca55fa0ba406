"""cuDNN's convolutions of a CIFAR ResNet, each pass alone: 3 x 3 in bf16 and channels_last, batch 128, in a CUDA graph.

These are the convolutions of bench_step.py's networks, which take most of a step. A convolution kernel of the project's
own would have to be faster than these. cuDNN chooses its kernels by measurement, as in training. Outputs are fresh.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks.cases.shapes import Case

PASSES = {"input gradient": [True, False, False], "weight gradient": [False, True, False]}
OUTPUTS = {"images": [(16, 1)], "stage1": [(16, 1), (32, 2)], "stage2": [(32, 1), (64, 2)], "stage3": [(64, 1)]}


def cases(device: torch.device) -> list[Case]:
    return [Case(name, "channels_last", "bf16") for name in OUTPUTS]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="cuDNN needs a GPU")
def test_cudnn(case: Case, device: torch.device, mode: str, compare: Callable) -> None:
    if mode != "graph":
        pytest.skip("called one by one, the host's time would be measured")
    inputs = case.size[1]
    for outputs, stride in OUTPUTS[case.shape]:
        geometry = [stride, stride], [1, 1], [1, 1], False, [0, 0], 1

        def forward(data: list[Tensor], geometry: tuple = geometry) -> Tensor:
            x, weight, _ = data
            return torch.ops.aten.convolution(x, weight, None, *geometry)

        def backward(data: list[Tensor], needs: list[bool], geometry: tuple = geometry) -> tuple:
            x, weight, dy = data
            return torch.ops.aten.convolution_backward(dy, x, weight, None, *geometry, needs)

        def make_data(outputs: int = outputs, forward: Callable = forward) -> list[Tensor]:
            x = case.activations(device).relu_()
            weight = torch.randn(outputs, inputs, 3, 3, device=device, dtype=x.dtype)
            weight = weight.contiguous(memory_format=torch.channels_last)
            return [x, weight, torch.randn_like(forward([x, weight, x]))]

        gradients = {name: lambda data, needs=needs, f=backward: f(data, needs) for name, needs in PASSES.items()}
        with torch.backends.cudnn.flags(benchmark=True, allow_tf32=False):
            compare(
                f"{inputs} to {outputs}, stride {stride}",
                case,
                {"forward": forward, **gradients},
                make_data=make_data,
                mode=mode,
                budget_s=0.5,
            )
