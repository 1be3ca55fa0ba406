"""How tensors are divided among blocks on an H200: no wave of blocks has only a few of them."""

import ctypes
from ctypes import POINTER, c_bool, c_int, c_int64
from typing import NamedTuple

import pytest

from benchmarks.cases.shapes import SHAPES
from tests.backends.cuda_on_cpu import native

MULTIPROCESSORS = 132
RESIDENT = 2 * MULTIPROCESSORS  # blocks of the two kernels


class Plan(NamedTuple):
    single: int  # whether it is one kernel
    blocks: int
    threads: int
    tiles: int
    parts: int  # the blocks that exchange parts


def plan(
    shape: tuple[int, ...], rows: bool, itemsize: int = 2, tensors: int = 1, single: bool = True, of_8: int = 16
) -> Plan:
    """The plan of a tensor on an H200 that runs so many clusters of 8 blocks at once."""
    n, c, *space = shape
    s = 1
    for side in space:
        s *= side
    device = native.CudaDevice(MULTIPROCESSORS, 227 << 10, 512, (c_int * 3)(66, 32, of_8))
    function = native.kernels().plan
    function.restype = None
    function.argtypes = [POINTER(native.Shape), POINTER(native.CudaDevice), c_int, c_int, c_bool, POINTER(c_int64)]
    result = (c_int64 * len(Plan._fields))()
    function(native.Shape(rows, n, c, s), ctypes.byref(device), itemsize, tensors, single, result)
    return Plan(*result)


@pytest.mark.parametrize("tensors", [1, 2], ids=["forward", "backward"])
def test_clusters_run_in_one_wave(tensors: int) -> None:
    """If only 15 clusters of 8 blocks run at once, 16 clusters have 4 blocks with two tiles."""
    stage1 = (128, 16, 32, 32)
    assert plan(stage1, rows=False, tensors=tensors, of_8=16) == Plan(1, 128, 512, 1, 8)
    assert plan(stage1, rows=False, tensors=tensors, of_8=15) == Plan(1, 64, 512, 2, 4)
    assert plan((128, 32, 16, 16), rows=False, tensors=tensors, of_8=15) == Plan(1, 128, 256, 1, 4)
    assert plan((128, 64, 8, 8), rows=False, tensors=tensors, of_8=15).blocks <= MULTIPROCESSORS


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("tensors", [1, 2], ids=["forward", "backward"])
def test_blocks_of_rows_run_in_one_wave(name: str, tensors: int) -> None:
    """The blocks of one kernel wait for each other, so they must. The two kernels have two for each multiprocessor."""
    for itemsize in (2, 4):
        for single in (True, False):
            found = plan(SHAPES[name], True, itemsize, tensors, single)
            assert found.blocks <= (MULTIPROCESSORS if found.single else RESIDENT), found


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("tensors", [1, 2], ids=["forward", "backward"])
def test_no_wave_of_the_two_kernels_of_planes_is_nearly_empty(name: str, tensors: int) -> None:
    for itemsize in (2, 4):
        found = plan(SHAPES[name], False, itemsize, tensors, single=False)
        waves = -(-found.blocks // RESIDENT)
        assert waves == 1 or found.blocks / (waves * RESIDENT) >= 0.75, found
