"""The CUDA kernels compiled without a GPU: resources of the table, no spills, and what their latency depends on."""

import json
import shutil
from collections.abc import Iterator
from typing import NamedTuple

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


EVERY_ARCHITECTURE = pytest.mark.parametrize("architecture", ARCHITECTURES)


class Kernel(NamedTuple):
    """The name of a kernel and its template arguments."""

    name: str
    family: str  # rows_forward, planes_backward, ...
    arguments: list[str]

    @property
    def wide(self) -> bool:
        """Whether it reads octets, 16 bytes at a time."""
        if self.family.startswith("planes"):
            return self.arguments[4] == "true"
        if self.family in ("rows_moments", "rows_grad_sums"):
            return self.arguments[1] == "8"
        return self.family in ("rows_forward", "rows_backward", "rows_normalize", "rows_grad_input")

    @property
    def phases(self) -> tuple[bool, bool]:
        """Whether it computes the first phase of its direction, and the second."""
        if self.family.startswith("planes"):
            return self.arguments[1] == "true", self.arguments[2] == "true"
        return (
            self.family in ("rows_forward", "rows_backward", "rows_moments", "rows_grad_sums"),
            self.family in ("rows_forward", "rows_backward", "rows_normalize", "rows_grad_input"),
        )

    @property
    def records(self) -> bool:
        return {"planes": self.arguments[3:4], "rows": self.arguments[-1:]}[self.family.split("_")[0]] == ["true"]

    @property
    def backward(self) -> bool:
        return "backward" in self.family or "grad" in self.family


def kernels(architecture: int) -> Iterator[tuple[Kernel, resources.Resources]]:
    for name, values in resources.read(built(architecture), architecture).items():
        family, _, arguments = name.rstrip(">").partition("_kernel<")
        yield Kernel(name, family, arguments.split(", ")), values


def octet_kernels(architecture: int) -> Iterator[tuple[Kernel, resources.Resources]]:
    """The kernels that read tensors 16 bytes at a time."""
    found = [(kernel, values) for kernel, values in kernels(architecture) if kernel.wide]
    assert len(found) > 40
    yield from found


@EVERY_ARCHITECTURE
def test_resources(architecture: int) -> None:
    """No kernel spills, and the table agrees with the kernels.

    After a change of the kernels run ``python -m tests.backends.cuda.resources --write`` and review the changes of the
    table.
    """
    found = resources.read(built(architecture), architecture)
    print(f"{len(found)} kernels for sm_{architecture}")
    assert 0 < len(found) < resources.MOST_INSTANCES
    assert not {name for name, values in found.items() if values.stack}, "spills"
    table = json.loads(resources.TABLE.read_text()).get(resources.nvcc_version() or "", {})
    expected = table.get(f"sm_{architecture}")
    if expected is not None:
        assert {name: list(values) for name, values in found.items()} == expected


@EVERY_ARCHITECTURE
def test_whole_vectors(architecture: int) -> None:
    """Kernels that work on octets access 16 bytes at a time.

    In a tile a thread has 64 bytes of each tensor in planes. In rows it has 64 bytes of one tensor or 32 of each of
    two.
    """
    for kernel, values in octet_kernels(architecture):
        reads = 8 if kernel.family == "planes_backward" else 4
        assert values.vector_loads >= reads, f"{kernel.name}: {values}"
        assert values.vector_stores >= (4 if kernel.phases[1] else 0), f"{kernel.name}: {values}"


@EVERY_ARCHITECTURE
def test_the_update_accesses_whole_vectors(architecture: int) -> None:
    """A thread reads 32 bytes of each of three tensors, or of two and a gradient in bfloat16."""
    values = resources.read(built(architecture), architecture)["update_kernel"]
    assert values.vector_loads >= 6 and values.vector_stores >= 4, values


@EVERY_ARCHITECTURE
def test_a_convolution_loads_its_operands_together(architecture: int) -> None:
    """All loads of an image, its residual and the weights are issued before the first of them is waited for.

    A thread has 8 octets of each image, and stores 8 of y and 8 of r.
    """
    found = [(kernel, values) for kernel, values in kernels(architecture) if kernel.family == "conv_norm_forward"]
    assert len(found) == 6
    for kernel, values in found:
        weights = {"16": 2, "32": 5, "64": 18}[kernel.arguments[1]]
        assert values.first_loads == values.vector_loads == 16 + weights, f"{kernel.name}: {values}"
        assert values.vector_stores == 16, f"{kernel.name}: {values}"


@EVERY_ARCHITECTURE
def test_loads_of_a_tile_are_issued_together(architecture: int) -> None:
    """A thread waits for the first load of its first tile when all loads of the tile have been issued.

    The bytes of the mask belong to them. Coefficients are read later.
    """
    for kernel, values in octet_kernels(architecture):
        loads = 8 if kernel.family == "planes_backward" else 4
        octets = loads // 2 if kernel.arguments[0] != "float" else loads // 4  # of dy, each with a byte of the mask
        assert values.first_loads >= loads, f"{kernel.name}: {values}"
        assert values.first_bytes == (octets if kernel.backward else 0), f"{kernel.name}: {values}"


@EVERY_ARCHITECTURE
def test_instructions_before_the_first_load(architecture: int) -> None:
    """Before the first load there are only addresses. Reading coefficients first took 430 to 1,500 instructions."""
    for kernel, values in octet_kernels(architecture):
        limit = 130 if kernel.family.startswith("rows") else 240
        assert values.before_loads < limit, f"{kernel.name}: {values}"


@EVERY_ARCHITECTURE
def test_the_next_tile_is_loaded_ahead(architecture: int) -> None:
    """Each loop over tiles issues the loads of the next tile before it waits for them."""
    for kernel, values in octet_kernels(architecture):
        tile = 8 if kernel.family == "planes_backward" else 4
        assert values.ahead >= tile * sum(kernel.phases), f"{kernel.name}: {values}"


@EVERY_ARCHITECTURE
def test_parts_of_other_blocks_are_loaded_together(architecture: int) -> None:
    for kernel, values in octet_kernels(architecture):
        if kernel.family.startswith("rows") and kernel.phases[0]:
            assert values.parts_in_flight >= 6, f"{kernel.name}: {values}"


@EVERY_ARCHITECTURE
def test_the_residual_is_loaded_while_blocks_wait(architecture: int) -> None:
    """The one kernel of the forward loads the residual of its last tile between arrival and wait."""
    for kernel, values in octet_kernels(architecture):
        one_kernel = not kernel.backward and kernel.phases == (True, True)
        if one_kernel and (kernel.family.startswith("rows") or architecture >= 90):
            assert values.while_waiting >= 4, f"{kernel.name}: {values}"


@EVERY_ARCHITECTURE
def test_coefficients_and_statistics_are_loaded_while_blocks_wait(architecture: int) -> None:
    """Weight, bias and both running statistics are loaded between arrival and wait, and no scalar after the wait.

    Then only the parts of the other blocks are loaded before the results are stored.
    """
    for kernel, values in octet_kernels(architecture):
        if kernel.records or kernel.phases != (True, True):
            continue
        if kernel.family.startswith("rows") or architecture >= 90:
            assert values.scalars_while_waiting >= (0 if kernel.backward else 4), f"{kernel.name}: {values}"
            assert values.scalars_late == 0, f"{kernel.name}: {values}"


@EVERY_ARCHITECTURE
def test_no_thread_waits_for_its_arrival(architecture: int) -> None:
    """Blocks of one kernel arrive at their barrier without a result. With one, a shuffle waits for it before the
    loads that follow."""
    for kernel, values in octet_kernels(architecture):
        if kernel.phases == (True, True) and kernel.family.startswith("rows"):
            assert values.arrival == "RED", f"{kernel.name}: {values}"


@EVERY_ARCHITECTURE
def test_sums_are_joined_by_shuffles(architecture: int) -> None:
    """A tree over lanes joins the sums of threads and then those of blocks, two numbers of 64 bits each time."""
    for kernel, values in octet_kernels(architecture):
        if kernel.family.startswith("rows") and kernel.phases[0]:
            assert values.shuffles >= 2 * 4, f"{kernel.name}: {values}"


@EVERY_ARCHITECTURE
def test_two_blocks_of_the_two_kernels_are_resident(architecture: int) -> None:
    """The plan of two kernels has two blocks of 256 threads for each multiprocessor.

    The registers of rows allow exactly two, those of some kernels of planes three.
    """
    for kernel, values in octet_kernels(architecture):
        if kernel.phases == (True, True):
            continue
        blocks = 65_536 // (256 * -(-values.registers // 8) * 8)
        assert blocks >= 2, f"{kernel.name}: {values}"
        if architecture == 90 and kernel.family.startswith("rows"):
            assert blocks == 2, f"{kernel.name}: {values}"


@EVERY_ARCHITECTURE
def test_cluster_barriers(architecture: int) -> None:
    """The last barrier of a cluster is arrived at early and relaxed.

    An arrival with release at the end would wait until all stores of the block have reached the memory.
    """
    for kernel, values in kernels(architecture):
        clusters = kernel.family.startswith("planes") and kernel.phases == (True, True) and architecture >= 90
        assert values.cluster_barriers == ("Rwrw" if clusters else ""), f"{kernel.name}: {values}"


@EVERY_ARCHITECTURE
def test_code_size(architecture: int) -> None:
    """Kernels are mostly straight code that runs once, so each of its bytes has to be fetched."""
    for kernel, values in octet_kernels(architecture):
        if not kernel.records:
            assert values.code <= (44 << 10), f"{kernel.name}: {values}"
