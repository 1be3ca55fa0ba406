"""The CUDA launchers and the native module's entries, without a GPU.

Workspaces have tests of their own: tests/cuda_on_cpu/test_workspaces.py.
"""

from collections.abc import Callable

import pytest
import torch

from bnkern import _native
from bnkern.backends import cuda

DEVICE = cuda.Device(multiprocessors=132, shared_bytes=227 << 10, threads=512, clusters=True)


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launchers take tensors of the CPU."""
    monkeypatch.setattr(cuda, "_device", lambda index: (DEVICE, cuda.RULES[""]))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0, raising=False)


@pytest.mark.skipif(not hasattr(_native, "cuda_forward"), reason="built without CUDA")
@pytest.mark.skipif(torch.cuda.is_available(), reason="its tensors are on the CPU")
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["planes", "rows"])
def test_the_native_module_takes_what_the_launchers_give(on_the_cpu: None, memory_format: torch.memory_format) -> None:
    """All arguments fit, and what CUDA says without a GPU comes as text."""
    x = torch.randn(4, 16, 8, 8).contiguous(memory_format=memory_format)
    w, counter = torch.ones(16), torch.tensor(1)
    saved = (w, w, None, "relu")
    for entry, call in (
        ("forward", lambda: cuda.moments(x)),
        ("forward", lambda: cuda.normalize(x, w, w, w, w, x, "relu")),
        ("backward", lambda: cuda.grad_sums(x, x, w, w, *saved)),
        ("backward", lambda: cuda.grad_input(x, x, w, w, *saved, (w, w, 256))),
        ("forward", lambda: cuda.forward(x, w, w, x, w, w, counter, True, None, 1e-5, "relu", True)),
        ("backward", lambda: cuda.backward(x, x, w, w, w, w, None, "relu", True, (True,) * 4)),
    ):
        with pytest.raises(RuntimeError, match=rf"{entry}: .*\(cudaError\w+\)"):
            call()


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch, on_the_cpu: None) -> Callable[..., list[str]]:
    """Makes CUDA have memory for a workspace never, or once torch's cache is empty; gives what happened."""

    def make(*, freed_by_torch: bool, capturing: bool) -> list[str]:
        happened: list[str] = []

        def forward(*arguments: object) -> None:
            happened.append("call")
            if not (freed_by_torch and "emptied" in happened):
                raise MemoryError("std::bad_alloc")

        monkeypatch.setattr(cuda._native, "cuda_forward", forward, raising=False)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: happened.append("emptied"))
        return happened

    return make


def test_memory_that_torch_keeps_is_returned_for_a_workspace(memory: Callable[..., list[str]]) -> None:
    happened = memory(freed_by_torch=True, capturing=False)
    cuda.moments(torch.ones(4, 3))
    assert happened == ["call", "emptied", "call"]


@pytest.mark.parametrize(
    ("capturing", "expected"), [(False, ["call", "emptied", "call"]), (True, ["call"])], ids=["eager", "capturing"]
)
def test_no_memory_for_a_workspace(memory: Callable[..., list[str]], capturing: bool, expected: list[str]) -> None:
    """torch's own exception, which training loops catch. Within a capture torch's cache cannot be emptied."""
    happened = memory(freed_by_torch=False, capturing=capturing)
    with pytest.raises(torch.OutOfMemoryError, match="no memory left for the workspace"):
        cuda.moments(torch.ones(4, 3))
    assert happened == expected
