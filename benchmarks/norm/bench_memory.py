"""Memory that one batch norm keeps for the backward, and that of whole networks with the peak of a step."""

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
def test_memory(op: str, case: Case, inputs: Inputs, device: torch.device, add_measurements: Callable) -> None:
    """One layer alone. In a network the next convolution also keeps y, so eager's ReLU needs no memory for it."""
    modules = peers.batch_norms(case.size[1], "relu" if op == "bn_add_relu" else None, device)
    del modules["compile"]
    measurements = []
    for name, module in modules.items():
        x, residual, _ = inputs.clone().requiring_grad()
        arguments = (x, residual) if op == "bn_add_relu" else (x,)
        excluded = [*module.parameters(), *module.buffers()]
        saved, _ = memory.saved_bytes(lambda m=module, arguments=arguments: m(*arguments), excluded)
        measurements.append(label("memory", op, case) | {"provider": name, "saved_bytes": saved})
    add_measurements(measurements)


@pytest.mark.parametrize("network", ["resnet110", "resnet50"])
def test_memory_of_networks(network: str, quick: bool, add_measurements: Callable) -> None:
    """Each network and provider in a separate process, because one would reuse memory that another has freed."""
    network = "resnet20" if quick else network
    measurements = []
    for provider in memory.NETWORKS[network].providers:
        command = [sys.executable, "-m", "benchmarks.tools.memory", network, provider]
        process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        case = Case("images", "channels_last", "fp32")
        measurement = label("memory_of_networks", network, case) | {"size": memory.NETWORKS[network].images}
        message = process.stderr.strip().splitlines()[-1:] or [f"status {process.returncode}"]
        entries = json.loads(process.stdout) if process.returncode == 0 else {"missing": message[0][:200]}
        assert process.returncode == 0 or provider != "bnkern" or "No module named 'pytorchcv'" in message[0], (
            process.stderr
        )
        measurements.append(measurement | {"provider": provider} | entries)
    add_measurements(measurements)
