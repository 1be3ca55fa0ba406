"""The host's part of a call on a GPU, measured without a GPU: forward and backward through autograd, without launches.

Everything else is done as on a GPU: the call is read and checked, torch's allocator (the CPU's) makes the results, the
kernels are planned, and the workspace of the stream is looked up. The times do not include launches and torch's caching
allocator for CUDA. The peer is torch's dispatch of batch norm, addition and ReLU on the CPU, with tensors so small that
the kernels take almost no time.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from unittest.mock import patch

import pytest
import torch

from benchmarks.cases import peers
from benchmarks.cases.norms import differentiate
from benchmarks.cases.shapes import Case, Inputs
from bnkern import backends
from bnkern.backends import cuda, native


def cases(device: torch.device) -> list[Case]:
    return [Case("least", layout, "fp32") for layout in ("nchw", "channels_last")]


@pytest.fixture(scope="module")
def without_launches() -> Iterator[None]:
    """The backend "cuda" for CPU tensors: csrc/call and csrc/cuda, compiled for the host."""
    harness = pytest.importorskip("tests.backends.cuda_on_cpu.native")
    lib, module = harness.kernels(optimized=True), harness.module(optimized=True)
    lib.leave_out_launches(True)
    lib.register_device(harness.CudaDevice(132, 227 << 10, 512, True), 0)
    module.connect(native)
    with ExitStack() as patches:
        patches.enter_context(patch.object(native, "_native", module))
        patches.enter_context(patch.object(backends, "choose", lambda name, device, dtype: cuda))
        yield


def test_host_time(case: Case, inputs: Inputs, device: torch.device, without_launches: None, compare: Callable) -> None:
    if device.type != "cpu":
        pytest.skip("this needs tensors on the CPU; bench_overhead.py measures the same with launches")
    modules = peers.batch_norms(case.size[1], "relu", device)
    compare(
        "bn_add_relu",
        case,
        {name: lambda data, m=modules[name]: differentiate(m, data) for name in ("bnkern", "eager")},
        make_data=lambda: inputs.clone().requiring_grad(),
    )
