"""bnkern.nn.Conv2d: torch's convolution, with the weight gradient of conv_grad_signs where measurements show a gain."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import bnkern
from bnkern import probes
from bnkern.backends import cpu
from bnkern.conv import layer


@pytest.fixture(autouse=True)
def on_every_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule requires AVX-512, but the kernel runs on every machine."""
    monkeypatch.setattr(cpu._native, "isa", lambda: "avx512")


def pair(inputs: int = 16, outputs: int = 8, **options: object) -> tuple[torch.nn.Module, torch.nn.Module]:
    """bnkern's and torch's convolution with the same parameters."""
    torch.manual_seed(0)
    ours = bnkern.nn.Conv2d(inputs, outputs, **({"kernel_size": 3, "padding": 1} | options))
    theirs = torch.nn.Conv2d(inputs, outputs, **({"kernel_size": 3, "padding": 1} | options))
    theirs.load_state_dict(ours.state_dict())
    last = torch.channels_last
    return ours.to(memory_format=last), theirs.to(memory_format=last)


def images(channels: int = 16) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(4, channels, 9, 9).relu().contiguous(memory_format=torch.channels_last)


def many_images(channels: int) -> Tensor:
    """With enough tiles for Winograd's form."""
    torch.manual_seed(1)
    return torch.randn(11, channels, 9, 9).relu().contiguous(memory_format=torch.channels_last)


def takes_over(y: Tensor) -> bool:
    return type(y.grad_fn).__name__ == "_Conv2dBackward"


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("stride", [1, 2])
def test_gradients_are_torchs(stride: int, bias: bool) -> None:
    ours, theirs = pair(stride=stride, bias=bias)
    x, y = images().requires_grad_(), images().requires_grad_()
    out, expected = ours(x), theirs(y)
    assert takes_over(out) and torch.equal(out, expected)
    out.square().sum().backward()
    expected.square().sum().backward()
    assert torch.equal(x.grad, y.grad)
    assert not bias or torch.equal(ours.bias.grad, theirs.bias.grad)
    # sums of up to 324 products in different orders
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, rtol=1e-5, atol=1e-5 * float(y.grad.abs().max()))
    assert ours.weight.grad.stride() == ours.weight.stride()


def test_probing_keeps_the_gradients_bits_and_computes_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, _ = pair()
    probed = copy.deepcopy(plain)
    calls = []
    kernel = bnkern.conv2d_grad_signs
    counted = lambda *args, **kwargs: calls.append(kwargs["wanted"]) or kernel(*args, **kwargs)  # noqa: E731
    monkeypatch.setattr(bnkern, "conv2d_grad_signs", counted)
    monkeypatch.setattr(layer, "conv2d_grad_signs", counted)
    plain(images()).square().sum().backward()
    assert calls == [("sum",)]
    quantity = probes.make("weight_gradient_signs", sums=["abs_sum", "nonzero"])
    with probes.record(probed, [quantity], out=tmp_path) as rec:
        probed(images()).square().sum().backward()
        rec.step()
    assert len(calls) == 2 and set(calls[1]) == {"sum", "abs_sum", "nonzero"}, (
        "one kernel computes the probe and the gradient"
    )
    assert torch.equal(plain.weight.grad, probed.weight.grad)
    assert np.isfinite(probes.load(tmp_path)["weight_gradient_signs"][""]["abs_sum"]).all()


def test_a_gradient_changed_by_a_later_hook_is_computed_again(tmp_path: Path) -> None:
    """A hook after the probe's replaces the gradient. The convolution computes its own gradient from the new one."""
    plain, _ = pair()
    probed = copy.deepcopy(plain)
    with probes.record(probed, ["weight_gradient_signs"], out=tmp_path) as rec:
        for module in (plain, probed):
            y = module(images())
            y.register_hook(lambda dy: 2 * dy)
            y.square().sum().backward()
        rec.step()
    assert torch.equal(plain.weight.grad, probed.weight.grad)


@pytest.mark.parametrize(
    "case",
    [
        "nchw",
        "float64",
        "bfloat16",
        "three channels",
        "groups",
        "dilation",
        "same",
        "circular",
    ],
)
def test_other_convolutions_are_torchs(case: str) -> None:
    options = {
        "groups": {"groups": 2},
        "dilation": {"dilation": 2},
        "same": {"padding": "same"},
        "circular": {"padding_mode": "circular"},
    }.get(case, {})
    inputs = 3 if case == "three channels" else 16
    ours, theirs = pair(inputs, **options)
    x = images(inputs)
    if case in ("float64", "bfloat16"):
        ours, theirs, x = (t.to(getattr(torch, case)) for t in (ours, theirs, x))
    if case == "nchw":
        x = x.contiguous()
    y = ours(x)
    assert not takes_over(y) and torch.equal(y, theirs(x))


def test_without_gradients() -> None:
    """Inference, and a frozen weight: the output has the bits of training."""
    ours, _ = pair()
    x = images()
    y = ours(x)
    assert takes_over(y)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            found = ours(x)
        assert not found.requires_grad and torch.equal(found, y)
    ours.weight.requires_grad_(False)
    x.requires_grad_()
    found = ours(x)
    assert takes_over(found) and torch.equal(found, y)
    (dx,) = torch.autograd.grad(found.square().sum(), x)
    ours.weight.requires_grad_(True)
    assert torch.equal(dx, torch.autograd.grad(ours(x).square().sum(), x)[0])


def test_double_backward_and_autocast() -> None:
    ours, theirs = pair(16, 4)
    second = []
    for module in (ours, theirs):
        x = images().requires_grad_()
        (first,) = torch.autograd.grad(module(x).square().sum(), module.weight, create_graph=True)
        second.append(torch.autograd.grad(first.square().sum(), x)[0])
    torch.testing.assert_close(*second, rtol=1e-4, atol=1e-3)  # sums of some thousand products of size ten
    with torch.autocast("cpu", torch.bfloat16):
        y = ours(images())
    assert y.dtype is torch.bfloat16 and not takes_over(y)


def test_state_dict_and_compile() -> None:
    ours, theirs = pair()
    assert isinstance(ours, torch.nn.Conv2d) and ours.state_dict().keys() == theirs.state_dict().keys()
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    compiled(images()).square().sum().backward()
    theirs(images()).square().sum().backward()
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_layer_by_winograd(stride: int, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The output and both gradients, also for a gradient in another memory format."""
    calls = []
    convolve, sums = cpu.conv3x3, cpu.conv_grad_signs
    monkeypatch.setattr(cpu, "conv3x3", lambda *args: calls.append(("conv3x3", *args[2:])) or convolve(*args))
    monkeypatch.setattr(
        cpu, "conv_grad_signs", lambda *args, **options: calls.append(("gradient", options)) or sums(*args, **options)
    )
    ours, theirs = pair(32, 32, bias=bias, stride=stride)
    x = many_images(32)
    for dy_format in (torch.channels_last, torch.contiguous_format):
        results = []
        for module in (ours, theirs):
            module.zero_grad()
            leaf = x.clone().requires_grad_()
            y = module(leaf)
            y.backward(torch.linspace(-1, 1, y.numel()).view(y.shape).contiguous(memory_format=dy_format))
            results.append((y.detach(), leaf.grad, module.weight.grad))
        for actual, expected in zip(*results, strict=True):  # chains of hundreds of products in different orders
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    forward, flipped = ("conv3x3", False), ("conv3x3", True)
    gradient, direct = ("gradient", {"winograd": True}), ("gradient", {})
    if stride == 2:
        assert calls == [direct, direct]
    elif bias:
        assert calls == [gradient, direct]
    else:  # torch, and the kernel for any layout, process a dy in another format
        assert calls == [forward, flipped, gradient, forward, direct]


@pytest.mark.parametrize("case", ["few", "wide", "24 outputs", "1x1", "padding 0", "generic"])
def test_convolutions_without_winograd(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, outputs, kernel, padding = many_images(16), 16, 3, 1
    served = lambda: cpu.prefers_winograd(x, outputs, (kernel, kernel), (1, 1), (padding, padding))  # noqa: E731
    assert served()
    match case:
        case "few":
            x = images(16)
        case "wide":
            x, outputs = torch.empty(11, 512, 9, 9), 512
        case "24 outputs":
            outputs = 24
        case "1x1":
            kernel, padding = 1, 0
        case "padding 0":
            padding = 0
        case "generic":
            monkeypatch.setattr(cpu._native, "isa", lambda: "generic")
    assert not served()


def test_avx2_takes_over_only_for_winograd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu._native, "isa", lambda: "avx2")
    ours, _ = pair(16, 16)
    assert takes_over(ours(many_images(16))) and not takes_over(ours(images(16)))


def test_probing_a_layer_by_winograd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient has the same bits and is computed once.

    Sums come from the same kernel; signs and counts are exact.
    """
    plain, _ = pair(16, 16, bias=False)
    probed, exact = copy.deepcopy(plain), copy.deepcopy(plain)
    x = many_images(16)
    plain(x).square().sum().backward()
    calls = []
    kernel = cpu.conv_grad_signs
    monkeypatch.setattr(
        cpu, "conv_grad_signs", lambda *args, **options: calls.append((args[5], options)) or kernel(*args, **options)
    )
    with probes.record(probed, ["weight_gradient_signs"], out=tmp_path) as rec:
        y = probed(x)
        y.square().sum().backward()
        rec.step()
    assert calls == [((True, True, True, True), {"winograd": True})]
    assert torch.equal(plain.weight.grad, probed.weight.grad)
    result = probes.load(tmp_path)["weight_gradient_signs"][""]
    expected = bnkern.conv2d_grad_signs(x, 2 * y.detach(), 3, 1, 1)
    for name in ("sign_sum", "nonzero"):
        np.testing.assert_array_equal(result[name][0], getattr(expected, name))
    for name in ("sum", "abs_sum"):
        np.testing.assert_allclose(
            result[name][0], getattr(expected, name), rtol=1e-5, atol=1e-6 * expected.abs_sum.max()
        )
    with bnkern.use_backend("reference"):
        exact(x).square().sum().backward()
    assert len(calls) == 2, "a forced backend takes precedence"
    torch.testing.assert_close(
        exact.weight.grad, plain.weight.grad, rtol=1e-4, atol=1e-4 * float(plain.weight.grad.max())
    )
