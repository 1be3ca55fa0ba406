"""A small network, batches, and a training loop for the tests of recording."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnkern
from bnkern import probes

CHANNEL = ["activation_moments", "gradient_channel_signs"]


class Net(nn.Module):
    """Three convolutions, norm layers with and without residual and ReLU, and a classifier."""

    def __init__(self, norm: bool = True) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, stride=2, padding=1, bias=False)
        self.conv3 = bnkern.nn.Conv2d(6, 6, 1, bias=False)
        self.norm1, self.norm2, self.norm3 = (
            bnkern.nn.BatchNorm2d(6, act=act) if norm else bnkern.nn.Activation(act) for act in ("relu", "relu", None)
        )
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.conv1(x))
        y = self.norm2(self.conv2(x))
        y = self.norm3(self.conv3(y), y)
        return self.fc(y.mean((2, 3)))


def make_net(norm: bool = True, layout: str = "contiguous", device: str = "cpu") -> Net:
    torch.manual_seed(0)
    formats = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
    return Net(norm).to(device, memory_format=formats[layout])


def batch(step: int, size: int = 5, device: str = "cpu") -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(size, 3, 7, 7, generator=generator)
    return images.to(device), torch.randint(4, (size,), generator=generator).to(device)


def train(net: nn.Module, steps: int, rec: probes.Recorder | None = None, forward: Callable | None = None) -> None:
    device = next(net.parameters()).device
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    for step in range(steps):
        images, labels = batch(step, device=device)
        loss = F.cross_entropy((net if forward is None else forward)(images), labels)
        loss.backward()
        optimizer.step()
        if rec is not None:
            rec.step(loss)
        optimizer.zero_grad()
