"""The CUDA kernels compiled for GPUs that need not be there: few, without spills, by whole vectors, as tabled."""

import json
import re
import shutil

import pytest

from bnkern import _native
from tests.backends.cuda import resources

pytestmark = pytest.mark.skipif(
    not _native.build_info()["cuda"] or not resources.tool("cuobjdump") or not shutil.which("c++filt"),
    reason="built without CUDA, or no tool to look into machine code",
)
ARCHITECTURES = [
    90,
    *(
        pytest.param(architecture, marks=pytest.mark.slow)
        for architecture in resources.ARCHITECTURES
        if architecture != 90
    ),
]


def built(architecture: int):
    """The machine code, where this test run has it or can make it without taking long."""
    archs = _native.build_info()["cuda_archs"]
    if architecture == 90 and not {"90", "90-real"} & set(archs):
        pytest.skip(f"built for {' '.join(archs)}")
    return resources.compiled(architecture)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_resources(architecture: int) -> None:
    """No kernel spills, and the table is of these kernels.

    After a change of the kernels: ``python -m tests.backends.cuda.resources --write``, and look at what it changed.
    """
    usage = resources.usage(built(architecture), architecture)
    print(f"{len(usage)} kernels for sm_{architecture}")
    assert 0 < len(usage) < resources.MOST_INSTANCES
    assert not {name for name, (_, stack) in usage.items() if stack}, "spills"
    table = json.loads(resources.TABLE.read_text()).get(resources.nvcc_version() or "", {})
    tabled = table.get(f"sm_{architecture}")
    if tabled is not None:
        assert {name: list(values) for name, values in usage.items()} == tabled


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_whole_vectors(architecture: int) -> None:
    """Kernels that read or write tensors by octets do so by 16 bytes: a thread's octets of a tile, 64 bytes of each
    tensor read, and as many of each written. Whether they record changes nothing of that."""
    for name, widths in resources.accesses(built(architecture), architecture).items():
        arguments = name[name.find("<") + 1 : -1].split(", ")
        if name.startswith("planes_"):
            reads, writes = (8 if "backward" in name else 4), arguments[2] == "true"
        elif re.match("rows_(moments|grad_sums)_kernel", name):
            if arguments[1] == "1":
                continue
            reads, writes = 4, False  # 64 bytes of one tensor, or 32 of each of two
        elif re.match("rows_(normalize|forward|grad_input|backward)_kernel", name):
            reads, writes = 4, True
        else:
            continue
        assert widths["LD"] >= reads, f"{name}: {widths}"
        assert widths["ST"] >= (4 if writes else 0), f"{name}: {widths}"
