"""The backend "cuda" without a GPU: its errors, and its behaviour without memory for a workspace.

The folder cuda_on_cpu has the tests of the calls themselves (test_launchers.py) and of workspaces (test_workspaces.py).
"""

from collections.abc import Callable

import pytest
import torch

from bnkern import _native
from bnkern.backends import cuda
from bnkern.backends import native as backend_functions


@pytest.mark.skipif(not hasattr(_native, "cuda_workspace"), reason="the module was built without CUDA")
@pytest.mark.skipif(torch.cuda.is_available(), reason="this needs a machine without a GPU")
def test_cuda_errors_are_text() -> None:
    with pytest.raises(RuntimeError, match=r"cuda_workspace: .*\(cudaError\w+\)"):
        _native.cuda_workspace(0)


class NoMemory:
    """A native module that never has memory for a workspace, or only after torch's cache was emptied."""

    def __init__(self, calls: list[str], freed_by_torch: bool) -> None:
        self.calls, self.freed_by_torch = calls, freed_by_torch

    def moments(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.calls.append("call")
        if not (self.freed_by_torch and "emptied" in self.calls):
            raise MemoryError("std::bad_alloc")
        return x[0], x[0]


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Makes CUDA report that there is no memory for a workspace. Returns a log of the calls."""

    def make(*, freed_by_torch: bool, capturing: bool) -> list[str]:
        calls: list[str] = []
        monkeypatch.setattr(backend_functions, "_native", NoMemory(calls, freed_by_torch))
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("emptied"))
        return calls

    return make


def test_torchs_cached_memory_is_freed_for_a_workspace(memory: Callable[..., list[str]]) -> None:
    calls = memory(freed_by_torch=True, capturing=False)
    cuda.moments(torch.ones(4, 3))
    assert calls == ["call", "emptied", "call"]


@pytest.mark.parametrize(
    ("capturing", "expected"), [(False, ["call", "emptied", "call"]), (True, ["call"])], ids=["eager", "capturing"]
)
def test_no_memory_for_a_workspace(memory: Callable[..., list[str]], capturing: bool, expected: list[str]) -> None:
    """The error is torch's exception, which training loops catch. During a capture torch's cache cannot be emptied."""
    calls = memory(freed_by_torch=False, capturing=capturing)
    with pytest.raises(torch.OutOfMemoryError, match="no memory left for the workspace"):
        cuda.moments(torch.ones(4, 3))
    assert calls == expected
