"""The CUDA kernels for rows (channels_last, N x C) on the host, by the checks that every backend passes.

Devices are so small that little tensors take several blocks, groups and tiles, whole and ragged; every call is made in
several orders of threads and blocks, and must give the same bits each time.
"""

import pytest
import torch

import bnkern
from bnkern import backends
from tests import test_batch_norm as of_batch_norm
from tests import test_grad_input as of_grad_input
from tests import test_grad_sums as of_grad_sums
from tests import test_moments as of_moments
from tests import test_normalize as of_normalize
from tests.cases import BF16, CASE, FP16, FP32, PURE, Case, Precision, Target
from tests.cuda_on_cpu.native import SINGLE_READ, TWO_KERNELS, Device, OnCpu
from tests.cuda_on_cpu.sandbox import sandboxed

TARGET = Target("cuda", "cpu")

# What a device makes of a tensor, and how its kernels read it.
WAYS = {
    "two_kernels": OnCpu(Device(), TWO_KERNELS),
    "single_read": OnCpu(Device(), SINGLE_READ),
    "registers_alone": OnCpu(Device(shared_bytes=6 << 10), SINGLE_READ),
    "hybrid": OnCpu(Device(multiprocessors=2, shared_bytes=10 << 10), SINGLE_READ),
    "one_block": OnCpu(Device(multiprocessors=1), SINGLE_READ),
    "not_resident": OnCpu(Device(resident=1), SINGLE_READ),
}
EVERY_WAY = pytest.mark.parametrize("way", WAYS)

OCTETS = Case("octets", (6, 16, 5, 7), "rows of whole octets, ragged at the end", "channels_last")
WIDE = Case("wide", (150, 72), "more channels than a block takes, the last group with fewer")
CASES = [
    OCTETS,
    WIDE,
    *(CASE[name] for name in ("nc_small", "nhwc_c5_s49", "two_values", "c2048_rows")),
    *(CASE[name] for name in ("sliced_columns", "sliced_channels_last", "expanded_batch_rows")),
    *(CASE[name] for name in ("ratio_1e4_nc", "constant_rows", "inf_rows", "nan_rows", "outlier_rows")),
]
HALVES = [OCTETS, WIDE, CASE["nhwc_c5_s49"]]
SWEEP = pytest.mark.parametrize(
    ("precision", "case"),
    [
        pytest.param(precision, case, id=f"{precision.name}-{case}")
        for precision, cases in ((FP32, CASES), (BF16, HALVES), (FP16, HALVES))
        for case in cases
    ],
)


def with_kernels(way: str, check, *args) -> None:
    """The check with these kernels in the place of the backend "cuda"."""
    kernels = WAYS[way]
    chosen, backends.choose = backends.choose, lambda name, device, dtype: kernels
    try:
        with bnkern.use_backend("cuda"):
            check(*args)
    finally:
        backends.choose = chosen


@pytest.mark.parametrize("way", ["two_kernels", "one_block"])
@SWEEP
@sandboxed
def test_phases(way: str, precision: Precision, case: Case) -> None:
    """Each phase by itself: moments, normalize, grad_sums, grad_input."""
    with_kernels(way, of_moments.test_against_float64, TARGET, precision, case)
    for residual, act in ((False, "relu"), (True, "relu"), (True, None)):
        with_kernels(way, of_normalize.test_against_float64, TARGET, precision, case, residual, act)
    for act in ("relu", "saved mask"):
        with_kernels(way, of_grad_sums.test_against_float64, TARGET, precision, case, act)
        with_kernels(way, of_grad_input.test_against_float64, TARGET, precision, case, act, True)


@EVERY_WAY
@SWEEP
@sandboxed
def test_training(way: str, precision: Precision, case: Case) -> None:
    """Forward and backward as one call each."""
    for act, residual in (("relu", False), ("relu", True), (None, False)):
        with_kernels(way, of_batch_norm.check, TARGET, case, precision, "training", act, residual)
