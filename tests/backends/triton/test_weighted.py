"""The kernels with sample_weight, compiled without a GPU: none spills, and enough programs are resident."""

import pytest
import torch

from bnkern.backends.calls import BackwardCall, ForwardCall

triton = pytest.importorskip("triton")
resources = pytest.importorskip("tests.backends.triton.resources")

if resources.backend.refuses(torch.device("cpu"), torch.float32) is None:
    pytest.skip("TRITON_INTERPRET is set, so no kernel is compiled", allow_module_level=True)


@pytest.mark.parametrize(("architecture", "precision"), [(80, "bf16"), (90, "bf16"), (90, "fp32"), (100, "fp64")])
@pytest.mark.parametrize("addressing", ["planes", "planes_odd", "rows_16", "rows_odd"])
def test_weighted_kernels(addressing: str, precision: str, architecture: int) -> None:
    (shape, memory_format), (dtype, params) = resources.ADDRESSINGS[addressing], resources.DTYPES[precision]
    x = torch.empty(shape, dtype=dtype).contiguous(memory_format=memory_format)
    vector = torch.empty(shape[1], dtype=params)
    weights = torch.empty(x[:, 0].numel(), dtype=torch.float64 if dtype is torch.float64 else torch.float32)
    with resources.launches() as launched:
        y, mean, invstd, _ = resources.backend.forward(ForwardCall(x, vector, vector, sample_weight=weights))
        resources.backend.backward(BackwardCall(y, x, vector, vector, mean, invstd, sample_weight=weights))
    weighted = [v for v in launched if "weights_ptr" in v.signature or v.constants.get("WEIGHTED")]
    names = {v.kernel.fn.__name__ for v in weighted}
    assert names == {"moments_kernel", "statistics_kernel", "grad_input_kernel"}
    for variant in weighted:
        usage = resources.compile_for(variant, architecture)
        assert usage.spilled == 0 and usage.resident >= 2, variant.kernel.fn.__name__
