"""bnkern.nn.Conv2d and torch's, forward and backward through autograd: the convolutions of ResNets.

Results and gradients are fresh in each call, as in bench_batch_norm.py. bnkern has kernels only for float32 in
channels_last on the CPU. Elsewhere both layers run the same convolution. ``test_block`` is a residual block, whose
convolutions and batch norms are a chain (bnkern.nn.run_chain).
"""

import copy
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

import bnkern
from benchmarks.cases.shapes import Case
from bnkern.nn import Chain, ChainLink


class Kind(NamedTuple):
    """A convolution without bias, with padding kernel // 2."""

    outputs: int
    kernel: int = 3
    stride: int = 1

    def label(self, inputs: int) -> str:
        options = [f"{self.kernel} x {self.kernel}"] if self.kernel != 3 else []
        options += [f"stride {self.stride}"] if self.stride > 1 else []
        return ", ".join([f"{inputs} to {self.outputs}", *options])


# The convolutions of each shape: the stages of a CIFAR ResNet, and two resolutions of a ResNet-50 at batch 64.
KINDS = {
    "stage1": (Kind(16), Kind(32), Kind(32, 3, 2), Kind(32, 1, 2)),
    "stage2": (Kind(32), Kind(64, 3, 2), Kind(64, 1, 2)),
    "stage3": (Kind(64), Kind(32)),
    "r50_64_64x56": (Kind(64), Kind(256, 1)),
    "r50_64_128x28": (Kind(128), Kind(128, 3, 2)),
}
BLOCKS = ("stage1", "stage2", "stage3", "r50_64_64x56")


def cases(device: torch.device) -> list[Case]:
    return [Case(name, "channels_last", "fp32") for name in KINDS]


def convolution(layer: type[nn.Conv2d], inputs: int, kind: Kind, device: torch.device) -> nn.Conv2d:
    torch.manual_seed(0)
    options = {"stride": kind.stride, "padding": kind.kernel // 2, "bias": False, "device": device}
    return layer(inputs, kind.outputs, kind.kernel, **options).to(memory_format=torch.channels_last)


class Block(nn.Module):
    """relu(norm(conv(relu(norm(conv(x))))) + x), with bnkern's layers one by one, or with torch's."""

    def __init__(self, channels: int, ours: bool, device: torch.device) -> None:
        super().__init__()
        self.ours = ours
        layer = bnkern.nn.Conv2d if ours else nn.Conv2d
        self.conv1, self.conv2 = (convolution(layer, channels, Kind(channels), device) for _ in range(2))
        options = {"act": "relu"} if ours else {}
        norm = bnkern.nn.BatchNorm2d if ours else nn.BatchNorm2d
        self.norm1, self.norm2 = (norm(channels, device=device, **options) for _ in range(2))

    def chain_links(self) -> list[ChainLink]:
        return [ChainLink(self.conv1, self.norm1), ChainLink(self.conv2, self.norm2, 0)]

    def forward(self, x: Tensor) -> Tensor:
        if self.ours:
            return self.norm2(self.conv2(self.norm1(self.conv1(x))), x)
        y = self.norm1(self.conv1(x)).relu_()
        return self.norm2(self.conv2(y)).add_(x).relu_()


def differentiate(module: nn.Conv2d, data: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    x, dy = data
    y = module(x)
    return {"y": y, **dict(zip(("dx", "dweight"), torch.autograd.grad(y, (x, module.weight), dy), strict=True))}


def relative_errors(results: dict[str, Tensor], module: nn.Conv2d, data: tuple[Tensor, Tensor]) -> dict[str, float]:
    """The error of each result over the result in float64, as root mean squares."""
    x, dy = (t.detach().double() for t in data)
    truth = copy.deepcopy(module).double()
    exact = differentiate(truth, (x.requires_grad_(), dy))
    with torch.no_grad():
        return {name: float((results[name] - exact[name]).norm() / exact[name].norm()) for name in exact}


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU both layers run torch's convolution")
def test_conv2d(case: Case, device: torch.device, mode: str, compare: Callable) -> None:
    inputs = case.size[1]
    for kind in KINDS.get(case.shape, (Kind(inputs),)):
        modules = {
            name: convolution(layer, inputs, kind, device)
            for name, layer in {"bnkern": bnkern.nn.Conv2d, "eager": nn.Conv2d}.items()
        }
        x = case.activations(device).relu_().requires_grad_()
        with torch.no_grad():
            dy = torch.randn_like(modules["eager"](x))
        data = x, dy
        compare(
            kind.label(inputs),
            case,
            {name: lambda data, m=m: differentiate(m, data) for name, m in modules.items()},
            make_data=lambda data=data: data,
            mode=mode,
            check=lambda results, m=modules["eager"], data=data: {"error": relative_errors(results, m, data)},
        )


@pytest.mark.skipif(torch.cuda.is_available(), reason="chains have kernels for the CPU only")
def test_block(case: Case, device: torch.device, mode: str, compare: Callable) -> None:
    if case.shape in KINDS and case.shape not in BLOCKS:
        pytest.skip("the blocks of other shapes are enough")
    channels = case.size[1]
    modules: dict[str, nn.Module] = {
        "bnkern": Chain(Block(channels, True, device)),
        "bnkern one by one": Block(channels, True, device),
        "eager": Block(channels, False, device),
    }
    x = case.activations(device).relu_().requires_grad_()
    dy = torch.randn_like(x)

    def step(module: nn.Module) -> tuple[Tensor, ...]:
        return torch.autograd.grad(module(x), (x, *module.parameters()), dy)

    compare(
        f"block of {channels}",
        case,
        {name: lambda data, m=m: step(m) for name, m in modules.items()},
        make_data=lambda: (x, dy),
        mode=mode,
    )
