"""bnkern.nn.Conv2d: torch's convolution, its weight gradient from conv_grad_signs where that was measured to pay."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import bnkern
from bnkern import conv, probes
from bnkern.backends import cpu


@pytest.fixture(autouse=True)
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table says AVX-512; the kernel itself runs on any machine."""
    monkeypatch.setattr(conv, "_has_avx512", lambda: True)


def pair(inputs: int = 16, outputs: int = 8, **options: object) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Ours and torch's with the same parameters."""
    torch.manual_seed(0)
    ours = bnkern.nn.Conv2d(inputs, outputs, **({"kernel_size": 3, "padding": 1} | options))
    theirs = torch.nn.Conv2d(inputs, outputs, **({"kernel_size": 3, "padding": 1} | options))
    theirs.load_state_dict(ours.state_dict())
    last = torch.channels_last
    return ours.to(memory_format=last), theirs.to(memory_format=last)


def images(channels: int = 16) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(4, channels, 9, 9).relu().contiguous(memory_format=torch.channels_last)


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
    # sums of up to 324 products, each way in another order
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, rtol=1e-5, atol=1e-5 * float(y.grad.abs().max()))
    assert ours.weight.grad.stride() == ours.weight.stride()


def test_probing_keeps_the_gradients_bits_and_forms_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, _ = pair()
    probed = copy.deepcopy(plain)
    calls = []
    kernel = bnkern.conv2d_grad_signs
    counted = lambda *args, **kwargs: calls.append(kwargs["wanted"]) or kernel(*args, **kwargs)  # noqa: E731
    monkeypatch.setattr(bnkern, "conv2d_grad_signs", counted)
    monkeypatch.setattr(conv, "conv2d_grad_signs", counted)
    plain(images()).square().sum().backward()
    assert calls == [("sum",)]
    quantity = probes.make("weight_gradient_signs", sums=["abs_sum", "nonzero"])
    with probes.record(probed, [quantity], out=tmp_path) as rec:
        probed(images()).square().sum().backward()
        rec.step()
    assert len(calls) == 2 and set(calls[1]) == {"sum", "abs_sum", "nonzero"}, "one kernel for probe and gradient"
    assert torch.equal(plain.weight.grad, probed.weight.grad)
    assert np.isfinite(probes.load(tmp_path)["weight_gradient_signs"][""]["abs_sum"]).all()


def test_a_gradient_changed_on_its_way_is_not_taken_for_the_one_that_was_probed(tmp_path: Path) -> None:
    """A hook that comes after the probe's replaces the gradient: the convolution's own is formed from the new one."""
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
        "1x1",
        "groups",
        "dilation",
        "same",
        "circular",
        "no grad",
        "frozen",
    ],
)
def test_elsewhere_it_is_torchs_convolution(case: str) -> None:
    options = {
        "1x1": {"kernel_size": 1, "padding": 0},
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
    if case == "frozen":
        ours.weight.requires_grad_(False)
    with torch.set_grad_enabled(case != "no grad"):
        y = ours(x)
    assert not takes_over(y) and torch.equal(y, theirs(x))


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


# Channels in and out, rows and columns: 32 outputs at a time and 16, several groups of them, a single row.
DIRECT = [(16, 16, 4, 32), (16, 64, 3, 8), (32, 32, 5, 16), (32, 48, 2, 16), (64, 64, 8, 8), (64, 16, 1, 16)]


def direct_operands(inputs: int, outputs: int, h: int, w: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(2)
    x, weight = torch.randn(3, inputs, h, w), torch.randn(outputs, inputs, 3, 3)
    return x.contiguous(memory_format=torch.channels_last), weight


@pytest.mark.parametrize("last", [True, False], ids=["channels_last_weight", "plain_weight"])
@pytest.mark.parametrize("flipped", [False, True], ids=["forward", "input_gradient"])
@pytest.mark.parametrize("sizes", DIRECT, ids=str)
def test_the_direct_convolution(sizes: tuple[int, ...], flipped: bool, last: bool) -> None:
    x, weight = direct_operands(*sizes)
    if flipped:  # the weight of the convolution whose output's gradient is x
        weight = weight.transpose(0, 1)
    conv2d = torch.nn.functional.conv_transpose2d if flipped else torch.nn.functional.conv2d
    truth = conv2d(x.double(), weight.double(), padding=1)
    terms = conv2d(x.double().abs(), weight.double().abs(), padding=1)
    weight = weight.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    found, threads = [], torch.get_num_threads()
    for torch_threads in (1, 2, 3, threads):
        torch.set_num_threads(torch_threads)
        found.append(cpu.conv3x3(x, weight, flipped))
    assert found[0].is_contiguous(memory_format=torch.channels_last) and found[0].shape == truth.shape
    # A chain of 9 I fma rounds as often.
    assert ((found[0] - truth).abs() <= 9 * sizes[0] * 2.0**-24 * terms).all()
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("sizes", [(48, 32, 8, 8), (16, 24, 8, 16), (16, 16, 8, 8), (32, 32, 8, 12)], ids=str)
def test_sizes_that_the_direct_convolution_leaves_to_torch(sizes: tuple[int, ...]) -> None:
    assert cpu.conv3x3(*direct_operands(*sizes)) is None


@pytest.mark.parametrize("stride", [1, 2])
def test_a_layer_of_the_direct_convolution(stride: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Output and both gradients, with a gradient that arrives in another memory format too."""
    calls = []
    kernel = cpu.conv3x3
    monkeypatch.setattr(cpu, "conv3x3", lambda *args: calls.append(args[2:]) or kernel(*args))
    ours, theirs = pair(32, 32, bias=False, stride=stride)
    x, _ = direct_operands(32, 32, 8, 16)
    for dy_format in (torch.channels_last, torch.contiguous_format):
        results = []
        for module in (ours, theirs):
            module.zero_grad()
            leaf = x.clone().requires_grad_()
            y = module(leaf)
            y.backward(torch.linspace(-1, 1, y.numel()).view(y.shape).contiguous(memory_format=dy_format))
            results.append((y.detach(), leaf.grad, module.weight.grad))
        for one, other in zip(*results, strict=True):  # chains of 288 and 384 products, each way in another order
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * float(other.abs().max()))
    assert calls == ([(False,), (True,), (False,)] if stride == 1 else [])
