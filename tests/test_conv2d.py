"""bnkern.nn.Conv2d: torch's convolution, its weight gradient from conv_grad_signs where that was measured to pay."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import bnkern
from bnkern import conv, probes


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
