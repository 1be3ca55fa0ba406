"""Memory kept for the backward: by one batch norm, and by whole networks with the peak of a step (see memory.py)."""

import json
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

from benchmarks import ROOT
from benchmarks.cases import peers, shapes, traffic
from benchmarks.cases.shapes import Case, Inputs
from benchmarks.tools import memory

ANY_SHAPE = True


def cases(device: torch.device) -> list[Case]:
    return shapes.cases(("stage1",), device)


def label(bench: str, op: str, case: Case) -> dict:
    return {"bench": bench, "op": op, **case._asdict(), "size": case.size, "tensor_bytes": case.nbytes, "mode": "call"}


@pytest.mark.parametrize("op", traffic.OPS)
def test_memory(op: str, case: Case, inputs: Inputs, device: torch.device, add_rows: Callable) -> None:
    """Of one layer, by itself. In a network the next convolution keeps y too: there eager's ReLU keeps it for free."""
    modules = peers.batch_norms(case.size[1], "relu" if op == "bn_add_relu" else None, device)
    del modules["compile"]
    rows = []
    for name, module in modules.items():
        x, residual, _ = inputs.clone().requiring_grad()
        given = (x, residual) if op == "bn_add_relu" else (x,)
        without = [*module.parameters(), *module.buffers()]
        saved, _ = memory.saved_bytes(lambda m=module, given=given: m(*given), without)
        rows.append(label("memory", op, case) | {"provider": name, "saved_bytes": saved})
    add_rows(rows)


@pytest.mark.parametrize("network", ["resnet110", "resnet50"])
def test_memory_of_networks(network: str, quick: bool, add_rows: Callable) -> None:
    """A network and a provider at a time, each in a process of its own: memory that one freed another would reuse."""
    network = "resnet20" if quick else network
    rows = []
    for provider in memory.NETWORKS[network].providers:
        command = [sys.executable, "-m", "benchmarks.tools.memory", network, provider]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        case = Case("images", "channels_last", "fp32")
        row = label("memory_of_networks", network, case) | {"size": memory.NETWORKS[network].images}
        said = done.stderr.strip().splitlines()[-1:] or [f"status {done.returncode}"]
        found = json.loads(done.stdout) if done.returncode == 0 else {"missing": said[0][:200]}
        assert done.returncode == 0 or provider != "bnkern" or "No module named 'pytorchcv'" in said[0], done.stderr
        rows.append(row | {"provider": provider} | found)
    add_rows(rows)
