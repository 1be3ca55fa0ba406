"""Workspaces of csrc/cuda/workspaces.cu over the CUDA runtime of runtime.cpp: which calls share memory, and how long.

A graph holds the resources of a capture. "Captured" kernels run immediately.
"""

import ctypes
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import combinations, count
from threading import Barrier

import pytest
import torch
from torch import Tensor

from bnkern.backends import cuda
from bnkern.backends.calls import BackwardCall, ForwardCall
from bnkern.backends.records import ACTIVATION, AFFINE, GRADIENT
from tests.backends.cuda_on_cpu import native
from tests.backends.cuda_on_cpu.host import on_the_host
from tests.backends.cuda_on_cpu.sandbox import sandboxed
from tests.support.cases import CASE, FP32, Case, Problem
from tests.support.record_cases import empty_record

DEVICES = count(1)  # every test has its own device, because allocations outlive the test
STREAM, OTHER = 7, 8


class Runtime:
    """The functions by which tests control and observe the runtime on the host."""

    def __init__(self) -> None:
        self.lib = native.kernels()
        self.lib.counted.restype = ctypes.c_longlong
        self.lib.counted.argtypes = [ctypes.c_int]
        self.lib.begin_capture.restype = ctypes.c_void_p
        self.lib.begin_capture.argtypes = self.lib.end_capture.argtypes = [ctypes.c_size_t]
        self.lib.join_capture.argtypes = [ctypes.c_size_t, ctypes.c_size_t]
        self.lib.destroy_graph.argtypes = [ctypes.c_void_p]
        self.lib.set_memory_left.argtypes = [ctypes.c_longlong]
        self.lib.workspace.restype = ctypes.c_char_p
        self.lib.workspace.argtypes = [
            ctypes.c_size_t,
            *[ctypes.c_int64] * 2,
            ctypes.POINTER(native.CudaWorkspace),
        ]
        self.lib.set_device(next(DEVICES))

    def counted(self) -> dict[str, int]:
        names = ("allocations", "allocated_bytes", "memsets", "limits_set")
        return {name: self.lib.counted(index) for index, name in enumerate(names)}

    def workspace(self, stream: int, groups: int = 8, size: int = 1000) -> range:
        """The addresses of a call's workspace. The call overwrites all of it except the signals."""
        result = native.CudaWorkspace()
        message = self.lib.workspace(stream, groups, size, result).decode()
        if message:
            raise RuntimeError(message)
        signals = self.lib.signal_bytes(result.size.groups)
        assert result.size.groups >= groups and result.size.bytes >= size
        assert ctypes.string_at(result.data, signals) == bytes(signals), "a signal is not zero"
        ctypes.memset(result.data + signals, 255, result.size.bytes)
        return range(result.data, result.data + signals + result.size.bytes)

    @contextmanager
    def capture(self, stream: int) -> Iterator[ctypes.c_void_p]:
        graph = ctypes.c_void_p(self.lib.begin_capture(stream))
        try:
            yield graph
        finally:
            self.lib.end_capture(stream)


def overlap(a: range, b: range) -> bool:
    return a.start < b.stop and b.start < a.stop


@sandboxed
def test_calls_of_a_stream_share_memory() -> None:
    r, stream, other = Runtime(), STREAM, OTHER
    first = r.workspace(stream)
    before = r.counted()
    for _ in range(100):
        assert r.workspace(stream, groups=1024, size=1 << 20) == first
    assert r.counted() == before, "a call neither allocates nor clears memory"
    assert not overlap(first, r.workspace(other))
    larger = r.workspace(stream, groups=3000, size=3 << 20)
    assert not overlap(first, larger) and r.workspace(stream) == larger
    r.lib.set_device(next(DEVICES))
    assert not overlap(larger, r.workspace(stream)), "streams of two devices may have equal handles"


@sandboxed
def test_captured_calls_share_the_workspace_of_their_graph() -> None:
    """Earlier, the launches of a ResNet-110 took 9 MB, mostly signals for 4096 groups, and never freed them."""
    r, stream = Runtime(), STREAM
    uncaptured = r.workspace(stream)
    before = r.counted()
    with r.capture(stream) as graph:
        workspaces = {r.workspace(stream, groups=8, size=17_000) for _ in range(220)}
    (captured,) = workspaces
    changes = {name: value - before[name] for name, value in r.counted().items()}
    assert changes == {"allocations": 1, "allocated_bytes": 512 + 32_768, "memsets": 1, "limits_set": 0}
    assert not overlap(uncaptured, captured) and r.workspace(stream) == uncaptured
    r.lib.destroy_graph(graph)


@sandboxed
def test_graphs_and_streams_of_a_graph_have_separate_workspaces() -> None:
    """They may run at the same time."""
    r, stream, joined = Runtime(), STREAM, OTHER
    graphs, workspaces = [], [r.workspace(stream), r.workspace(joined)]
    for _ in range(3):
        with r.capture(stream) as graph:
            r.lib.join_capture(joined, stream)
            workspaces += [r.workspace(stream), r.workspace(joined)]
            r.lib.end_capture(joined)
        graphs.append(graph)
    assert not any(overlap(a, b) for a, b in combinations(workspaces, 2))
    for graph in graphs:
        r.lib.destroy_graph(graph)


@sandboxed
def test_workspaces_of_destroyed_graphs_are_reused() -> None:
    r, stream = Runtime(), STREAM
    alive = []
    for k in range(5):
        before = r.counted()["allocations"]
        for _ in range(10):
            with r.capture(stream) as graph:
                workspace = r.workspace(stream, groups=50, size=10_000)
                assert not any(overlap(workspace, other) for other in alive)
            r.lib.destroy_graph(graph)
        assert r.counted()["allocations"] - before == 1, f"10 captures beside {k} living graphs"
        with r.capture(stream):
            alive.append(r.workspace(stream, groups=50, size=10_000))


@sandboxed
def test_a_capture_that_needs_a_larger_workspace() -> None:
    """The memory of its first kernels remains with the graph."""
    r, stream = Runtime(), STREAM
    with r.capture(stream) as graph:
        small = r.workspace(stream, groups=4, size=4096)
        large = r.workspace(stream, groups=4, size=4097)
        assert not overlap(small, large)
        assert r.workspace(stream, groups=8, size=8192) == large
        with_more_groups = r.workspace(stream, groups=100, size=1)
        assert not overlap(large, with_more_groups)
        assert r.workspace(stream, groups=1, size=8192) == with_more_groups
    with r.capture(stream) as other:
        assert not any(overlap(r.workspace(stream, 4, 1000), w) for w in (small, large, with_more_groups))
    r.lib.destroy_graph(graph)
    r.lib.destroy_graph(other)


@sandboxed
def test_memory_may_be_allocated_while_another_stream_captures() -> None:
    r, capturing, stream = Runtime(), OTHER, STREAM
    with r.capture(capturing) as graph:
        r.workspace(stream)
    r.lib.destroy_graph(graph)


@sandboxed
def test_no_memory() -> None:
    r, stream = Runtime(), STREAM
    r.lib.set_memory_left(1000)
    try:
        with pytest.raises(RuntimeError, match="no memory"):
            r.workspace(stream)
    finally:
        r.lib.set_memory_left(-1)
    r.workspace(stream)


@sandboxed
def test_the_limit_of_shared_memory_is_set_once() -> None:
    """It is the maximum of the device, because another launch must not lower a limit before the first one is queued."""
    r = Runtime()
    kernel = ctypes.c_void_p(1234)
    before = r.counted()["limits_set"]
    for device in (next(DEVICES), next(DEVICES)):
        r.lib.set_device(device)
        assert r.lib.allowed_shared_memory(kernel) == 48 << 10
        for _ in range(3):
            r.lib.allow_shared_memory(kernel)
            assert r.lib.allowed_shared_memory(kernel) == 227 << 10
    assert r.counted()["limits_set"] - before == 2


# ---------------------------------------------------------------------------------------- two threads, one stream

SEVERAL_PARTS = [CASE["nchw_tail"], CASE["nhwc"], CASE["nhwc_c5_s49"]]


def _results(p: Problem) -> list[Tensor]:
    """All results of a recorded training call."""
    activation, gradient, affine = (empty_record(rows, p.x) for rows in (ACTIVATION, GRADIENT, AFFINE))
    affine_parameters = (p.weight, p.bias)
    y, mean, invstd, mask = cuda.forward(
        ForwardCall(
            p.x, *affine_parameters, p.residual, None, None, None, True, 0.1, 1e-5, "relu", True, record=activation
        )
    )
    saved = (mean, invstd, mask, "relu", True, (True,) * 4)
    grads = cuda.backward(BackwardCall(
        p.dy, p.x, *affine_parameters, *saved, record_gradient=gradient, record_affine=affine
    ))  # fmt: skip
    return [y, mean, invstd, mask, *grads, activation, gradient, affine]


def _side_by_side(case: Case) -> None:
    first, second = case.problem(FP32), case.problem(FP32)
    second.x.mul_(-3).add_(1), second.dy.mul_(5)
    expected = [_results(p) for p in (first, second)]
    barrier = Barrier(2)

    def call(p: Problem) -> list[Tensor]:
        barrier.wait()
        return _results(p)

    lib = native.kernels()
    lib.pause_between_launches(30)
    try:
        with ThreadPoolExecutor(2) as pool:
            results = list(pool.map(call, (first, second)))
    finally:
        lib.pause_between_launches(0)
    for thread, (ours, reference) in enumerate(zip(results, expected, strict=True)):
        for k, (a, b) in enumerate(zip(ours, reference, strict=True)):
            assert torch.equal(a, b), f"thread {thread}: result {k} has another call's parts in it"


@pytest.mark.parametrize("case", SEVERAL_PARTS, ids=str)
@sandboxed
def test_two_threads_on_one_stream(case: Case) -> None:
    """The kernels of a call pass results in the workspace of the stream. No kernel of another call may run in between.

    Each thread waits after each of its launches, so that the other one could launch.
    """
    for single_read_from in (0, 1 << 40):
        on_the_host(_side_by_side, case, single_read_from=single_read_from)
