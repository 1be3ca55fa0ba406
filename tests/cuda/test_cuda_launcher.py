"""What the CUDA launchers decide by themselves, without a GPU: whose memory the blocks of a launch meet in."""

import ctypes
from itertools import combinations

import pytest
import torch

from bnkern import _native
from bnkern.backends import cuda


class Torch:
    """Stands for torch's side: zeros that say when they were made, and whether a capture is under way."""

    def __init__(self) -> None:
        self.capturing, self.waits, self.made = False, 0, []
        self.workspaces = cuda.Workspaces(self.zeros, lambda: self.capturing, self.wait)

    def zeros(self, count: int, device: int) -> torch.Tensor:
        self.made.append((count, device, self.capturing))
        return torch.zeros(count, dtype=torch.uint8)

    def wait(self) -> None:
        assert not self.capturing, "waiting breaks a capture"
        self.waits += 1

    def launch(self, needed: int = 1000, device: int = 0, stream: int = 7) -> range:
        """The addresses that a launch got, as the launchers ask for them."""
        address, size = self.workspaces.at_hand(device, stream)
        if size < needed:
            address, size = self.workspaces.fresh(needed, device, stream)
        assert size >= needed and ctypes.string_at(address, needed) == bytes(needed), "too little, or not zero"
        return range(address, address + size)


def overlap(a: range, b: range) -> bool:
    return a.start < b.stop and b.start < a.stop


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda.Workspaces, "SLAB", 16384)
    monkeypatch.setattr(cuda.Workspaces, "LEAST", 2048)


def test_launches_of_a_stream_share_memory() -> None:
    t = Torch()
    first = t.launch()
    assert t.launch() == first
    assert not overlap(first, t.launch(stream=8)) and not overlap(first, t.launch(device=1))
    larger = t.launch(5000)
    assert t.launch() == larger
    assert t.waits == 2, "once for each device, not for each launch"
    made = len(t.made)
    for _ in range(100):
        t.launch()
    assert len(t.made) == made, "no memory is made, and so none zeroed, for a launch"


def test_every_captured_launch_has_memory_of_its_own() -> None:
    t = Torch()
    eager = t.launch()
    t.capturing = True
    captured = [t.launch(needed) for needed in (1, 1000, 3000, 1000)]
    assert not any(overlap(a, b) for a, b in combinations([eager, *captured], 2))
    assert not any(capturing for *_, capturing in t.made), "nothing was made within the capture"
    t.capturing = False
    assert t.launch() == eager


def test_the_slab_is_renewed_outside_of_captures() -> None:
    t = Torch()
    eager = t.launch()
    t.capturing = True
    first = [t.launch(4096) for _ in range(3)]
    t.capturing = False
    assert t.launch() == eager and t.waits == 2, "a quarter was left, so that there is a new slab"
    assert t.launch() == eager and t.waits == 2
    t.capturing = True
    second = [t.launch(4096) for _ in range(4)]
    assert not any(capturing for *_, capturing in t.made)
    beyond = t.launch(4096)
    assert t.made[-1] == (4096, 0, True), "beyond the slab, memory is made and zeroed within the capture"
    assert not any(overlap(a, b) for a, b in combinations([eager, *first, *second, beyond], 2))


def test_a_capture_before_any_launch() -> None:
    t = Torch()
    t.capturing = True
    t.launch()
    assert t.made == [(1024, 0, True)] and t.waits == 0


@pytest.mark.skipif(not hasattr(_native, "cuda_forward"), reason="built without CUDA")
@pytest.mark.skipif(torch.cuda.is_available(), reason="its tensors are on the CPU")
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["planes", "rows"])
def test_the_native_module_takes_what_the_launchers_give(monkeypatch, memory_format: torch.memory_format) -> None:
    """All arguments fit, both calls get their workspace, and what CUDA says without a GPU comes as text."""
    device = cuda.Device(multiprocessors=132, shared_bytes=227 << 10, threads=512, clusters=True)
    monkeypatch.setattr(cuda, "_device", lambda index: (device, cuda.RULES[""]))
    monkeypatch.setattr(cuda, "_workspaces", Torch().workspaces)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0, raising=False)
    x = torch.randn(4, 16, 8, 8).contiguous(memory_format=memory_format)
    w, counter = torch.ones(16), torch.tensor(1)
    saved = (w, w, None, "relu")
    for phase, call in {
        "moments": lambda: cuda.moments(x),
        "normalize": lambda: cuda.normalize(x, w, w, w, w, x, "relu"),
        "grad_sums": lambda: cuda.grad_sums(x, x, w, w, *saved),
        "grad_input": lambda: cuda.grad_input(x, x, w, w, *saved, (w, w, 256)),
        "moments|normalize": lambda: cuda.forward(x, w, w, x, w, w, counter, True, None, 1e-5, "relu", True),
        "grad_sums|grad_input": lambda: cuda.backward(x, x, w, w, w, w, None, "relu", True, (True,) * 4),
    }.items():
        with pytest.raises(RuntimeError, match=rf"({phase}).*: .*\(cudaError\w+\)"):
            call()
