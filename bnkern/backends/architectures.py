"""Selects the code of the native module for a GPU from the architectures for which the module was compiled.

Entries are written as in CMake: "90" is machine code and PTX, "90-real" only machine code, "90-virtual" only PTX.
Sources: CUDA C++ Programming Guide, "Compute Capability and Application Compatibility", and NVIDIA's description of
architecture-specific ("90a") and family-specific ("100f") targets.
"""

import re
from collections.abc import Iterable

Capability = tuple[int, int]

_ENTRY = re.compile(r"(\d+)(\d)([af]?)(-real|-virtual)?")
# Integrated GPUs (Jetson). They do not run machine code for other GPUs of their major capability, and vice versa.
_INTEGRATED = {(7, 2), (8, 7), (10, 1)}


def _machine_code_runs(compiled: Capability, suffix: str, device: Capability) -> bool:
    if suffix == "a" or {compiled, device} & _INTEGRATED:
        return device == compiled
    return device[0] == compiled[0] and device[1] >= compiled[1]


def _ptx_runs(compiled: Capability, suffix: str, device: Capability) -> bool:
    if suffix:
        return _machine_code_runs(compiled, suffix, device)
    return device >= compiled


def serving(device: Capability, architectures: Iterable[str]) -> Capability | None:
    """The capability of the compiled code that a GPU of capability ``device`` runs, or None if it runs none.

    Machine code runs on later minor capabilities of the same major capability, and is preferred. PTX runs on every
    later capability. ``__CUDA_ARCH__`` in the kernels is the returned capability, not the device's.

    Raises ValueError for an entry that is not an architecture.
    """
    machine_code, ptx = [], []
    for entry in architectures:
        match = _ENTRY.fullmatch(entry)
        if match is None:
            raise ValueError(f"not a CUDA architecture: {entry!r}")
        major, minor, suffix, kind = match.groups()
        compiled = (int(major), int(minor))
        if kind != "-virtual" and _machine_code_runs(compiled, suffix, device):
            machine_code.append(compiled)
        if kind != "-real" and _ptx_runs(compiled, suffix, device):
            ptx.append(compiled)
    return max(machine_code or ptx, default=None)
