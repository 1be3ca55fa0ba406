"""The forward of a convolution with its batch norm, on a GPU: bf16, channels_last, batch 128, in a CUDA graph.

"bnkern" is the kernel of ``conv_norm_forward``, which normalises its input and computes the statistics of its output.
The peers are cuDNN's convolution and a batch norm with ReLU behind it, ours and torch's. Both read and write as much
per layer of a network: a chain only has its batch norm before the convolution.

Exit rule: the kernel is dropped if in its first run on hardware the forward of stage 1 takes more than half of the time
of cuDNN's convolution and our batch norm (``benchmarks/gpu/targets.py``).
"""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases.shapes import Case
from bnkern import backends
from bnkern.backends import cuda_conv
from bnkern.backends.calls import ForwardCall

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or backends.unavailable("cuda", "cuda") is not None,
    reason="there is no CUDA device, or the module was built without CUDA",
)


def cases(device: torch.device) -> list[Case]:
    return [Case(name, "channels_last", "bf16") for name in ("stage1", "stage2", "stage3")]


class Layer(NamedTuple):
    x: Tensor
    weight: Tensor
    scale: Tensor
    bias: Tensor
    mean: Tensor
    invstd: Tensor
    running_mean: Tensor
    running_var: Tensor


def make(case: Case, device: torch.device) -> Layer:
    x, channels = case.activations(device), case.size[1]
    weight = torch.randn(channels, channels, 3, 3, device=device, dtype=x.dtype) / (3 * channels**0.5)
    vectors = [torch.full((channels,), value, device=device) for value in (1.0, 0.0, 0.0, 1.0, 0.0, 1.0)]
    return Layer(x, weight.contiguous(memory_format=torch.channels_last), *vectors)


def fused(layer: Layer) -> Tensor:
    source = ForwardCall(layer.x, layer.scale, layer.bias, act="relu")
    norm = ForwardCall(None, running_mean=layer.running_mean, running_var=layer.running_var)  # type: ignore[arg-type]
    return cuda_conv.conv_norm_forward(source, layer.mean, layer.invstd, False, layer.weight, None, norm)[2]


def cudnn_and_ours(layer: Layer) -> Tensor:
    r = F.conv2d(layer.x, layer.weight, padding=1)
    call = ForwardCall(r, layer.scale, layer.bias, None, layer.running_mean, layer.running_var, act="relu")
    return backends.choose("", r.device, r.dtype).forward(call)[0]


def cudnn_and_torch(layer: Layer) -> Tensor:
    r = F.conv2d(layer.x, layer.weight, padding=1)
    return F.batch_norm(r, layer.running_mean, layer.running_var, layer.scale, layer.bias, training=True).relu_()


def test_conv_norm(case: Case, device: torch.device, mode: str, compare: Callable) -> None:
    if mode != "graph":
        pytest.skip("called one by one, the host's time would be measured")
    backends.choose("", device, torch.bfloat16)  # introduces the device
    with torch.backends.cudnn.flags(benchmark=True, allow_tf32=False):
        compare(
            "forward",
            case,
            {"bnkern": fused, "cudnn and bnkern": cudnn_and_ours, "cudnn and torch": cudnn_and_torch},
            make_data=lambda: make(case, device),
            mode=mode,
            budget_s=0.5,
        )
