"""Occupancy computed by hand, for cases in which each of the limits determines it."""

import pytest

from tests.backends.triton.occupancy import resident_blocks


@pytest.mark.parametrize(
    ("architecture", "threads", "registers", "shared", "blocks"),
    [
        (90, 128, 32, 0, 16),  # 64 warps, 4 per block
        (90, 32, 32, 0, 32),  # at most 32 blocks
        (90, 128, 33, 0, 12),  # 33 registers are rounded to 40: 1,280 per warp, 51 warps
        (90, 128, 128, 0, 4),  # 4,096 registers per warp: 16 warps
        (90, 128, 255, 0, 2),
        (90, 1024, 128, 0, 0),  # 32 warps of 4,096 registers exceed the total
        (90, 128, 32, 100 << 10, 2),  # 101 KB each, of 228 KB
        (80, 128, 32, 100 << 10, 1),  # 101 KB each, of 164 KB
        (90, 128, 32, 113 << 10, 2),  # 114 KB each, exactly 228 KB
        (90, 128, 32, (113 << 10) + 1, 1),
    ],
)
def test_resident_blocks(architecture: int, threads: int, registers: int, shared: int, blocks: int) -> None:
    assert resident_blocks(architecture, threads, registers, shared) == blocks
