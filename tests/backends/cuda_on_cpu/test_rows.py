"""The CUDA kernels for rows (channels_last, N x C) on the host, with the checks of every backend.

The devices are so small that small tensors take several blocks, groups and tiles, complete and partial. Every call is
made in several orders of threads and blocks, and must always give the same bits.
"""

import mmap

import pytest
import torch

from bnkern.backends.calls import BackwardCall, ForwardCall
from tests.backends.cuda_on_cpu.native import SINGLE_READ, TWO_KERNELS, Device, OnCpu
from tests.backends.cuda_on_cpu.sandbox import sandboxed
from tests.support.batch_norm import check_add_act, check_batch_norm
from tests.support.cases import BF16, CASE, FP16, FP32, PURE, Case, Precision, Target
from tests.support.phases import check_grad_input, check_grad_sums, check_mask, check_moments, check_normalize
from tests.support.record_cases import Call, assert_same_bits, check_backward, check_forward

TARGET = Target("cuda", "cpu")

# Devices, and the strategies of their kernels.
SETUPS = {
    "two_kernels": OnCpu(Device(), TWO_KERNELS),
    "single_read": OnCpu(Device(), SINGLE_READ),
    "registers_alone": OnCpu(Device(shared_bytes=6 << 10), SINGLE_READ),
    "hybrid": OnCpu(Device(multiprocessors=2, shared_bytes=15 << 10), SINGLE_READ),
    "one_block": OnCpu(Device(multiprocessors=1), SINGLE_READ),
    "not_resident": OnCpu(Device(resident=1), SINGLE_READ),
}
EVERY_SETUP = pytest.mark.parametrize("setup", SETUPS)

OCTETS = Case("octets", (6, 16, 5, 7), "rows of whole octets, with a partial last tile", "channels_last")
WIDE = Case("wide", (150, 72), "more channels than a block takes, and a smaller last group")
CASES = [
    OCTETS,
    WIDE,
    *(CASE[name] for name in ("nc_small", "nhwc_c5_s49", "two_values", "c2048_rows")),
    *(CASE[name] for name in ("sliced_columns", "sliced_channels_last", "expanded_batch_rows")),
    *(CASE[name] for name in ("ratio_1e4_nc", "constant_rows", "inf_rows", "nan_rows", "outlier_rows")),
]
HALVES = [OCTETS, WIDE, CASE["nhwc_c5_s49"]]


def sweep(cases: list[Case], halves: list[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        ("precision", "case"),
        [
            pytest.param(precision, case, id=f"{precision.name}-{case}")
            for precision, selection in ((FP32, cases), (BF16, halves), (FP16, halves))
            for case in selection
        ],
    )


@sweep(CASES, HALVES[1:])
@sandboxed
def test_phases(precision: Precision, case: Case) -> None:
    """Each phase alone: moments, normalize, grad_sums, grad_input."""
    SETUPS["two_kernels"].passes(check_moments, TARGET, precision, case)
    for residual, act in ((False, "relu"), (True, "relu"), (True, None)):
        SETUPS["two_kernels"].passes(check_normalize, TARGET, precision, case, residual, act)
    for act in ("relu", "saved mask"):
        SETUPS["two_kernels"].passes(check_grad_sums, TARGET, precision, case, act)
        SETUPS["two_kernels"].passes(check_grad_input, TARGET, precision, case, act, True)


def check_training(setup: OnCpu, precision: Precision, case: Case) -> None:
    for act, residual in (("relu", False), ("relu", True)):
        setup.passes(check_batch_norm, TARGET, case, precision, "training", act, residual)


@sweep(CASES, HALVES)
@sandboxed
def test_training(precision: Precision, case: Case) -> None:
    """Forward and backward as one call each."""
    check_training(SETUPS["single_read"], precision, case)


@EVERY_SETUP
@sweep([OCTETS, WIDE, CASE["nhwc_c5_s49"]], [OCTETS])
@sandboxed
def test_every_setup(setup: str, precision: Precision, case: Case) -> None:
    check_training(SETUPS[setup].in_five_orders(), precision, case)


# Records need shared memory in addition to the held tiles.
RECORDING = SETUPS | {
    "registers_alone": OnCpu(Device(shared_bytes=18 << 10), SINGLE_READ),
    "hybrid": OnCpu(Device(multiprocessors=2, shared_bytes=27 << 10), SINGLE_READ),
}


@EVERY_SETUP
@sweep([WIDE], [OCTETS])
@sandboxed
def test_records_of_every_setup(setup: str, precision: Precision, case: Case) -> None:
    check_records(RECORDING[setup].in_five_orders(), precision, case, Call("training", "saved mask"))


@sandboxed
def test_records_of_rows_one_by_one() -> None:
    for call in (Call("training", "saved mask"), Call("eval", None)):
        check_records(SETUPS["two_kernels"].in_five_orders(), FP32, CASE["nhwc_c5_s49"], call)


def check_records(setup: OnCpu, precision: Precision, case: Case, call: Call) -> None:
    p = case.problem(precision)
    check_forward(setup, p, call)
    check_backward(setup, p, call, samples=False)


@sweep([WIDE, *(CASE[name] for name in ("nhwc_c5_s49", "two_values", "inf_rows", "outlier_rows"))], [WIDE])
@sandboxed
def test_records(precision: Precision, case: Case) -> None:
    for call in (Call("training", None), Call("eval", "relu"), Call("identity", "saved mask")):
        check_records(SETUPS["single_read"], precision, case, call)


@sandboxed
def test_no_room_for_a_record() -> None:
    p, call = WIDE.problem(FP32), Call("training", "relu")
    with pytest.raises(RuntimeError, match=r"record: a block needs [0-9]+ bytes of shared memory, the device gives it"):
        check_forward(SETUPS["registers_alone"], p, call)


@pytest.mark.slow
@EVERY_SETUP
@sweep(CASES, CASES[:-5])
@sandboxed
def test_every_setup_with_every_case(setup: str, precision: Precision, case: Case) -> None:
    check_training(SETUPS[setup]._replace(seeds=tuple(range(10, 20))), precision, case)


@pytest.mark.parametrize("case", [OCTETS, CASE["nhwc_c5_s49"]], ids=str)
@sandboxed
def test_other_calls(case: Case) -> None:
    """Without affine parameters, in eval mode, modules in half precision, and without normalisation or mask."""
    for affine in ("wb", "w", "-"):
        SETUPS["two_kernels"].passes(check_batch_norm, TARGET, case, FP32, "eval", "relu", True, affine)
        SETUPS["single_read"].passes(check_batch_norm, TARGET, case, FP32, "untracked", None, False, affine)
    SETUPS["single_read"].passes(check_batch_norm, TARGET, case, PURE[0], "training", "relu", True)
    SETUPS["two_kernels"].passes(check_add_act, TARGET, FP32, case, "relu", True)
    SETUPS["two_kernels"].passes(check_mask, TARGET, case)


@pytest.mark.parametrize("setup", ["two_kernels", "single_read"])
@sandboxed
def test_cumulative_momentum(setup: str) -> None:
    """The running statistics of several batches are their mean, and the counter is incremented once per batch."""
    p = WIDE.problem(FP32)
    running, counter = [torch.zeros(72), torch.ones(72)], torch.tensor(0)
    batches = [p.x + shift for shift in (0.0, 1.0, 5.0)]
    for x in batches:
        SETUPS[setup].forward(ForwardCall(x, None, None, None, *running, counter, True, None, 1e-5, None, False))
    assert counter.item() == 3
    means = [torch.stack([f(x.double()) for x in batches]).mean(0) for f in (lambda x: x.mean(0), lambda x: x.var(0))]
    for actual, expected in zip(running, means, strict=True):
        # Three updates, each of a few roundings to float32.
        torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=1e-6)


@sandboxed
def test_schedules_strategies_and_residency_change_no_bit() -> None:
    """Twelve orders of threads and blocks. If the single kernel does not fit the device, two kernels replace it."""
    seeds = tuple(range(12))
    for precision in (FP32, BF16):
        for case in (OCTETS, WIDE):
            p = case.problem(precision)
            one_kernel = OnCpu(Device(), SINGLE_READ, seeds)
            partly_held = OnCpu(Device(shared_bytes=11 << 10), SINGLE_READ, seeds[:2])
            two_kernels = OnCpu(Device(resident=1), SINGLE_READ, seeds[:2])
            results = []
            for kernels in (one_kernel, partly_held, two_kernels):
                rest = (True, 0.1, 1e-5, "relu", True)
                y, *saved = kernels.forward(ForwardCall(p.x, p.weight, p.bias, p.residual, None, None, None, *rest))
                grads = kernels.backward(BackwardCall(p.dy, p.x, p.weight, p.bias, *saved, "relu", True, (True,) * 4))
                results.append([y, *saved, *grads])
            assert_same_bits(results[0], results[1], "what is read again")
            assert_same_bits(results[0], results[2], "two kernels in place of one")


def far_apart(rows: int, channels: int, step: int) -> torch.Tensor:
    """Rows that are ``step`` elements apart. Only the pages that are accessed are allocated."""
    size = ((rows - 1) * step + channels) * 2
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)  # MAP_NORESERVE
    return torch.frombuffer(memory, dtype=torch.bfloat16).as_strided((rows, channels), (step, 1))


@pytest.mark.parametrize("channels", [16, 5])
@pytest.mark.parametrize("setup", ["two_kernels", "single_read"])
@sandboxed
def test_offsets_beyond_31_bits(setup: str, channels: int) -> None:
    """The last rows are 2^32 elements after the first ones."""
    rows, step = 65, (1 << 26) + 8
    x, dy = far_apart(rows, channels, step), far_apart(rows, channels, step)
    assert (rows - 1) * step > 2**32
    p = Case("far", (rows, channels), "").problem(BF16)
    results = []
    for of_x, of_dy in ((x.copy_(p.x), dy.copy_(p.dy)), (p.x, p.dy)):
        kernels = SETUPS[setup]
        y, *saved = kernels.forward(
            ForwardCall(of_x, p.weight, p.bias, None, None, None, None, True, 0.1, 1e-5, "relu", False)
        )
        needs = (True, True, True, False)
        results.append(
            [y, *saved, *kernels.backward(BackwardCall(of_dy, of_x, p.weight, p.bias, *saved, "relu", True, needs))]
        )
    assert_same_bits(*results, "far apart and side by side")
