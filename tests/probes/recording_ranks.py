"""One rank of a distributed recording, and the program that runs it."""

from pathlib import Path

import torch.nn.functional as F

import bnkern
from bnkern import probes
from tests.support.probing import CHANNEL, batch, make_net

RANK = """
import sys
from bnkern.train.processes import process_group
from tests.probes.recording_ranks import record_rank
rank, port, out, norm = int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4] == "True"
shares = [int(size) for size in sys.argv[5:]]
with process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=len(shares)):
    record_rank(out, norm, shares, rank)
"""
SUMMED = [*CHANNEL, "weight_gradient_signs"]


def record_rank(out: str | Path, norm: bool, shares: list[int], rank: int) -> None:
    """Five steps with batches of 6 images, of which this process takes its share."""
    net = make_net(norm)
    net = bnkern.nn.convert_sync_batchnorm(net) if norm and len(shares) > 1 else net
    quantities = [*SUMMED, "signal_propagation", *["affine_gradient_signs", "norm_gradient_noise"] * norm]
    part = slice(sum(shares[:rank]), sum(shares[: rank + 1]))
    with (
        probes.record(net, quantities, out=out, capacity=2) as rec,
        probes.record(net, CHANNEL, out=f"{out}-again") as again,
    ):
        for step in range(5):
            images, labels = batch(step, size=6)
            (F.cross_entropy(net(images[part]), labels[part], reduction="sum") / 6).backward()
            rec.step(), again.step()
    assert not rec.unserved
