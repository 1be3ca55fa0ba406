"""Calls of one layer by each strategy of the CUDA kernels, and by Triton's: a training forward or backward of batch
norm, residual and ReLU, without autograd. Outputs are fresh."""

import torch
from torch import Tensor

from benchmarks.cases.shapes import Case
from bnkern import backends
from bnkern.backends.calls import BackwardCall, ForwardCall

ALWAYS, NEVER = 0, 1 << 62  # the size in bytes from which a call is one kernel
ONE, TWO = "bnkern, one kernel", "bnkern, two kernels"
PROVIDERS = {ONE: ("cuda", ALWAYS), TWO: ("cuda", NEVER), "Triton": ("triton", ALWAYS)}
NEEDS = (True, True, True, True)


class Layer:
    """The tensors of a layer, and what its forward saved for its backward."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.x, self.residual, self.dy = case.activations(device), case.activations(device), case.normal(device)
        c = case.size[1]
        self.weight, self.bias = torch.rand(c, device=device) + 0.5, torch.randn(c, device=device)
        self.running = torch.zeros(c, device=device), torch.ones(c, device=device)
        self.counter = torch.zeros((), dtype=torch.int64, device=device)
        self.saved = self.forward(backends.choose("triton", "cuda", self.x.dtype))[1:]

    def forward(self, kernels) -> tuple[Tensor | None, ...]:
        arguments = self.x, self.weight, self.bias, self.residual, *self.running, self.counter
        return kernels.forward(ForwardCall(*arguments, True, 0.1, 1e-5, "relu", True))

    def backward(self, kernels) -> tuple[Tensor | None, ...]:
        mean, invstd, mask = self.saved
        return kernels.backward(
            BackwardCall(self.dy, self.x, self.weight, self.bias, mean, invstd, mask, "relu", True, NEEDS)
        )


def call_layer(provider: str, call: str, layer: Layer) -> tuple[Tensor | None, ...]:
    """A call of a layer with one strategy. The strategy is chosen when the call is made or captured."""
    from bnkern.backends import cuda

    name, single_read_from = PROVIDERS[provider]
    kernels, index = backends.choose(name, "cuda", layer.x.dtype), torch.cuda.current_device()
    cuda.introduce(index, single_read_from)
    try:
        return getattr(layer, call)(kernels)
    finally:
        cuda.introduce(index)
