"""The update of all parameters after a step: SGD with momentum and weight decay, on the parameters of a ResNet.

bnkern.train uses torch's fused kernel, which updates all parameters in one call. The eager forms are the other two of
torch.optim: operations on lists of tensors, and operations on one tensor at a time. The learning rate is 0, which takes
the same time and keeps the parameters.
"""

from collections.abc import Callable

import pytest
import torch

from benchmarks.cases.shapes import Case
from bnkern.train.resnet import ResNet

FORMS = {"bnkern": {"fused": True}, "eager foreach": {"foreach": True}, "eager one by one": {"foreach": False}}


@pytest.mark.parametrize("depth", [20, 110])
def test_optimizer(depth: int, mode: str, device: torch.device, compare: Callable) -> None:
    def optimizers() -> dict[str, torch.optim.SGD]:
        built = {}
        for name, form in FORMS.items():
            parameters = list(ResNet(depth).to(device).parameters())
            for parameter in parameters:
                parameter.grad = torch.randn_like(parameter)
            built[name] = torch.optim.SGD(parameters, lr=0.0, momentum=0.9, weight_decay=5e-4, **form)
        return built

    size = 4 * sum(parameter.numel() for parameter in ResNet(depth).parameters())
    compare(
        f"resnet{depth}",
        Case("images", "both", "fp32"),
        {name: lambda data, name=name: data[name].step() for name in FORMS},
        make_data=optimizers,
        mode=mode,
        # It reads the parameter, the gradient and the velocity, and writes the parameter and the velocity.
        moved=lambda name: {"bytes": 5 * size},
        nbytes=size,
    )
