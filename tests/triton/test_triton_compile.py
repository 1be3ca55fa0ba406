"""The Triton kernels compiled for GPUs that need not be there: no spills, whole vectors, as in resources.json."""

import json
import re

import pytest
import torch

triton = pytest.importorskip("triton")
resources = pytest.importorskip("tests.triton.resources")

if resources.backend.refuses("cpu", torch.float32) is None:
    pytest.skip("TRITON_INTERPRET is set, so nothing is compiled", allow_module_level=True)

EVERY_TEST = [
    pytest.param(90, ["planes", "planes_odd", "rows_16", "rows_odd"], ["fp32", "bf16"], id="sm_90"),
    pytest.param(80, ["planes", "rows_16"], ["bf16"], id="sm_80"),
    pytest.param(100, ["planes", "rows_16"], ["bf16"], id="sm_100"),
]
ALL = [
    pytest.param(arch, list(resources.WAYS), list(resources.DTYPES), id=f"sm_{arch}_all", marks=pytest.mark.slow)
    for arch in resources.ARCHITECTURES
]


@pytest.mark.parametrize(("architecture", "ways", "precisions"), EVERY_TEST + ALL)
def test_resources(architecture: int, ways: list[str], precisions: list[str]) -> None:
    """Nothing spills, tensors that can be are read and written by 16 bytes, and the table is of these kernels.

    After a change of the kernels: ``python -m tests.triton.resources --write``, and look at what it changed.
    """
    rows = resources.rows_of(architecture, ways, precisions)
    table = json.loads(resources.TABLE.read_text()).get(triton.__version__, {}).get(f"sm_{architecture}", {})
    for row, (variant, usage) in rows.items():
        assert usage.spilled == 0, f"{row} spills"
        if table and (row in table or set(precisions) <= set(resources.TABLED)):
            assert [usage.registers, usage.shared] == table[row], row
        if variant.constants.get("ALIGN") == 8:
            tensors = len([name for name in variant.signature if name.endswith("_outer") or name == "outer"])
            whole = len(re.findall(r"(?:ld|st)\.global\S*\.(?:v[48]\.b32|v[24]\.b64)", usage.ptx))
            assert whole >= tensors * variant.constants["UNROLL"], f"{row}: {whole} whole vectors"


def test_instances() -> None:
    """Few kernels are compiled: what a residual network of three widths and its data need, and all of one dtype."""

    def count(ways: list[str]) -> int:
        return len({v.key for way in ways for fused in (0, 1) for v in resources.variants(way, "bf16", fused).values()})

    assert count(["planes", "planes_short"]) <= 18
    assert count(["rows_16", "rows_32", "rows_64"]) <= 25
    assert count(list(resources.WAYS)) <= 67
