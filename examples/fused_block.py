"""Train a small network whose residual blocks use bnkern's fused batch norm. Everything else is plain PyTorch.

    python examples/fused_block.py --steps 20

The images and labels are random, so the loss falls only because the network memorises this one batch.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnkern


class Block(nn.Module):
    """A residual block: relu(bn(conv(relu(bn(conv(x))))) + x), where each batch norm is one fused call."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = bnkern.nn.BatchNorm2d(channels, act="relu")
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = bnkern.nn.BatchNorm2d(channels, act="relu")

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm1(self.conv1(x))
        return self.norm2(self.conv2(hidden), x)  # the second argument is the residual


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=64)
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    stem = nn.Conv2d(3, 16, 3, padding=1)
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
    model = nn.Sequential(stem, Block(16), Block(16), head).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    images = torch.randn(args.batch, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (args.batch,))

    print(bnkern.explain(images))  # which backend serves tensors of this kind
    for step in range(args.steps):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step}: loss {loss.item():.4f}")


if __name__ == "__main__":
    main()
