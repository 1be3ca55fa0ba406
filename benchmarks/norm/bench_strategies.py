"""The two strategies of the CUDA kernels, and the Triton kernels: a training forward or backward with ReLU and
residual.

``make gpu-check`` writes the rules of bnkern/backends/cuda_rules.json from the results. "cold" reads its tensors from
memory. "warm" alternates between two sets of tensors, which stay in the second-level cache if they are small, as they
do after a convolution. Outputs are fresh, and autograd is not used.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from benchmarks.cases import shapes, traffic
from benchmarks.cases.shapes import Case
from bnkern import backends
from bnkern.backends.calls import BackwardCall, ForwardCall

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or backends.unavailable("cuda", "cuda") is not None,
    reason="there is no CUDA device, or the module was built without CUDA",
)
ANY_SHAPE = True
ALWAYS, NEVER = 0, 1 << 62  # the size in bytes from which a call is one kernel
WAYS = {"bnkern, one kernel": ("cuda", ALWAYS), "bnkern, two kernels": ("cuda", NEVER), "Triton": ("triton", ALWAYS)}
NEEDS = (True, True, True, True)


def cases(device: torch.device) -> list[Case]:
    return [case for case in shapes.cases(("cifar", "large64"), device) if case.dtype != "fp16"]


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


def call_layer(way: str, call: str, layer: Layer) -> tuple[Tensor | None, ...]:
    """A call of a layer with one strategy. The strategy is chosen when the call is made or captured."""
    from bnkern.backends import cuda

    name, single_read_from = WAYS[way]
    kernels, index = backends.choose(name, "cuda", layer.x.dtype), torch.cuda.current_device()
    cuda.introduce(index, single_read_from)
    try:
        return getattr(layer, call)(kernels)
    finally:
        cuda.introduce(index)


@pytest.mark.parametrize("call", ["forward", "backward"])
@pytest.mark.parametrize("where", ["warm", "cold"])
def test_strategies(where: str, call: str, case: Case, mode: str, device: torch.device, compare: Callable) -> None:
    moved = traffic.moved((call,), "bn_add_relu", case.elements, case.itemsize)
    compare(
        f"{call}, {where}",
        case,
        {way: partial(call_layer, way, call) for way in WAYS},
        make_data=lambda: Layer(case, device),
        mode=mode,
        moved=lambda _: moved,
        nbytes=1e12 if where == "warm" else None,
        budget_s=0.5,
    )
