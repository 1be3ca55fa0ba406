"""bnkern.nn.Conv2d and torch's: 3 x 3 with stride and padding 1, forward and backward through autograd.

Results and gradients are fresh in each call, as in bench_batch_norm.py. bnkern has kernels only for float32 in
channels_last on the CPU. Elsewhere both layers run the same convolution.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import bnkern
from benchmarks.cases.shapes import Case

# Output channels of each shape: the stages of a CIFAR ResNet, and two resolutions of a ResNet-50 at batch 64.
OUTPUTS = {"stage1": (16, 32), "stage2": (32,), "stage3": (64, 32), "r50_64_64x56": (64,), "r50_64_128x28": (128,)}


def cases(device: torch.device) -> list[Case]:
    return [Case(name, "channels_last", "fp32") for name in OUTPUTS]


def convolution(kind: type[nn.Conv2d], inputs: int, outputs: int, device: torch.device) -> nn.Conv2d:
    torch.manual_seed(0)
    return kind(inputs, outputs, 3, padding=1, bias=False, device=device).to(memory_format=torch.channels_last)


def differentiate(module: nn.Conv2d, data: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    x, dy = data
    y = module(x)
    return {"y": y, **dict(zip(("dx", "dweight"), torch.autograd.grad(y, (x, module.weight), dy), strict=True))}


def relative_errors(results: dict[str, Tensor], module: nn.Conv2d, data: tuple[Tensor, Tensor]) -> dict[str, float]:
    """The error of each result over the result in float64, as root mean squares."""
    x, dy = (t.detach().double() for t in data)
    truth = nn.Conv2d(*module.weight.shape[1::-1], 3, padding=1, bias=False).to(x)
    truth.weight.data.copy_(module.weight)
    exact = differentiate(truth, (x.requires_grad_(), dy))
    return {name: float((results[name] - exact[name]).norm() / exact[name].norm()) for name in exact}


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU both layers run torch's convolution")
def test_conv2d(case: Case, device: torch.device, mode: str, compare: Callable) -> None:
    inputs = case.size[1]
    for outputs in OUTPUTS.get(case.shape, (inputs,)):
        modules = {
            name: convolution(kind, inputs, outputs, device)
            for name, kind in {"bnkern": bnkern.nn.Conv2d, "eager": nn.Conv2d}.items()
        }
        x = case.activations(device).relu_().requires_grad_()
        dy = torch.randn(case.size[0], outputs, *case.size[2:], device=device)
        data = x, dy.contiguous(memory_format=torch.channels_last)
        compare(
            f"{inputs} to {outputs}",
            case,
            {name: lambda data, m=m: differentiate(m, data) for name, m in modules.items()},
            make_data=lambda data=data: data,
            mode=mode,
            check=lambda results, m=modules["eager"], data=data: {"error": relative_errors(results, m, data)},
        )
