"""Who is measured: bnkern's module, and torch's eager and compiled ones computing the same."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnkern


class Eager(nn.BatchNorm2d):
    """``act(bn(x) + residual)``, one operation after the other, each into a fresh tensor."""

    def __init__(self, channels: int, act: str | None = None) -> None:
        super().__init__(channels)
        self.act = act

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = super().forward(x)
        if residual is not None:
            y = y + residual
        return F.relu(y) if self.act else y


class EagerInPlace(Eager):
    """The same as torchvision's ResNet writes it: ``out = bn(x); out += residual; relu_(out)``."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = nn.BatchNorm2d.forward(self, x)
        if residual is not None:
            y += residual
        return F.relu_(y) if self.act else y


def batch_norms(channels: int, act: str | None, device: torch.device) -> dict[str, nn.Module]:
    """The modules by provider, ours first, all with the same random weight and bias (fp32, also for bf16 input)."""
    ours = bnkern.nn.BatchNorm2d(channels, act=act)
    nn.init.uniform_(ours.weight, 0.5, 1.5)
    nn.init.normal_(ours.bias)
    modules = {"bnkern": ours, "eager": Eager(channels, act)}
    if act:
        modules["eager in place"] = EagerInPlace(channels, act)
    modules["compile"] = Eager(channels, act)
    for module in modules.values():
        module.load_state_dict(ours.state_dict())
        module.to(device)
    modules["compile"] = compiled(modules["compile"])
    return modules


def compiled(module: nn.Module) -> nn.Module:
    """torch.compile for this one case: nothing remembered of the cases before, static shapes, no graph break."""
    torch._dynamo.reset()
    return torch.compile(module, fullgraph=True, dynamic=False)
