"""The CUDA kernels for planes (NCHW) on the host, with the checks of every backend, like test_rows.py."""

import pytest
import torch

from bnkern.backends.calls import BackwardCall, ForwardCall
from tests.backends.cuda_on_cpu.native import SINGLE_READ, TWO_KERNELS, Device, OnCpu
from tests.backends.cuda_on_cpu.sandbox import sandboxed
from tests.support.batch_norm import check_batch_norm
from tests.support.cases import BF16, CASE, EPS, FP16, FP32, Case, Precision, Target
from tests.support.phases import check_grad_input, check_grad_sums, check_moments, check_normalize
from tests.support.record_cases import Call, check_backward, check_forward

TARGET = Target("cuda", "cpu")
ROOM = 1024  # bytes of shared memory that planes need in addition to their tiles
# Devices and the strategies that they cause. A tile of 32 or 64 threads has 2 KB or 4 KB of each tensor.
SETUPS = {
    "two_kernels": OnCpu(Device(), TWO_KERNELS),
    "clusters": OnCpu(Device(multiprocessors=64), SINGLE_READ),
    # one part per channel, held completely
    "one_part": OnCpu(Device(multiprocessors=1, shared_bytes=1 << 20), SINGLE_READ),
    "registers_alone": OnCpu(Device(threads=32, shared_bytes=ROOM), SINGLE_READ),  # only the last tile is held
    "hybrid": OnCpu(Device(threads=32, shared_bytes=ROOM + (8 << 10)), SINGLE_READ),
    "no_clusters": OnCpu(Device(clusters=False), SINGLE_READ),
    "not_resident": OnCpu(Device(multiprocessors=64, resident=1), SINGLE_READ),
}

LONG = Case("long", (2, 2, 97, 48), "a channel of four parts, several tiles, whole vectors")
QUADS = Case("quads", (9, 2, 14, 14), "planes of whole quads: vectors of 8 bytes in half precision")
ODD = Case("odd", (80, 2, 7, 7), "planes of 49, two parts")
CASES = [
    LONG,
    QUADS,
    ODD,
    *(CASE[name] for name in ("nchw_tail", "ncl_s7", "two_values_planes", "many_samples")),
    *(CASE[name] for name in ("misaligned", "sliced_channels", "sliced_batch", "expanded_batch", "sliced_space")),
    *(CASE[name] for name in ("ratio_1e3", "ratio_1e4", "constant", "inf", "nan", "outlier")),
]
SWEEP = pytest.mark.parametrize(
    ("precision", "case"),
    [
        pytest.param(precision, case, id=f"{precision.name}-{case}")
        for precision, cases in ((FP32, CASES), (BF16, [LONG, QUADS]), (FP16, [ODD, CASE["misaligned"]]))
        for case in cases
    ],
)


@pytest.mark.parametrize("setup", SETUPS)
@pytest.mark.parametrize(("precision", "case"), [(FP32, LONG), (BF16, ODD)], ids=["fp32-long", "bf16-odd"])
@sandboxed
def test_every_setup(setup: str, precision: Precision, case: Case) -> None:
    """Forward and backward as one call each, with every strategy."""
    for act, residual in (("relu", False), ("relu", True)):
        SETUPS[setup].in_five_orders().passes(check_batch_norm, TARGET, case, precision, "training", act, residual)


@SWEEP
@sandboxed
def test_training(precision: Precision, case: Case) -> None:
    for act, residual in (("relu", False), ("relu", True)):
        SETUPS["hybrid"].passes(check_batch_norm, TARGET, case, precision, "training", act, residual)


@pytest.mark.parametrize("setup", SETUPS)
@pytest.mark.parametrize(("precision", "case"), [(FP32, LONG), (BF16, ODD)], ids=["fp32-long", "bf16-odd"])
@sandboxed
def test_records_of_every_setup(setup: str, precision: Precision, case: Case) -> None:
    p, call = case.problem(precision), Call("training", "saved mask")
    check_forward(SETUPS[setup].in_five_orders(), p, call)
    check_backward(SETUPS[setup].in_five_orders(), p, call, samples=False)


@pytest.mark.parametrize(
    "case", [ODD, *(CASE[name] for name in ("nchw_tail", "misaligned", "ratio_1e4", "nan"))], ids=str
)
@pytest.mark.parametrize("precision", [FP32, BF16], ids=lambda p: p.name)
@sandboxed
def test_records(precision: Precision, case: Case) -> None:
    p = case.problem(precision)
    for call in (Call("training", None), Call("eval", "relu"), Call("identity", "saved mask")):
        check_forward(SETUPS["hybrid"], p, call)
        check_backward(SETUPS["hybrid"], p, call, samples=False)


@SWEEP
@sandboxed
def test_phases(precision: Precision, case: Case) -> None:
    """Each phase alone: moments, normalize, grad_sums, grad_input."""
    setup = SETUPS["two_kernels"]
    setup.passes(check_moments, TARGET, precision, case)
    for residual, act in ((False, "relu"), (True, "relu"), (True, None)):
        setup.passes(check_normalize, TARGET, precision, case, residual, act)
    for act in ("relu", "saved mask"):
        setup.passes(check_grad_sums, TARGET, precision, case, act)
        setup.passes(check_grad_input, TARGET, precision, case, act, True)


@pytest.mark.parametrize("precision", [FP32, BF16], ids=lambda p: p.name)
@pytest.mark.parametrize("case", [LONG, ODD], ids=str)
@sandboxed
def test_same_bits_if_clusters_do_not_fit(precision: Precision, case: Case) -> None:
    p, results = case.problem(precision), []
    for setup in (SETUPS["clusters"], SETUPS["not_resident"]):
        y, *saved = setup.forward(ForwardCall(
            p.x, p.weight, p.bias, p.residual, None, None, None, True, 0.1, EPS, "relu", True
        ))  # fmt: skip
        grads = setup.backward(BackwardCall(p.dy, p.x, p.weight, p.bias, *saved, "relu", True, (True,) * 4))
        results.append([t.contiguous().view(torch.uint8) for t in (y, *saved, *grads)])
    assert all(map(torch.equal, *results))
