"""A network with batch norms for the tests of distributed training, its batches, and its training steps."""

import torch
from torch import Tensor, nn

import bnkern
from tests.support.ranks import rank_parts


class Net(nn.Module):
    """Convolutions, both fused forms, and a batch norm of N x C, in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.first = bnkern.nn.BatchNorm2d(6, act="relu")
        self.conv = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.last = bnkern.nn.BatchNorm2d(6, act="relu", momentum=None)
        self.head = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.stem(x))
        return self.head(self.last(self.conv(x), x).mean((2, 3)))


def net() -> Net:
    torch.manual_seed(0)
    return Net().double()


def random_batches(split: tuple[int, ...]) -> list[list[tuple[Tensor, Tensor]]]:
    """For each rank its part of three batches of inputs and targets."""
    generator = torch.Generator().manual_seed(1)
    shapes = ((8, 3, 6, 6), (8, 4))
    batches = [[torch.randn(shape, generator=generator).double() for shape in shapes] for _ in range(3)]
    parts = [rank_parts(batch, split) for batch in batches]
    return [[tuple(part[rank]) for part in parts] for rank in range(len(split))]


def train(model: nn.Module, batches: list[tuple[Tensor, Tensor]], weight: float) -> dict[str, Tensor]:
    """Steps of SGD on weight * sum of squares, as in a single process."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    outputs = []
    for x, target in batches:
        x = x.clone().requires_grad_()
        y = model(x)
        optimizer.zero_grad()
        (weight * (y - target).square().sum()).backward()
        optimizer.step()
        outputs += [y.detach(), x.grad]
    return {"outputs": outputs, "state": dict(getattr(model, "module", model).state_dict())}
