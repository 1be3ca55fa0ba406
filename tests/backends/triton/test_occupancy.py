"""Occupancy by hand, where each of the limits is the one that binds."""

import pytest

from tests.backends.triton.occupancy import resident_blocks


@pytest.mark.parametrize(
    ("architecture", "threads", "registers", "shared", "blocks"),
    [
        (90, 128, 32, 0, 16),  # 64 warps by 4
        (90, 32, 32, 0, 32),  # no more than 32 blocks
        (90, 128, 33, 0, 12),  # 33 registers count as 40: 1,280 a warp, 51 warps
        (90, 128, 128, 0, 4),  # 4,096 registers a warp: 16 warps
        (90, 128, 255, 0, 2),
        (90, 1024, 128, 0, 0),  # 32 warps of 4,096 registers are more than there are
        (90, 128, 32, 100 << 10, 2),  # 101 KB each, of 228
        (80, 128, 32, 100 << 10, 1),  # of 164
        (90, 128, 32, 113 << 10, 2),  # 114 KB each: just
        (90, 128, 32, (113 << 10) + 1, 1),
    ],
)
def test_resident_blocks(architecture: int, threads: int, registers: int, shared: int, blocks: int) -> None:
    assert resident_blocks(architecture, threads, registers, shared) == blocks
