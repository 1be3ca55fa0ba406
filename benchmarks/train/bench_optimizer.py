"""The update of all parameters after a step: SGD with momentum and weight decay, on the parameters of a ResNet.

bnkern.train keeps the parameters before the update too, and updates nothing after a divergence. Its kernel does both.
"eager fused, kept" does the same with torch's fused kernel and a copy of all parameters. The other eager forms keep
nothing: torch's fused kernel, operations on lists of tensors, and operations on one tensor at a time. The learning rate
is 0, which takes the same time and keeps the parameters.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from benchmarks.cases.shapes import Case
from bnkern.train.resnet import ResNet
from bnkern.train.sgd import Sgd

MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4
FORMS = {
    "eager fused": {"fused": True},
    "eager foreach": {"foreach": True},
    "eager one by one": {"foreach": False},
}


def network(depth: int, device: torch.device) -> nn.Module:
    built = ResNet(depth).to(device, memory_format=torch.channels_last)
    for parameter in built.parameters():
        parameter.grad = torch.randn_like(parameter)
    return built


def with_bnkern(depth: int, device: torch.device) -> Callable[[], None]:
    update = Sgd(network(depth, device), MOMENTUM, WEIGHT_DECAY)
    lr, stop = torch.zeros((), device=device), torch.zeros((), device=device)
    return lambda: update(lr, stop)


def with_torch(depth: int, device: torch.device, **form: bool) -> Callable[[], None]:
    parameters = list(network(depth, device).parameters())
    return torch.optim.SGD(parameters, lr=0.0, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, **form).step


def fused_and_kept(depth: int, device: torch.device) -> Callable[[], None]:
    parameters = list(network(depth, device).parameters())
    gradients = [parameter.grad for parameter in parameters]
    velocity = [torch.zeros_like(parameter) for parameter in parameters]
    lr, stop = torch.zeros((), device=device), torch.zeros((), device=device)

    def flat() -> Tensor:
        return torch.cat([parameter.flatten() for parameter in parameters])

    settings = {"momentum": MOMENTUM, "weight_decay": WEIGHT_DECAY, "dampening": 0.0, "nesterov": False}
    with torch.no_grad():
        before = flat()

    @torch.no_grad()
    def update() -> None:
        torch.where(stop > 0, before, flat(), out=before)
        torch._fused_sgd_(
            parameters, gradients, velocity, lr=lr, maximize=False, is_first_step=False, found_inf=stop, **settings
        )

    return update


@pytest.mark.parametrize("depth", [20, 110])
def test_optimizer(depth: int, mode: str, device: torch.device, compare: Callable) -> None:
    def updates() -> dict[str, Callable[[], None]]:
        forms = {name: with_torch(depth, device, **form) for name, form in FORMS.items()}
        return {"bnkern": with_bnkern(depth, device), "eager fused, kept": fused_and_kept(depth, device)} | forms

    size = 4 * sum(parameter.numel() for parameter in ResNet(depth).parameters())
    compare(
        f"resnet{depth}",
        Case("images", "both", "fp32"),
        {name: lambda data, name=name: data[name]() for name in updates()},
        make_data=updates,
        mode=mode,
        # Each form reads the parameter, the gradient and the velocity, and writes the parameter and the velocity. The
        # first two also write the parameters before the update.
        moved=lambda name: {"bytes": (6 if name in ("bnkern", "eager fused, kept") else 5) * size},
        nbytes=size,
    )
