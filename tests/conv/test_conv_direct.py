"""The CPU's convolution by its definition: strides, kernels of any size, few input channels, and input gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input

import bnkern
from bnkern.backends import cpu
from tests.support.cases import EPS32
from tests.support.threads import for_any_number_of_threads

# Images, channels in and out, rows, columns, kernel, stride, padding.
SIZES = [
    (3, 16, 32, 32, 32, (3, 3), (2, 2), (1, 1)),
    (3, 16, 32, 32, 32, (1, 1), (2, 2), (0, 0)),
    (2, 32, 64, 15, 17, (3, 3), (2, 2), (1, 1)),
    (2, 16, 16, 9, 9, (3, 3), (3, 3), (0, 0)),
    (1, 16, 16, 5, 200, (5, 5), (2, 2), (2, 2)),
    (2, 32, 32, 8, 8, (1, 1), (1, 1), (0, 0)),
    (2, 16, 48, 7, 7, (2, 2), (3, 3), (0, 0)),
    (2, 16, 16, 6, 11, (1, 3), (2, 1), (0, 1)),
    (1, 48, 16, 70, 90, (3, 3), (2, 2), (1, 1)),
    (1, 16, 16, 1, 1, (3, 3), (2, 2), (1, 1)),
    (2, 16, 16, 5, 4, (3, 3), (2, 2), (4, 3)),
]
FEW_INPUTS = [(2, 3, 16, 32, 32, (3, 3), (1, 1), (1, 1)), (2, 3, 64, 31, 30, (7, 7), (2, 2), (3, 3))]


def operands(n: int, inputs: int, outputs: int, h: int, w: int, kernel: tuple[int, int]) -> tuple[Tensor, Tensor]:
    torch.manual_seed(2)
    x = torch.randn(n, inputs, h, w).contiguous(memory_format=torch.channels_last)
    return x, torch.randn(outputs, inputs, *kernel)


@pytest.mark.parametrize("last", [True, False], ids=["channels_last_weight", "plain_weight"])
@pytest.mark.parametrize("sizes", SIZES + FEW_INPUTS, ids=str)
def test_convolution(sizes: tuple, last: bool) -> None:
    *shape, kernel, stride, padding = sizes
    x, weight = operands(*shape, kernel)
    placed = weight.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    y = for_any_number_of_threads(lambda: cpu.conv_direct(x, placed, stride, padding))
    options = {"stride": stride, "padding": padding}
    truth = F.conv2d(x.double(), weight.double(), **options)
    assert y.shape == truth.shape and y.is_contiguous(memory_format=torch.channels_last)
    # a chain of fma, one for each product
    largest = F.conv2d(x.double().abs(), weight.double().abs(), **options)
    assert ((y - truth).abs() <= weight[0].numel() * EPS32 * largest).all()


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_input_gradient(sizes: tuple) -> None:
    *shape, kernel, stride, padding = sizes
    x, weight = operands(*shape, kernel)
    y = F.conv2d(x, weight, stride=stride, padding=padding)
    dy = torch.randn(y.shape).contiguous(memory_format=torch.channels_last)
    dx = for_any_number_of_threads(lambda: cpu.conv_direct(dy, weight, stride, padding, tuple(x.shape[2:])))
    truth, largest = (
        conv2d_input(x.shape, w.double(), g.double(), stride, padding)
        for w, g in ((weight, dy), (weight.abs(), dy.abs()))
    )
    assert dx.is_contiguous(memory_format=torch.channels_last)
    assert ((dx - truth).abs() <= weight[:, 0].numel() * EPS32 * largest).all()


def test_wrong_arguments() -> None:
    x, weight = operands(2, 16, 16, 8, 8, (3, 3))
    for arguments, message in (
        ((x.contiguous(), weight, (2, 2), (1, 1)), "conv_direct: x must be a float32 tensor"),
        ((x, weight[:, :8], (2, 2), (1, 1)), "conv_direct: weight must be"),
        ((x, weight, 2, (1, 1)), "conv_direct: stride must be a pair of ints"),
        ((x, weight, (2, 2), (1, 1), (8, 8)), "conv_direct: size must be"),
        ((x, weight, (0, 2), (1, 1)), "conv_direct: stride must be at least 1"),
    ):
        with pytest.raises(TypeError, match=message):
            cpu.conv_direct(*arguments)
    with pytest.raises(ValueError, match="outputs must be a multiple of 16"):
        cpu.conv_direct(x, weight[:8], (2, 2), (1, 1))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("inputs", "kernel", "stride"), [(3, 3, 1), (16, 3, 2), (16, 1, 2), (16, 1, 1)], ids=["stem", "3x3", "1x1", "1x1s1"]
)
def test_layer(inputs: int, kernel: int, stride: int, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layer takes its kernels where the rule accepts them, and has torch's results."""
    monkeypatch.setattr(cpu._native, "isa", lambda: "avx512")
    calls = []
    direct = cpu.conv_direct
    monkeypatch.setattr(cpu, "conv_direct", lambda *args: calls.append(len(args)) or direct(*args))
    torch.manual_seed(3)
    ours = bnkern.nn.Conv2d(inputs, 32, kernel, stride, kernel // 2, bias=bias)
    theirs = torch.nn.Conv2d(inputs, 32, kernel, stride, kernel // 2, bias=bias)
    theirs.load_state_dict(ours.state_dict())
    results = []
    for module in (ours, theirs):
        x = torch.randn(4, inputs, 12, 12, generator=torch.Generator().manual_seed(4))
        x = x.contiguous(memory_format=torch.channels_last).requires_grad_(inputs > 3)
        y = module(x)
        y.backward(torch.linspace(-1, 1, y.numel()).view(y.shape).contiguous(memory_format=torch.channels_last))
        results.append([y.detach(), module.weight.grad, *([x.grad] if inputs > 3 else [])])
    for actual, expected in zip(*results, strict=True):  # chains of up to 288 products in different orders
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    assert calls == ([] if bias else [4]) + ([5] if inputs > 3 else [])
