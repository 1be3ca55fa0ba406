"""``bnkern.convert(model, fuse_conv=True)``: convolutions joined to the batch norms beside them."""

import copy
import pickle
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnkern
from bnkern.backends import cpu


@pytest.fixture(autouse=True)
def any_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rules require vector instructions, but the kernels run on every machine."""
    monkeypatch.setattr(cpu._native, "isa", lambda: "avx512")


class BasicBlock(nn.Module):
    """torchvision's."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride > 1:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Bottleneck(nn.Module):
    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, channels, 1, bias=False), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(x + self.bn3(self.conv3(y)))


class TwoOutputs(nn.Module):
    """The value between the convolutions is returned too, and the second convolution has a bias."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(16, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = nn.Conv2d(16, 16, 3, 1, 1, bias=bias), nn.BatchNorm2d(16)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return y + self.bn2(self.conv2(y)).sigmoid()


def vgg(*channels: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(channels):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.MaxPool2d(2))


CHAIN, ADDED = "convolution + batch norm + ReLU", "convolution + batch norm + add + ReLU"
MODELS = {
    "basic block": (lambda: BasicBlock(16, 16), 1, {"bn1": CHAIN, "bn2": ADDED}),
    "downsampling": (
        lambda: BasicBlock(16, 32, 2),
        1,
        {"bn1": "batch norm + ReLU", "bn2": ADDED, "downsample.1": "batch norm"},
    ),
    "bottleneck": (
        lambda: Bottleneck(16, 32),
        1,
        {"bn1": "batch norm + ReLU", "bn2": CHAIN, "bn3": "batch norm + add + ReLU"},
    ),
    "vgg": (lambda: vgg(16, 32, 32, 16), 1, {"1": CHAIN, "4": CHAIN, "7": CHAIN}),
    "two outputs": (lambda: TwoOutputs(False), 2, {"bn1": CHAIN, "bn2": "convolution + batch norm"}),
    "with a bias": (lambda: TwoOutputs(True), 2, {"bn1": CHAIN, "bn2": "convolution + batch norm"}),
}


def images(n: int = 8) -> Tensor:
    x = torch.randn(n, 16, 32, 32, generator=torch.Generator().manual_seed(1))
    return x.contiguous(memory_format=torch.channels_last)


def run(model: nn.Module, x: Tensor) -> tuple[list[Tensor], int]:
    """Output, gradients and buffers, and the number of chains."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = model(x)
    seen, functions = set(), [y.grad_fn]
    while functions:
        function = functions.pop()
        if function is not None and function not in seen:
            seen.add(function)
            functions += [f for f, _ in function.next_functions]
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    y.backward(dy.to(y.dtype).contiguous(memory_format=torch.channels_last))
    # the gradient of a bias before a batch norm is zero up to rounding
    gradients = [p.grad for name, p in model.named_parameters() if name != "conv2.bias"]
    tensors = [y.detach(), x.grad, *gradients, *model.buffers()]
    results = [t.clone() for t in tensors]
    return results, sum(type(f).__name__ == "_ChainBackward" for f in seen)


@pytest.mark.parametrize("name", MODELS)
def test_models(name: str) -> None:
    build, chains, outcomes = MODELS[name]
    torch.manual_seed(0)
    theirs = build().to(memory_format=torch.channels_last)
    ours = bnkern.convert(copy.deepcopy(theirs), fuse_conv=True)
    assert {layer.name: layer.outcome for layer in bnkern.convert.summary(ours)} == outcomes
    results, found = run(ours, images())
    assert found == chains
    for actual, expected in zip(results, run(theirs, images())[0], strict=True):
        error = (actual.double() - expected.double()).abs().max()
        assert error <= 5e-5 * expected.double().abs().max()  # no value is so near zero that a mask differs
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    copied = pickle.loads(pickle.dumps(ours))
    for actual, expected in zip(run(copied, images())[0], run(ours, images())[0], strict=True):
        assert actual.shape == expected.shape
    ours.eval(), theirs.eval()
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(images()), theirs(images()), rtol=1e-5, atol=1e-5)
    reverted = bnkern.revert(ours)
    assert type(reverted) is type(theirs) and not any(type(m) is bnkern.nn.BatchNorm2d for m in reverted.modules())
    assert torch.equal(reverted(images()), theirs(images()))


def test_the_summary_says_why_a_norm_is_in_no_chain() -> None:
    def why(model: nn.Module) -> dict[str, str]:
        return {layer.name: layer.why for layer in bnkern.convert.summary(bnkern.convert(model, fuse_conv=True))}

    assert why(BasicBlock(16, 32, 2)) == {
        "bn1": "the convolution has stride 2",
        "bn2": "",
        "downsample.1": "iadd follows; the convolution is 1 x 1",
    }
    assert why(vgg(3, 16, 24)) == {
        "1": "3 to 16 channels are not multiples of 16",
        "4": "16 to 24 channels are not multiples of 16",
    }
    assert why(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(16), nn.ReLU())) == {
        "1": "it does not follow a Conv2d in the same forward"
    }
    grouped = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, groups=2), nn.BatchNorm2d(16), nn.ReLU())
    assert "groups" in why(grouped)["1"]
    model = bnkern.convert(bnkern.convert(vgg(3, 16), fuse_conv=True))
    assert [layer.why for layer in bnkern.convert.summary(model)] == [""]  # convolutions were not to be fused


def test_calls_that_the_kernels_do_not_serve() -> None:
    """These modules are called: those with hooks, and all in other dtypes."""
    torch.manual_seed(0)
    theirs = BasicBlock(16, 16).to(memory_format=torch.channels_last)
    ours = bnkern.convert(copy.deepcopy(theirs), fuse_conv=True)
    seen = []
    handle = ours.conv2.register_forward_hook(lambda module, args, y: seen.append(args[0]))
    results, chains = run(ours, images())
    expected = run(theirs, images())[0]
    assert chains == 1 and len(seen) == 1 and seen[0].min() == 0  # the first convolution and its norm
    handle.remove()
    assert run(ours, images())[1] == 1
    for actual, other in zip(results, expected, strict=True):
        torch.testing.assert_close(actual, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))
    ours, theirs = ours.double(), theirs.double()
    assert run(ours, images().double())[1] == 0
    graph = torch.fx.symbolic_trace(ours)
    assert {"conv1", "conv2"} <= {node.target for node in graph.graph.nodes}
    torch.compile(ours.float(), backend="aot_eager", fullgraph=True)(images()).sum().backward()


def test_a_shared_convolution_and_a_changed_module() -> None:
    torch.manual_seed(0)
    model = bnkern.convert(BasicBlock(16, 16).to(memory_format=torch.channels_last), fuse_conv=True)
    model.conv2 = model.conv1
    assert run(model, images())[1] == 1
    model.conv2 = nn.Conv2d(16, 16, 1, bias=False).to(memory_format=torch.channels_last)
    y = model(images())
    assert run(model, images())[1] == 1 and y.shape == (8, 16, 32, 32)


def test_arguments() -> None:
    with pytest.raises(ValueError, match="fuse_conv=True requires fuse=True"):
        bnkern.convert(BasicBlock(16, 16), fuse=False, fuse_conv=True)
    model = bnkern.convert(bnkern.convert(BasicBlock(16, 16), fuse_conv=True))
    assert [layer.outcome for layer in bnkern.convert.summary(model)] == [
        "batch norm + ReLU",
        "batch norm + add + ReLU",
    ]
