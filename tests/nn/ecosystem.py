"""Networks with bnkern's modules and with torch's, for tests of functions that other libraries wrote for torch's."""

import torch
from torch import Tensor, nn

import bnkern

CLOSE = {"rtol": 1e-10, "atol": 1e-10}


class Net(nn.Module):
    """BN -> ReLU, BN -> add -> ReLU and a plain BN in float64; ``fused`` chooses bnkern's modules or torch's."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        kind, act = (bnkern.nn, {"act": "relu"}) if fused else (nn, {})
        self.fused = fused
        self.conv1, self.norm1 = nn.Conv2d(3, 8, 3, padding=1), kind.BatchNorm2d(8, **act)
        self.conv2, self.norm2 = nn.Conv2d(8, 8, 3, padding=1), kind.BatchNorm2d(8, **act)
        self.head, self.norm3 = nn.Linear(8, 4), kind.BatchNorm1d(4)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.conv1(x))
        x = x if self.fused else x.relu()
        y = self.conv2(x)
        y = self.norm2(y, x) if self.fused else (self.norm2(y) + x).relu()
        return self.norm3(self.head(y.mean((2, 3))))


def pair() -> tuple[Net, Net]:
    """The network with bnkern's modules and that with torch's in the same state, after two training steps."""
    torch.manual_seed(0)
    networks = Net(True), Net(False)
    networks[1].load_state_dict(networks[0].state_dict())
    for network in networks:
        train(network)
    return networks


def batches(count: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(6, 3, 5, 5, generator=generator).double() for _ in range(count)]


def train(model: nn.Module) -> None:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1, momentum=0.9)
    model.train()
    for x in batches():
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def norms_of(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def conv_and_norm(act: str | None = "relu", conv: type[nn.Conv2d] = nn.Conv2d) -> nn.Sequential:
    """A convolution and a batch norm in eval mode, with nontrivial statistics."""
    torch.manual_seed(2)
    model = nn.Sequential(conv(3, 8, 3), bnkern.nn.BatchNorm2d(8, act=act))
    for value in model[1].state_dict().values():
        if value.is_floating_point():
            value.uniform_(0.5, 1.5)
    return model.eval().requires_grad_(False)


X = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(3))
