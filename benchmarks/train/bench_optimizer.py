"""The update of all parameters after a step: SGD with momentum and weight decay, on the parameters of a ResNet.

bnkern.train updates by torch's fused kernel, which takes all parameters in one call; the eager forms are torch.optim's
other two, an operation at a time on lists of tensors and on one tensor after the other. The learning rate is 0: the
same work, and the parameters stay.
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
        found = {}
        for name, form in FORMS.items():
            parameters = list(ResNet(depth).to(device).parameters())
            for parameter in parameters:
                parameter.grad = torch.randn_like(parameter)
            found[name] = torch.optim.SGD(parameters, lr=0.0, momentum=0.9, weight_decay=5e-4, **form)
        return found

    size = 4 * sum(parameter.numel() for parameter in ResNet(depth).parameters())
    compare(
        f"resnet{depth}",
        Case("images", "both", "fp32"),
        {name: lambda data, name=name: data[name].step() for name in FORMS},
        make_data=optimizers,
        mode=mode,
        # Reads parameter, gradient and velocity, writes parameter and velocity.
        moved=lambda name: {"bytes": 5 * size},
        nbytes=size,
    )
