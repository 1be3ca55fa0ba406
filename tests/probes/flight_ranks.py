"""One rank of a distributed training with a flight recorder."""

import warnings

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import bnkern
from bnkern import probes
from tests.support.probing import batch, make_net


def fly_rank(out: str, rank: int, group: dist.ProcessGroup) -> None:
    """Four steps with averaged gradients. At step 2 the images of rank 1 have a NaN."""
    net = bnkern.nn.convert_sync_batchnorm(make_net())
    model = nn.parallel.DistributedDataParallel(net, process_group=group)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        with probes.flight_recorder(net, 4, out) as flight:
            for step in range(4):
                images, labels = batch(2 * step + rank)
                if (step, rank) == (2, 1):
                    images[0, 0, 0, 0] = torch.nan
                loss = F.cross_entropy(model(images), labels)
                loss.backward()
                optimizer.step()
                flight.step(loss)
                optimizer.zero_grad()
