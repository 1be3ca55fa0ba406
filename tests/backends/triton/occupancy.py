"""The number of blocks of a kernel that fit on a multiprocessor, from the compiler's resource usage.

A multiprocessor of NVIDIA's data-centre GPUs has 65,536 registers, which are allocated to whole warps in units of 256,
room for 64 warps and 32 blocks, and shared memory, of which each block takes 1 KB more than it requests. (CUDA C++
Programming Guide, "Compute Capabilities".)
"""

from math import ceil

WARP = 32
REGISTERS, WARPS, BLOCKS = 65536, 64, 32
SHARED = {80: 164 << 10, 90: 228 << 10, 100: 228 << 10}  # bytes, by architecture
RESERVED = 1 << 10


def resident_blocks(architecture: int, threads: int, registers: int, shared: int) -> int:
    """The number of resident blocks, from threads, registers per thread and bytes of shared memory.

    0 means that none fits.
    """
    warps = ceil(threads / WARP)
    per_warp = ceil(registers * WARP / 256) * 256
    by_registers = REGISTERS // per_warp // warps if per_warp else BLOCKS
    by_shared = SHARED[architecture] // (ceil((shared + RESERVED) / 128) * 128)
    return min(BLOCKS, WARPS // warps, by_registers, by_shared)
