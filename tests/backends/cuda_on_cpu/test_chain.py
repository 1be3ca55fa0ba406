"""Chains of convolutions and batch norms by ``bnkern.backends.cuda_conv``, with the kernels on the host.

Torch's convolution backward runs on the CPU here, and on CUDA devices by cuDNN.
"""

import copy
from collections.abc import Callable
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

import bnkern
import bnkern.nn.chain as fused
from bnkern import _native, backends
from bnkern.backends import cuda_conv, native
from bnkern.backends.calls import ForwardCall
from bnkern.nn import Chain, ChainLink, ConvBNAct, run_chain
from tests.backends.cuda_on_cpu.host import on_the_host
from tests.backends.cuda_on_cpu.sandbox import sandboxed
from tests.support.conv_norm import last

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def images(dtype: torch.dtype, *size: int) -> Tensor:
    return last(torch.randn(size, generator=torch.Generator().manual_seed(1)).to(dtype))


class Network(nn.Module):
    """Three convolutions. The second one has the first one's value as a residual, the third one another tensor."""

    def __init__(self, channels: int, momentum: float | None = 0.1) -> None:
        super().__init__()
        torch.manual_seed(0)
        acts = ("relu", "relu", None)
        self.parts = nn.ModuleList(ConvBNAct(channels, channels, act=act, momentum=momentum) for act in acts)
        for part in self.parts:
            part.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)  # without the CPU's own convolutions

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        residuals = (None, 1, other)
        return run_chain(x, [ChainLink(p.conv, p.norm, r) for p, r in zip(self.parts, residuals, strict=True)])


def is_fused(y: Tensor) -> bool:
    return type(y.grad_fn).__name__ == "_ChainBackward"


def results_of(model: nn.Module, x: Tensor, other: Tensor, kernels: object) -> dict[str, Tensor]:
    """Output, gradients, running statistics and counters after one step."""
    x, other = x.clone().requires_grad_(), other.clone().requires_grad_()
    with patch.object(fused, "kernels_for", lambda x: kernels):
        y = model(x, other)
    assert is_fused(y) is (kernels is not None)
    y.backward(last(torch.linspace(-1, 1, y.numel()).view(y.shape).to(y.dtype)))
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return gradients | {"y": y.detach(), "x": x.grad, "other": other.grad} | dict(model.named_buffers())


def check_training(dtype: torch.dtype, size: tuple[int, ...], momentum: float | None, wide_norms: bool) -> None:
    """Against float64, with the errors of the modules called one by one as a measure.

    Both round y, r and the gradients to the storage type at the same places. Sums are added in another order, so a few
    roundings fall to the other side, and ReLU's mask may differ where z is almost zero.
    """
    model = Network(size[1], momentum).to(dtype, memory_format=torch.channels_last)
    if wide_norms:
        for part in model.parts:
            part.norm.float()
    x, other = images(dtype, *size), images(dtype, *size).mul(0.5)
    truth = copy.deepcopy(model).double()
    one_by_one = results_of(copy.deepcopy(model), x, other, None)
    with bnkern.use_backend("reference"), patch.object(backends, "choose", lambda *_: backends.reference):
        expected = results_of(truth, x.double(), other.double(), None)
    actual = results_of(model, x, other, cuda_conv)
    assert actual.keys() == expected.keys()
    for name, t in actual.items():
        if t.dtype is torch.int64:
            assert t == 1, name
            continue
        assert t.dtype is one_by_one[name].dtype, name
        scale = expected[name].norm()
        error, usual = ((v.double() - expected[name]).norm() / scale for v in (t, one_by_one[name]))
        assert error <= 1.5 * usual + 2e-3, f"{name}: {error:.2e}, one by one {usual:.2e}"


@pytest.mark.parametrize("dtype", DTYPES)
@sandboxed
def test_training(dtype: str) -> None:
    """Modules in half precision, and those whose batch norms stay in float32; both kinds of momentum."""
    on_the_host(check_training, DTYPES[dtype], (3, 16, 8, 8), 0.1, False)
    on_the_host(check_training, DTYPES[dtype], (2, 32, 5, 7), None, True)


def check_autocast() -> None:
    """Weights that are already of autocast's dtype are not cast, so the kernels serve them."""
    model = Network(16).to(memory_format=torch.channels_last)
    x = images(torch.bfloat16, 2, 16, 4, 4)
    for serves in (False, True):
        if serves:
            for part in model.parts:
                part.conv.to(torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16), patch.object(fused, "kernels_for", lambda x: cuda_conv):
            y = model(x, x.clone())
        assert is_fused(y) is serves and y.dtype is torch.bfloat16


@sandboxed
def test_autocast() -> None:
    on_the_host(check_autocast)


NOT_SERVED: dict[str, Callable] = {
    "float32": lambda model, x: (model.float(), x.float()),
    "another dtype": lambda model, x: (model.float(), x),
    "contiguous": lambda model, x: (model, x.contiguous()),
    "too many values": lambda model, x: (model, last(x.repeat(1, 1, 9, 8)[:1])),
    "one value": lambda model, x: (model, last(x[:1, :, :1, :1])),
    "misaligned": lambda model, x: (model, misaligned(x)),
    "other channels": lambda model, x: (Chain(model, ConvBNAct(16, 32).to(x.dtype)), x),
    "eval mode": lambda model, x: (model.eval(), x),
    "a bias": lambda model, x: (_with_biases(model), x),
    "skipped batches": lambda model, x: (bnkern.nn.skip_nonfinite(model) or model, x),
}


def _with_biases(model: nn.Module) -> nn.Module:
    for part in model:
        part.conv = nn.Conv2d(16, 16, 3, padding=1, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    return model


def misaligned(x: Tensor) -> Tensor:
    storage = torch.empty(x.numel() + 1, dtype=x.dtype)
    return storage[1:].as_strided(x.shape, x.stride()).copy_(x)


def check_not_served(case: str) -> None:
    model = Chain(ConvBNAct(16, 16), ConvBNAct(16, 16)).to(torch.bfloat16, memory_format=torch.channels_last)
    model, x = NOT_SERVED[case](model, images(torch.bfloat16, 2, 16, 4, 4))
    lengths = []

    def chain(x: Tensor, links: list, kernels: object) -> Tensor:
        lengths.append(len(links))
        return x

    links = [ChainLink(m.conv, m.norm) for m in model.modules() if isinstance(m, ConvBNAct)]
    with patch.object(fused, "kernels_for", lambda x: cuda_conv), patch.object(fused, "chain", chain):
        fused.run_links(x, links, lambda k, value, residual: value)
    assert lengths == ([2] if case == "other channels" else [])
    cuda_conv.normalize(ForwardCall(x), None, None)  # so that something runs


@pytest.mark.parametrize("case", NOT_SERVED)
@sandboxed
def test_calls_that_are_not_served(case: str) -> None:
    on_the_host(check_not_served, case)


def check_errors() -> None:
    x, vector = images(torch.bfloat16, 2, 16, 4, 4), torch.ones(16)
    weight, call, norm = torch.zeros(16, 16, 3, 3, dtype=x.dtype), ForwardCall(x), ForwardCall(None)
    record = torch.empty(9, 16, dtype=torch.float64)
    for arguments, message in (
        ((call, None, None, True, weight, None, norm), "call must be"),
        (
            (call._replace(x=x.contiguous()), vector, vector, True, weight, None, norm),
            "x must be a call for bfloat16 or",
        ),
        (
            (call._replace(x=x.float()), vector, vector, True, weight, None, norm),
            "x must be a call for bfloat16 or float16",
        ),
        ((call._replace(x=misaligned(x)), vector, vector, True, weight, None, norm), "multiples of 16 bytes"),
        ((call._replace(x=x[:0]), vector, vector, True, weight, None, norm), "a tensor that is not empty"),
        ((call._replace(record=record), vector, vector, True, weight, None, norm), "without a record"),
        (
            (call, vector, vector, True, weight.float(), None, norm),
            "weight must be a tensor .* of its dtype and device",
        ),
        ((call, vector, vector, True, weight[:, :8], None, norm), "weight must be a tensor .* that fits x"),
        ((call, vector, vector, True, weight.repeat(2, 1, 1, 1), None, norm), "as many outputs as inputs"),
        ((call._replace(residual=x[:1]), vector, vector, True, weight, None, norm), "must be a call"),
        ((call, vector, vector, True, weight, None, norm._replace(running_mean=vector[:8])), "statistics must be"),
        ((call, vector, vector, True, weight, vector, norm), "bias must be None or"),
        (
            (call, vector, vector, True, weight, None, norm._replace(training=False)),
            "statistics must be in training, or",
        ),
        (
            (call, vector, vector, True, weight, None, norm._replace(record=record)),
            "statistics must be .* without a record",
        ),
    ):
        with pytest.raises(TypeError, match=message):
            native._native.conv_norm_forward(*arguments)
    large = images(torch.bfloat16, 1, 16, 34, 32)
    with pytest.raises(RuntimeError, match="images of at most 16384 values, got 17408"):
        native._native.conv_norm_forward(large, None, None, False, weight, None, norm)
    assert "at most 16384" in native._native.conv_norm_refusal(large)
    residual = misaligned(x)  # is copied
    y, *_ = cuda_conv.conv_norm_forward(call._replace(residual=residual), vector, vector, True, weight, None, norm)
    assert torch.equal(y, cuda_conv.normalize(call._replace(residual=residual.clone()), vector, vector)[0])


@sandboxed
def test_errors() -> None:
    on_the_host(check_errors)


@pytest.mark.skipif(_native.build_info()["cuda"] is None, reason="the module was built without CUDA")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the device of this test does not exist")
def test_the_switch() -> None:
    device = torch.device("cuda", 0)
    assert backends.chain_kernels(device, torch.bfloat16) is None
    with bnkern.use_cuda_chains():
        assert backends.chain_kernels(device, torch.bfloat16) is cuda_conv
        with bnkern.use_backend("reference"):
            assert backends.chain_kernels(device, torch.bfloat16) is None
        with bnkern.use_cuda_chains(False):
            assert backends.chain_kernels(device, torch.bfloat16) is None
    assert backends.chain_kernels(device, torch.bfloat16) is None
