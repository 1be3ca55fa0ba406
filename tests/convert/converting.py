"""A network into which the tests of conversion insert a form, and comparisons of models."""

import copy
import importlib
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnkern

C = 6
RELU, ADD, PLAIN, LEFT = "batch norm + ReLU", "batch norm + add + ReLU", "batch norm", "left alone"


def package(name: str) -> object:
    try:
        return importlib.import_module(name)
    except Exception as error:  # torchvision raises RuntimeError with a torch for which it was not built
        pytest.skip(f"{name} cannot be imported here: {type(error).__name__}: {error}")


def pytorchcv(family: str, name: str, **options: object) -> nn.Module:
    """Imports the module of the model directly, because the package's index of models imports torchvision."""
    model = getattr(package(f"pytorchcv.models.{family}"), name)(**options)
    model.features.final_pool = nn.AdaptiveAvgPool2d(1)  # replaces a pooling of 7x7, because inputs are small here
    return model


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """A module with random parameters and running statistics, also of batch norms."""
    torch.manual_seed(seed)
    module = make()
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if "running" in name or tensor.dim() == 1:
                tensor.copy_(torch.rand_like(tensor) + 0.5)
    return module


def image(*shape: int, seed: int = 1, **options: object) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape or (4, C, 8, 8), generator=generator).to(**options)


def run(model: nn.Module, *inputs: Tensor) -> dict[str, Tensor]:
    """The output, the gradients of inputs and parameters, and the buffers afterwards.

    Dropout uses the same seed each time.
    """
    inputs = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in inputs]
    model.zero_grad()
    torch.manual_seed(3)
    y = model(*[x * 1 for x in inputs])  # a forward that writes to its input must not write to a leaf
    y = y if isinstance(y, Tensor) else y[0]
    weights = torch.linspace(-1, 2, y.numel(), dtype=torch.float64).reshape(y.shape).to(y.dtype)
    (y * weights).sum().backward()
    results = {"output": y, **{f"input {k}": x.grad for k, x in enumerate(inputs)}}
    results |= {f"grad {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: t.detach().clone() for name, t in (results | dict(model.named_buffers())).items()}


def assert_same_model(before: nn.Module, after: nn.Module, *inputs: Tensor, floor: float = 2e-6) -> None:
    """Outputs, gradients and buffers of the converted model, in training and in eval mode, equal those of the original.

    In float64 they agree except for rounding: 1e-9 of a tensor's size, which is far above the 1e-16 of a hundred layers
    and far below any mistake. In the dtype of the model the error against float64 is at most twice torch's. Errors are
    root mean squares over a tensor. The floor applies where torch is nearly exact by chance: 2e-6 of the tensor's size
    (16 units in the last place of float32, which sums over a few hundred values explain), or of 1 if the exact result
    is zero, as for the bias gradient of a convolution before batch norm.

    Rarely a ReLU of a deep network gets a value within rounding of zero, so that its gradient is present or not. Then
    torch's gradients or ours are off by 1e-3. So a gradient that fails is tested again with two other inputs.
    """
    failed = _differences(before, after, inputs, floor)
    for seed in (11, 12):
        if failed:
            assert all("grad" in name or "input" in name for name in failed), failed
            others = [torch.empty_like(x).copy_(image(*x.shape, seed=seed)) for x in inputs]
            repeated = _differences(before, after, others, floor)
            failed = {name: failed[name] for name in failed.keys() & repeated.keys()}
    assert not failed, failed


def _differences(before: nn.Module, after: nn.Module, inputs: Sequence[Tensor], floor: float) -> dict[str, str]:
    exact, ours_exact = copy.deepcopy(before).double(), copy.deepcopy(after).double()
    ours_exact.load_state_dict(exact.state_dict())  # the running statistics may differ in float32 by now
    failed = {}
    for training in (True, False):
        doubles = [x.double() for x in inputs]
        truth, in_double = (run(m.train(training), *doubles) for m in (exact, ours_exact))
        theirs, ours = (run(m.train(training), *inputs) for m in (before, after))
        assert ours.keys() == theirs.keys() == truth.keys() == in_double.keys()
        for name, true in truth.items():
            assert ours[name].dtype == theirs[name].dtype and ours[name].stride() == theirs[name].stride(), name
            values = (in_double[name], ours[name], theirs[name])
            double, error, accepted = ((v.double() - true).square().mean().sqrt().item() for v in values)
            scale = true.double().square().mean().sqrt().clamp(min=1).item()
            assert double <= 1e-9 * scale, f"{name}, training={training}: {double} in float64"
            if not error <= 2 * accepted + floor * scale:
                failed[f"{name}, training={training}"] = f"error {error} against {accepted}"
    return failed


def outcomes(model: nn.Module) -> dict[str, str]:
    return {layer.name: layer.outcome for layer in bnkern.convert.summary(model)}


def unfused_reason(model: nn.Module) -> str:
    """The reason given for the only batch norm that was not fused."""
    (layer,) = (layer for layer in bnkern.convert.summary(model) if layer.outcome not in (RELU, ADD))
    return layer.why


def replaced(model: nn.Module) -> list[str]:
    """Names of the blocks whose forward was replaced."""
    return [name for name, m in model.named_modules() if "_recipe" in vars(m)]


class Net(nn.Module):
    """conv -> bn -> ``then(self, y, x)``, which the test supplies, with y from the batch norm and x the input."""

    def __init__(self, rest: Callable[["Net", Tensor, Tensor], Tensor] | None = None, **modules: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(C, C, 3, padding=1)
        self.bn = nn.BatchNorm2d(C)
        self.function = F.relu
        for name, module in modules.items():
            self.add_module(name, module)
        if rest is not None:
            type(self).rest = rest  # each Net of a test has its own class, see net()

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.bn(self.conv(x)), x)


def net(rest: Callable[[Net, Tensor, Tensor], Tensor], **modules: nn.Module) -> Net:
    return seeded(lambda: type("Net", (Net,), {})(rest, **modules))


def branch() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(C, C, 1), nn.BatchNorm2d(C))


class BasicBlock(nn.Module):
    """The form of torchvision and most others: one ReLU that is used twice, and ``out += identity``."""

    def __init__(self, downsample: bool = False, inplace: bool = True) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(C, C, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(C)
        self.relu = nn.ReLU(inplace=inplace)
        self.conv2 = nn.Conv2d(C, C, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(C)
        self.downsample = branch() if downsample else None

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


def basic_net() -> nn.Module:
    return seeded(
        lambda: nn.Sequential(
            nn.Conv2d(3, C, 3), nn.BatchNorm2d(C), nn.ReLU(True), BasicBlock(), BasicBlock(True, False), nn.AvgPool2d(2)
        )
    )


class FusedResidual(nn.Module):
    """The residual of the second fused pair is the result of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.b1, self.conv, self.b2 = nn.BatchNorm2d(C), nn.Conv2d(C, C, 3, padding=1), nn.BatchNorm2d(C)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.b1(x))
        z = self.b2(self.conv(y))
        return F.relu(z + y)
