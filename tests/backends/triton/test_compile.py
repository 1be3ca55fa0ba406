"""The Triton kernels compiled without a GPU: no spills, vector accesses, and the resources of resources.json."""

import json
import re
from collections import Counter

import pytest
import torch

triton = pytest.importorskip("triton")
resources = pytest.importorskip("tests.backends.triton.resources")

if resources.backend.refuses(torch.device("cpu"), torch.float32) is None:
    pytest.skip("TRITON_INTERPRET is set, so no kernel is compiled", allow_module_level=True)

RECORDINGS = resources.RECORDINGS
# The launchers request four programs on each multiprocessor, or three with records.
LEAST_RESIDENT = 2
EVERY_TEST = [
    pytest.param(90, ["planes", "planes_odd", "rows_16", "rows_odd"], ["fp32", "bf16"], RECORDINGS[:1], id="sm_90"),
    pytest.param(90, ["planes", "rows_odd"], ["bf16"], RECORDINGS[1:], id="sm_90_recorded"),
    pytest.param(80, ["planes", "rows_16"], ["bf16"], RECORDINGS[:1], id="sm_80"),
    pytest.param(100, ["planes", "rows_16"], ["bf16"], RECORDINGS[:1], id="sm_100"),
]
ALL = [
    pytest.param(
        arch,
        list(resources.ADDRESSINGS),
        list(resources.DTYPES),
        RECORDINGS,
        id=f"sm_{arch}_all",
        marks=pytest.mark.slow,
    )
    for arch in resources.ARCHITECTURES
]


# Bytes spilled by the kernels that spill, which all record, with the oldest compiler only. The first one, on sm_80 and
# sm_90, handles a few numbers per channel. The others, on sm_100, are at the limit of 168 registers.
SPILLED = {
    ("3.6.0", "statistics *fp64 *i64 recorded"): 8,
    ("3.6.0", "normalize rows_16 pure_bf16 recorded identity"): 8,
    ("3.6.0", "normalize rows_32 pure_bf16 recorded identity"): 8,
}


@pytest.mark.parametrize(("architecture", "addressings", "precisions", "recordings"), EVERY_TEST + ALL)
def test_resources(
    architecture: int, addressings: list[str], precisions: list[str], recordings: tuple[str, ...]
) -> None:
    """No kernel spills, aligned tensors are accessed 16 bytes at a time, and the table agrees with the kernels.

    After a change of the kernels run ``python -m tests.backends.triton.resources --write`` and review the changes of
    the table.
    """
    entries = resources.entries_of(architecture, addressings, precisions, recordings)
    table = json.loads(resources.TABLE.read_text()).get(triton.__version__, {}).get(f"sm_{architecture}", {})
    for name, (variant, usage) in entries.items():
        assert usage.spilled <= SPILLED.get((triton.__version__, name), 0), f"{name} spills"
        if table and (name in table or set(precisions) <= set(resources.TABLED)):
            assert usage.entry == table[name], name
        assert usage.resident >= LEAST_RESIDENT, f"{name}: {usage.resident} programs on a multiprocessor"
        if variant.constants.get("ALIGN") == 8:
            tensors = len([name for name in variant.signature if name.endswith("_outer") or name == "outer"])
            whole = len(re.findall(r"(?:ld|st)\.global\S*\.(?:v[48]\.b32|v[24]\.b64)", usage.ptx))
            assert whole >= tensors * variant.constants["UNROLL"], f"{name}: {whole} whole vectors"


def test_instances() -> None:
    """Few kernels are compiled for a residual network of three widths, its data and its update, in one dtype."""

    def count(addressings: list[str]) -> int:
        return len(
            {
                v.key
                for addressing in addressings
                for fused in (0, 1)
                for v in resources.variants(addressing, "bf16", fused).values()
            }
        )

    assert count(["planes", "planes_short"]) <= 20
    assert count(["rows_16", "rows_32", "rows_64"]) <= 27
    assert count(list(resources.ADDRESSINGS)) <= 69


def test_instances_that_record() -> None:
    """With records each kernel of a training step is compiled once more, and ``normalize`` twice."""
    for addressing in resources.ADDRESSINGS:
        plain, training, identity = (
            resources.variants(addressing, "bf16", True, recording) for recording in RECORDINGS
        )
        unrecorded = {"merge_kernel", "augment_kernel", "update_kernel", "update_running_kernel"}
        assert set(training) == set(plain) - unrecorded | {"gradient_kernel", "sample_sums_kernel"}
        assert set(identity) == {"normalize_kernel", "activation_kernel"}


def reductions(variant: resources.Variant) -> list[str]:
    """The operands of each reduction of a kernel compiled for sm_90, with the layout that determines its order."""
    module = resources.compile_for(variant, 90).ttgir
    layouts = dict(re.findall(r"^(#\w+) = (#ttg.*)$", module, re.MULTILINE))
    operands = re.findall(r"\}\) : \((tensor<.*>)\) -> .*tensor<", module)
    return sorted(re.sub(r"#\w+", lambda name: layouts.get(name[0], name[0]), text) for text in operands)


@pytest.mark.parametrize("addressing", list(resources.ADDRESSINGS))
def test_recording_keeps_the_order_of_sums(addressing: str) -> None:
    """The interpreter cannot test this. With records the reductions of the results must keep their layouts."""
    plain, recorded = (resources.variants(addressing, "bf16", True, recording) for recording in RECORDINGS[:2])
    for name in ("moments_kernel", "statistics_kernel", "grad_sums_kernel", "fold_kernel"):
        before, after = reductions(plain[name]), reductions(recorded[name])
        assert before
        assert not Counter(before) - Counter(after), name
