"""The harness itself: it detects faults that are put into kernels, and the same kernels without the fault pass."""

import ctypes

import pytest
import torch
from torch import Tensor

from tests.backends.cuda_on_cpu.native import kernels
from tests.backends.cuda_on_cpu.sandbox import Died, sandboxed

SEEDS = range(8)
N = 32  # threads


def call(name: str, *args: object, seed: int = 0, blocks: int = 1 << 20) -> str:
    lib = kernels()
    function = getattr(lib, f"fault_{name}")
    function.restype = ctypes.c_char_p
    lib.configure(seed, blocks)
    converted = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else a for a in args]
    return function(*converted).decode()


@sandboxed
def reverse(seed: int, barrier: bool) -> list[int]:
    out = torch.full((N,), -1, dtype=torch.int32)
    assert call("reverse", out, N, barrier, seed=seed) == ""
    return out.tolist()


def test_missing_barrier() -> None:
    """Without the barrier a thread reads values that were not written yet, in every order that is tried."""
    expected = list(reversed(range(N)))
    assert all(reverse(seed, True) == expected for seed in SEEDS)
    assert all(reverse(seed, False) != expected for seed in SEEDS)


@sandboxed
def shift(offset: int) -> list[int]:
    out = torch.zeros(N, dtype=torch.int32)
    assert call("shift", out, N, offset) == ""
    return out.tolist()


def test_shared_index_out_of_bounds() -> None:
    """An access one element beyond the requested memory stops the process, through the sanitizer."""
    assert shift(0) == list(range(N))
    with pytest.raises(Died, match="heap-buffer-overflow"):
        shift(1)
    assert shift(0) == list(range(N)), "a new process is usable"


@sandboxed
def load_at(offset: int) -> None:
    data, out = torch.zeros(64, dtype=torch.uint8), torch.zeros(16, dtype=torch.uint8)
    assert call("misaligned", data, out, offset) == ""


def test_misaligned_vector() -> None:
    """A GPU stops at a load of 16 bytes that is not aligned, and so does the harness."""
    load_at(16)
    with pytest.raises(Died, match="misaligned address"):
        load_at(8)


@sandboxed
def sums(in_order: bool) -> set[float]:
    values = torch.tensor([1e8, 1.0, -1e8, 1.0, 3e7, 2.0])
    results = set()
    for seed in SEEDS:
        out, partial, word = torch.zeros(1), torch.zeros(6), torch.zeros(1, dtype=torch.int32)
        assert call("sum", values, partial, out, word, 6, in_order, seed=seed) == ""
        results.add(out.item())
    return results


def test_sum_that_depends_on_order() -> None:
    """The sum depends on the order if every block adds its own part. It does not if the last block adds all parts."""
    assert len(sums(True)) == 1
    assert len(sums(False)) > 1


@sandboxed
def launch_fault(name: str, *args: object, blocks: int = 1 << 20) -> str:
    return call(name, *(torch.zeros(1, dtype=torch.int32) if a == "word" else a for a in args), blocks=blocks)


def test_barrier_that_not_all_reach() -> None:
    message = launch_fault("half_barrier")
    assert (
        "half barrier: deadlock; block (0, 0)" in message and "a block barrier 2" in message and "the end 2" in message
    )


def test_barrier_between_blocks_that_are_not_resident() -> None:
    """A barrier between blocks under an ordinary launch waits for blocks that start only after the barrier."""
    assert launch_fault("meet", "word", 6, True) == ""
    assert "waits forever" in launch_fault("meet", "word", 6, False)
    assert launch_fault("meet", "word", 6, True, blocks=5) == "not resident"


@sandboxed
def clusters_and_warps() -> tuple[list[int], list[int]]:
    for seed in SEEDS:
        swapped, sums = torch.zeros(6, dtype=torch.int32), torch.zeros(32, dtype=torch.int32)
        assert call("swap", swapped, 6, seed=seed) == "" == call("warp", sums, seed=seed)
    return swapped.tolist(), sums.tolist()


def test_clusters_shuffles_and_ballots() -> None:
    swapped, sums = clusters_and_warps()
    assert swapped == [1, 0, 3, 2, 5, 4]
    assert sums == [496 + 1 + min(lane + 1, 31) for lane in range(32)]


def test_halves_of_a_cluster_barrier() -> None:
    """Every thread must arrive once, wait once, and not end between."""
    assert launch_fault("half_cluster_barrier", 1, 1) == ""
    assert "arrives twice" in launch_fault("half_cluster_barrier", 2, 1)
    assert "without an arrival" in launch_fault("half_cluster_barrier", 0, 1)
    assert "ends between the halves" in launch_fault("half_cluster_barrier", 1, 0)
