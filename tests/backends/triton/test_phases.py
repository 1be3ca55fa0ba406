"""The Triton kernels through the interpreter, with the checks of every backend on fewer cases, because it is slow.

On a GPU the shared tests run all their cases with compiled kernels. Tiles are small (see interpreter.py), so that small
tensors have several, complete and partial.
"""

import pytest
import torch

import bnkern
from bnkern import backends
from bnkern.backends import reference
from bnkern.backends.calls import BackwardCall, ForwardCall
from tests.backends.triton.gpu import LARGE, on_gpu
from tests.backends.triton.interpreter import interpreted
from tests.support.batch_norm import check_batch_norm
from tests.support.cases import BF16, CASE, FP16, FP32, FP64, PURE, Case, Precision, Target
from tests.support.phases import (
    check_empty_moments,
    check_grad_input,
    check_grad_input_without,
    check_grad_sums,
    check_grad_sums_without,
    check_mask,
    check_merge,
    check_merge_counts,
    check_merge_of_nothing,
    check_moments,
    check_normalize,
    check_normalize_without,
)

pytest.importorskip("triton")

TRITON = Target("triton", "cpu")

# Each way of addressing memory: planes and rows, by vectors of 8, of 4 and element by element, flat, strided, copied.
CASES = [
    Case("octets", (3, 3, 8, 8), "planes of whole octets: 16-byte vectors"),
    Case("quads", (3, 2, 4, 5), "planes that end with half an octet"),
    Case("octet_rows", (5, 16, 3, 3), "rows of whole octets", "channels_last"),
    Case("wide_octet_rows", (20, 72), "rows of more channels than a program takes"),
    *(CASE[name] for name in ("nchw_s49", "nc_small", "nhwc_c5_s49", "nhwc_c17", "c1", "two_values")),
    *(CASE[name] for name in ("sliced_channels", "expanded_batch_rows", "expanded_space", "misaligned")),
]
FEW = [case for case in CASES if case.name in ("octets", "octet_rows", "nchw_s49", "nhwc_c17")]
HARD = [
    Case(f"{odd or 'ratio_1e4'}_{layout}", (4, 3, 7, 8), "many tiles of few values", layout, 1.0 if odd else 1e4, odd)
    for odd in ("", "constant", "inf", "nan", "outlier")
    for layout in ("contiguous", "channels_last")
]


def sweep(hard: list[Case]) -> pytest.MarkDecorator:
    """All cases in float32, the main ones in the other dtypes, and difficult values."""
    selection = ((FP32, CASES + hard), (FP64, FEW[:2]), (BF16, FEW), (FP16, FEW))
    return pytest.mark.parametrize(
        ("precision", "case"),
        [
            pytest.param(precision, case, id=f"{precision.name}-{case}")
            for precision, cases in selection
            for case in cases
        ],
    )


# ------------------------------------------------------------------------------------------------- the phases


@sweep(HARD)
def test_moments(precision: Precision, case: Case) -> None:
    interpreted(check_moments, TRITON, precision, case)


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4, 4), (2, 3, 0, 4)])
def test_moments_of_nothing(shape: tuple[int, ...]) -> None:
    interpreted(check_empty_moments, TRITON, shape)


@pytest.mark.parametrize("case", ["ratio_1e4", "outlier", "constant"])
@pytest.mark.parametrize("split", ["uneven", "with_empty"])
def test_merge(case: str, split: str) -> None:
    interpreted(check_merge, TRITON, FP32, case, split)


def test_merge_counts() -> None:
    interpreted(check_merge_of_nothing, TRITON)
    interpreted(check_merge_counts, TRITON)


@sweep([])
def test_normalize(precision: Precision, case: Case) -> None:
    interpreted(check_normalize, TRITON, precision, case, False, "relu")
    interpreted(check_normalize, TRITON, precision, case, True, "relu")


@pytest.mark.parametrize("case", FEW, ids=str)
def test_nan_and_zero_in_the_mask(case: Case) -> None:
    interpreted(check_mask, TRITON, case)


@sweep([])
def test_grad_sums(precision: Precision, case: Case) -> None:
    interpreted(check_grad_sums, TRITON, precision, case, "relu")
    interpreted(check_grad_sums, TRITON, precision, case, "saved mask")


@sweep([])
def test_grad_input(precision: Precision, case: Case) -> None:
    interpreted(check_grad_input, TRITON, precision, case, "relu", True)
    interpreted(check_grad_input, TRITON, precision, case, "saved mask", True)


@pytest.mark.parametrize("without", ["weight", "bias", "affine", "identity"])
@pytest.mark.parametrize("case", FEW[:2], ids=str)
def test_parts_left_out(case: Case, without: str) -> None:
    interpreted(check_normalize_without, TRITON, FP32, case, without, True, None)
    interpreted(check_grad_sums_without, TRITON, FP32, case, without, "relu")
    interpreted(check_grad_input_without, TRITON, FP32, case, without, "relu")


# ------------------------------------------------------------------------------------------------ end to end


def end_to_end(precision: Precision, case: Case, mode: str, act: str | None, with_residual: bool) -> None:
    with bnkern.use_backend("triton"):
        check_batch_norm(TRITON, case, precision, mode, act, with_residual)


@pytest.mark.parametrize("mode", ["training", "untracked", "eval"])
@pytest.mark.parametrize("case", FEW, ids=str)
def test_batch_norm(case: Case, mode: str) -> None:
    interpreted(end_to_end, FP32, case, mode, "relu", True)
    interpreted(end_to_end, FP32, case, mode, None, False)


@pytest.mark.parametrize("case", HARD, ids=str)
def test_hard_numbers(case: Case) -> None:
    interpreted(end_to_end, FP32, case, "untracked", "relu", False)


@pytest.mark.parametrize("precision", PURE, ids=lambda p: p.name)
def test_modules_of_halves(precision: Precision) -> None:
    interpreted(end_to_end, precision, CASE["nhwc_c5_s49"], "training", "relu", True)


def cumulative_momentum(dtype: torch.dtype) -> None:
    triton = backends.choose("triton", "cpu", dtype)
    state = [torch.zeros(7, dtype=dtype), torch.ones(7, dtype=dtype), torch.tensor(2)]
    expected = [t.clone() for t in state]
    for step in range(2):
        x = torch.randn(4, 7, 3, generator=torch.Generator().manual_seed(step), dtype=dtype)
        for kernels, running in ((triton, state), (reference, expected)):
            kernels.forward(ForwardCall(x, None, None, None, *running, True, None, 1e-5, None, False))
    assert state[2] == 4
    # Two updates of a few roundings each.
    tolerance = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(state, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cumulative_momentum(dtype: torch.dtype) -> None:
    """All channels read the counter before it is incremented, and it is incremented once."""
    interpreted(cumulative_momentum, dtype)


def empty_batch(shape: tuple[int, ...]) -> None:
    c = shape[1]
    triton = backends.choose("triton", "cpu", torch.float32)
    x = torch.empty(shape)
    for training in (True, False):
        running, expected = ([torch.ones(c), torch.full((c,), 2.0), torch.tensor(2)] for _ in range(2))
        ours = triton.forward(ForwardCall(x, None, None, x, *running, training, 0.1, 1e-5, "relu", True))
        truth = reference.forward(ForwardCall(x, None, None, x, *expected, training, 0.1, 1e-5, "relu", True))
        torch.testing.assert_close(ours, truth)
        torch.testing.assert_close(running, expected, rtol=0, atol=0)
        weight = torch.ones(c)
        saved = (weight, weight, *truth[1:3], truth[3], "relu", training, (True,) * 4)
        torch.testing.assert_close(
            triton.backward(BackwardCall(x, x, *saved)), reference.backward(BackwardCall(x, x, *saved))
        )


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4, 4), (2, 3, 0, 4), (2, 0, 3)])
def test_empty_batch(shape: tuple[int, ...]) -> None:
    interpreted(empty_batch, shape)


def partial_needs() -> None:
    triton = backends.choose("triton", "cpu", torch.float32)
    p = CASE["nhwc_c5_s49"].problem()
    _, mask = triton.normalize(
        ForwardCall(p.x, p.weight, p.bias, p.residual, act="relu", save_mask=True), p.mean, p.invstd
    )
    arguments = (p.dy, p.x, p.weight, p.bias, p.mean, p.invstd, mask, "relu")
    full = triton.backward(BackwardCall(*arguments, True, (True,) * 4))
    for i in range(4):
        needs = tuple(i == j for j in range(4))
        for j, (grad, expected) in enumerate(
            zip(triton.backward(BackwardCall(*arguments, True, needs)), full, strict=True)
        ):
            assert torch.equal(grad, expected) if i == j else grad is None
    assert triton.backward(BackwardCall(*arguments, True, (False,) * 4)) == (None,) * 4


def test_partial_needs() -> None:
    interpreted(partial_needs)


def wide_offsets(case: Case) -> None:
    from bnkern.backends.triton import common

    def run() -> list[torch.Tensor]:
        p = case.problem()
        triton = backends.choose("triton", "cpu", torch.float32)
        y, mean, invstd, mask = triton.forward(
            ForwardCall(p.x, p.weight, p.bias, p.residual, None, None, None, True, 0.1, 1e-5, "relu", True)
        )
        grads = triton.backward(
            BackwardCall(p.dy, p.x, p.weight, p.bias, mean, invstd, mask, "relu", True, (True,) * 4)
        )
        return [y, mean, invstd, mask, *grads]

    narrow, common.INT32_OFFSETS = run(), 0
    try:
        wide = run()
    finally:
        common.INT32_OFFSETS = 2**31 - 2**20
    assert all(map(torch.equal, narrow, wide))


@pytest.mark.parametrize("case", FEW, ids=str)
def test_wide_offsets(case: Case) -> None:
    """The variant for more than 2^31 elements gives the same bits."""
    interpreted(wide_offsets, case)


# ----------------------------------------------------------------------------------------------- on a real GPU


def step(p, x: torch.Tensor) -> list[torch.Tensor]:
    triton = backends.choose("triton", "cuda", x.dtype)
    running = [torch.zeros_like(p.mean), torch.ones_like(p.mean), torch.tensor(3, device=x.device)]
    y, mean, invstd, mask = triton.forward(
        ForwardCall(x, p.weight, p.bias, p.residual, *running, True, None, 1e-5, "relu", True)
    )
    grads = triton.backward(BackwardCall(p.dy, x, p.weight, p.bias, mean, invstd, mask, "relu", True, (True,) * 4))
    return [y, mean, invstd, mask, *running, *grads]


@on_gpu
@pytest.mark.parametrize("case", LARGE, ids=str)
@pytest.mark.parametrize("precision", [FP32, BF16], ids=lambda p: p.name)
def test_same_bits_every_run(precision: Precision, case: Case) -> None:
    p = case.problem(precision, "cuda")
    first = step(p, p.x)
    for _ in range(20):
        assert all(map(torch.equal, step(p, p.x), first))


@on_gpu
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_cuda_graph(case: Case) -> None:
    """Captured, then replayed on new values. Nothing synchronises, and no values of the capture remain."""
    p = case.problem(BF16, "cuda")
    x = p.x.clone()
    expected = step(p, p.x)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step(p, x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    x.zero_()
    with torch.cuda.graph(graph):
        captured = step(p, x)
    x.copy_(p.x)
    graph.replay()
    assert all(map(torch.equal, captured, expected))


@on_gpu
@pytest.mark.slow
def test_beyond_two_to_the_31() -> None:
    """A tensor of 2^31 + 2^26 elements. The output of its last sample is compared."""
    x = torch.randn(33, 64, 1024, 1024, dtype=torch.bfloat16, device="cuda")
    triton = backends.choose("triton", "cuda", x.dtype)
    mean, invstd = torch.zeros(64, device="cuda"), torch.ones(64, device="cuda")
    y, _ = triton.normalize(ForwardCall(x, act="relu"), mean, invstd)
    assert torch.equal(y[-1], x[-1].relu())
    _, mean, m2 = triton.moments(x)
    assert mean.abs().max() < 1e-2
    assert (m2 / (x.numel() / 64) - 1).abs().max() < 1e-2
