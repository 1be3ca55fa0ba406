"""The fixed cost of a call: forward and backward of a tensor so small that the kernels take almost no time.

The times consist of Python, autograd and launches: once for the fused operation, three times for eager's batch norm,
addition and ReLU.
"""

import torch

from benchmarks.cases import peers
from benchmarks.cases.norms import differentiate
from benchmarks.cases.shapes import Case, Inputs


def cases(device: torch.device) -> list[Case]:
    return [Case("least", layout, "fp32") for layout in ("nchw", "channels_last")]


def test_overhead(case: Case, mode: str, inputs: Inputs, device: torch.device, compare) -> None:
    modules = peers.batch_norms(case.size[1], "relu", device)
    del modules["compile"]
    compare(
        "bn_add_relu",
        case,
        {name: lambda data, m=m: differentiate(m, data) for name, m in modules.items()},
        make_data=lambda: inputs.clone().requiring_grad(),
        mode=mode,
    )
