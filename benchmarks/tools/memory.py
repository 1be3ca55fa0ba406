"""Memory of a training step, measured in a separate process for each network and provider.

``python -m benchmarks.tools.memory NETWORK PROVIDER`` prints the numbers as JSON. *Saved* is the memory that autograd
holds from the forward to the backward. Each block of memory counts once; parameters and images do not count. *Peak*
is the growth of the process (on a GPU, of torch's allocator) during the step. On the CPU it includes bnkern's pool of
freed results.
"""

import argparse
import ctypes
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnkern
from benchmarks.cases.steps import in_place
from bnkern.backends.cpu import release_memory
from bnkern.train.resnet import ResNet

PROVIDERS = ("bnkern", "eager", "eager in place")


class Network(NamedTuple):
    build: Callable[[], nn.Module]  # in torch's modules
    ours: Callable[[nn.Module], nn.Module]
    images: tuple[int, int, int, int]
    providers: tuple[str, ...] = PROVIDERS


def _resnet50() -> nn.Module:
    from pytorchcv.models.resnet import resnet50  # model_provider would import torchvision

    return resnet50(pretrained=False)


NETWORKS = {
    "resnet20": Network(lambda: ResNet(20, kernels="torch"), lambda _: ResNet(20), (16, 3, 32, 32)),  # for the tests
    "resnet110": Network(lambda: ResNet(110, kernels="torch"), lambda _: ResNet(110), (128, 3, 32, 32)),
    "resnet50": Network(_resnet50, bnkern.convert, (8, 3, 224, 224), PROVIDERS[:2]),
}


def saved_bytes(forward: Callable[[], object], excluded: list[Tensor]) -> tuple[int, object]:
    """The bytes that autograd holds after ``forward``, and its result, which must keep the graph alive.

    Each block of memory counts once. The blocks of the tensors in ``excluded`` do not count.
    """
    counted = {t.untyped_storage().data_ptr() for t in excluded}
    total = 0

    def pack(t: Tensor) -> Tensor:
        nonlocal total
        storage = t.untyped_storage()
        if storage.data_ptr() not in counted:
            counted.add(storage.data_ptr())
            total += storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = forward()
    return total, output


class Peak:
    """The growth of memory from now on: a call returns the peak minus the start."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self._start = torch.cuda.memory_allocated()
        else:
            release_memory()
            # The step must not reuse memory that counts as resident already.
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark to the resident size
            self._start = self._resident("VmRSS")

    def __call__(self) -> int:
        peak = torch.cuda.max_memory_allocated() if self._device.type == "cuda" else self._resident("VmHWM")
        return peak - self._start

    @staticmethod
    def _resident(name: str) -> int:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(re.search(rf"^{name}:\s+(\d+) kB", status, re.MULTILINE)[1])


def of_step(name: str, provider: str, device: torch.device) -> dict[str, int]:
    """The saved and the peak bytes of one training step in channels_last, fp32."""
    build, ours, size, _ = NETWORKS[name]
    torch.manual_seed(0)
    model = build()
    if provider == "bnkern":
        model = ours(model)
    elif provider == "eager in place":
        model = in_place(model)
    model = model.to(device, memory_format=torch.channels_last)
    images = torch.randn(size, device=device).contiguous(memory_format=torch.channels_last)
    labels = torch.zeros(size[0], dtype=torch.int64, device=device)

    def step(images: Tensor, labels: Tensor) -> int:
        saved, loss = saved_bytes(
            lambda: F.cross_entropy(model(images), labels), [*model.parameters(), *model.buffers(), images]
        )
        loss.backward()
        for parameter in model.parameters():
            parameter.grad = None
        return saved

    step(images[:1].repeat(2, 1, 1, 1), labels[:2])  # loads libraries and fills code caches
    peak = Peak(device)
    return {"saved_bytes": step(images, labels), "peak_bytes": peak()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tools.memory", description=__doc__)
    parser.add_argument("network", choices=NETWORKS)
    parser.add_argument("provider", choices=PROVIDERS)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(json.dumps(of_step(args.network, args.provider, device)))


if __name__ == "__main__":
    main()
