"""The CUDA kernels compiled without a GPU: few kernels, no spills, vector accesses, and the resources of the table."""

import json
import re
import shutil

import pytest

from bnkern import _native
from tests.backends.cuda import resources

pytestmark = pytest.mark.skipif(
    not _native.build_info()["cuda"] or not resources.tool("cuobjdump") or not shutil.which("c++filt"),
    reason="the module was built without CUDA, or no tool can read machine code",
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
    """The machine code, if this test run has it or can make it quickly."""
    archs = _native.build_info()["cuda_archs"]
    if architecture == 90 and not {"90", "90-real"} & set(archs):
        pytest.skip(f"built for {' '.join(archs)}")
    return resources.compiled(architecture)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_resources(architecture: int) -> None:
    """No kernel spills, and the table agrees with the kernels.

    After a change of the kernels run ``python -m tests.backends.cuda.resources --write`` and review the changes of the
    table.
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
    """Kernels that work on octets access 16 bytes at a time.

    In a tile a thread has 64 bytes of each tensor that is read, and as many of each tensor that is written. Records do
    not change these numbers.
    """
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
        elif name == "update_kernel":
            reads, writes = 6, True  # 32 bytes of each of three tensors; further ones for a gradient in bfloat16
        else:
            continue
        assert widths["LD"] >= reads, f"{name}: {widths}"
        assert widths["ST"] >= (4 if writes else 0), f"{name}: {widths}"
