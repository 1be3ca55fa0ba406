"""Train in several processes of one machine, with batch statistics and gradients of the joint batch.

    torchrun --nproc-per-node 2 examples/train_distributed.py --steps 20

The processes use the CPU and gloo. The images are synthetic. At the end all ranks compare their models bit for bit.
"""

import argparse

import torch
import torch.distributed as dist
from torch import nn

import bnkern
from bnkern.train import cifar10
from bnkern.train.processes import process_group


def train(steps: int) -> nn.Module:
    """Return the trained network. Its DistributedDataParallel must not outlive the process group."""
    torch.manual_seed(0)
    rank, world = dist.get_rank(), dist.get_world_size()
    body = nn.Conv2d(3, 32, 3, padding=1, bias=False), bnkern.nn.BatchNorm2d(32, act="relu")
    model = nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
    # bnkern's converter keeps the fused ReLU, and works in place. It must come before DistributedDataParallel.
    parallel = nn.parallel.DistributedDataParallel(bnkern.nn.convert_sync_batchnorm(model))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    data = cifar10.synthetic()
    for step, joint in zip(range(steps), cifar10.batches(data.train, 64, seed=0), strict=False):
        images, labels = (t[rank::world] for t in joint)  # this rank's share of the batch
        loss = nn.functional.cross_entropy(parallel(data.normalise(images)), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if rank == 0:
            print(f"step {step}: loss {loss.item():.4f} on the share of rank 0")
    return model


def agree(tensor: torch.Tensor) -> bool:
    """Whether all ranks hold the same values, bit for bit."""
    gathered = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, tensor.detach())
    return all(torch.equal(other, tensor) for other in gathered)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args(argv)
    with process_group("gloo"):  # torchrun sets the environment variables that this reads
        model = train(args.steps)
        for kind, tensors in (("parameters", model.parameters()), ("running statistics", model.buffers())):
            same = [agree(tensor) for tensor in tensors]  # every rank must take part in each comparison
            if dist.get_rank() == 0:
                print(f"{kind}: {sum(same)} of {len(same)} tensors are equal on {dist.get_world_size()} ranks")


if __name__ == "__main__":
    main()
