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

from benchmarks.cases import shapes, traffic
from benchmarks.cases.shapes import Case
from benchmarks.cases.strategies import PROVIDERS, Layer, call_layer
from bnkern import backends

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or backends.unavailable("cuda", "cuda") is not None,
    reason="there is no CUDA device, or the module was built without CUDA",
)
ANY_SHAPE = True


def cases(device: torch.device) -> list[Case]:
    return [case for case in shapes.cases(("cifar", "large64"), device) if case.dtype != "fp16"]


@pytest.mark.parametrize("call", ["forward", "backward"])
@pytest.mark.parametrize("cache", ["warm", "cold"])
def test_strategies(cache: str, call: str, case: Case, mode: str, device: torch.device, compare: Callable) -> None:
    moved = traffic.moved((call,), "bn_add_relu", case.elements, case.itemsize)
    compare(
        f"{call}, {cache}",
        case,
        {provider: partial(call_layer, provider, call) for provider in PROVIDERS},
        make_data=lambda: Layer(case, device),
        mode=mode,
        moved=lambda _: moved,
        nbytes=1e12 if cache == "warm" else None,
        budget_s=0.5,
    )
