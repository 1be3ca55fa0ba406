"""Records of the Triton kernels, through the interpreter: exact counts, sums to rounding, and unchanged results."""

import pytest
import torch
from torch import Tensor

from bnkern import backends
from bnkern.backends import reference
from bnkern.backends.calls import BackwardCall, ForwardCall
from bnkern.backends.layout import layout
from bnkern.backends.records import ACTIVATION, AFFINE, GRADIENT
from tests.backends.triton.gpu import LARGE, on_gpu
from tests.backends.triton.interpreter import interpreted
from tests.support.cases import BF16, CASE, FP16, FP32, FP64, Case, Precision, _unit

pytest.importorskip("triton")

# Each way of addressing memory, with partial tiles of lines and of channels. Rows that cannot be read by vectors are
# processed eight at a time if a kernel also works element by element.
CASES = [
    Case("octets", (3, 3, 8, 8), "planes of whole octets: 16-byte vectors"),
    Case("quads", (3, 2, 4, 5), "planes that end with half an octet"),
    Case("octet_rows", (5, 16, 3, 3), "rows of whole octets", "channels_last"),
    Case("wide_octet_rows", (20, 72), "rows of more channels than a program takes"),
    Case("odd_rows", (3, 9, 3, 3), "27 rows of 9: lines of eight rows, the last of three", "channels_last"),
    Case("wide_odd_rows", (21, 19), "lines of eight rows longer than a program takes"),
    *(CASE[name] for name in ("nchw_s49", "nc_small", "c1", "two_values", "two_values_planes")),
    *(CASE[name] for name in ("sliced_channels", "sliced_channels_last", "expanded_batch_rows", "misaligned")),
]
FEW = [case for case in CASES if case.name in ("octets", "octet_rows", "nchw_s49", "odd_rows")]
HARD = [
    Case(f"{odd or 'ratio_1e4'}_{layout}", (2, 3, 5, 6), "several tiles", layout, 1.0 if odd else 1e4, odd)
    for odd in ("", "constant", "inf", "nan", "outlier")
    for layout in ("contiguous", "channels_last")
]
SWEEP = [
    pytest.param(precision, case, id=f"{precision.name}-{case}")
    for precision, cases in ((FP32, CASES + HARD), (FP64, FEW), (BF16, FEW), (FP16, FEW))
    for case in cases
]


def same_bits(actual: list[Tensor | None], expected: list[Tensor | None]) -> None:
    for ours, theirs in zip(actual, expected, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert ours.dtype == theirs.dtype
            assert torch.equal(_bits(ours), _bits(theirs))


def _bits(t: Tensor) -> Tensor:
    return t.contiguous().flatten().view(torch.uint8)


def blank(rows: tuple[str, ...], x: Tensor) -> Tensor:
    """A record filled with a wrong value, so that entries that were not written are detected."""
    return torch.full((len(rows), x.shape[1]), -7.0, dtype=torch.float64, device=x.device)


def forward(p, mode: str, act: str | None, with_residual: bool, record: Tensor | None) -> list[Tensor | None]:
    """y, mean, invstd, mask and the running statistics after the call."""
    triton = backends.choose("triton", p.x.device.type, p.x.dtype)
    running = p.mean.clone(), p.invstd.square().reciprocal(), torch.tensor(1, device=p.x.device)
    state = [None] * 3 if mode == "identity" else running
    residual = p.residual if with_residual else None
    weight, bias = (None, None) if mode == "identity" else (p.weight, p.bias)
    results = triton.forward(
        ForwardCall(p.x, weight, bias, residual, *state, mode == "training", 0.1, 1e-5, act, True, record=record)
    )
    return [*results, *state]


def backward(p, mode: str, act: str | None, saved: list[Tensor | None], needs, *records) -> list[Tensor | None]:
    triton = backends.choose("triton", p.x.device.type, p.x.dtype)
    weight, bias = (None, None) if mode == "identity" else (p.weight, p.bias)
    gradient, affine = records or (None, None)
    grads = triton.backward(
        BackwardCall(
            p.dy,
            p.x,
            weight,
            bias,
            *saved,
            act,
            mode == "training",
            needs,
            record_gradient=gradient,
            record_affine=affine,
        )
    )
    return list(grads)


def near(actual: Tensor, truth: Tensor, bound: Tensor, label: str) -> None:
    """Within ``bound``, or both not finite."""
    not_finite = ~truth.isfinite()
    assert not actual[not_finite].isfinite().any(), label
    # 0 / 0: no error is allowed, and there is none
    excess = ((actual - truth).abs() / bound)[~not_finite].nan_to_num(nan=0.0)
    assert (excess <= 1).all(), f"{label}: {excess.max():.3g} times its bound"


def check_activation(record: Tensor, x: Tensor, y: Tensor) -> None:
    actual = dict(zip(ACTIVATION, record, strict=True))
    truth = dict(zip(ACTIVATION, reference.activation(x, y), strict=True))
    for exact in ("count", "min", "max", "nonfinite", "active"):
        assert torch.equal(actual[exact], truth[exact]), exact
    # Deviations d from a lane's first value are exact or rounded once. So errors are a few eps32 of their range,
    # whatever the mean: 2e-7 of the range in the mean, and 1e-6 sum |d|^k in m_k, as for the variance elsewhere. (With
    # an outlier, the outlier is the range, and its power most of the sum.) The rounding of the truth's float64 mean is
    # added.
    unit, wide, axes = _unit(x.dtype), x.double(), [0, *range(2, x.dim())]
    delta = wide - truth["mean"].view(1, -1, *[1] * (x.dim() - 2))
    rounding = 1e-15 * wide.abs().amax(axes)
    near(actual["mean"], truth["mean"], 2e-7 * unit * delta.abs().amax(axes) + rounding, "mean")
    for k in (2, 3, 4):
        bound = 1e-6 * unit * (delta.abs() ** k).sum(axes) + truth["count"] * rounding**k
        near(actual[f"m{k}"], truth[f"m{k}"], bound, f"m{k}")


def check_sums(record: Tensor, truth: Tensor, rows: tuple[str, ...], dtype: torch.dtype) -> None:
    """Counts are exact.

    Sums of about ten values per lane, and then over lanes, in float32, have errors of 1e-6 of sum |terms|.
    """
    actual, truth = (dict(zip(rows, r, strict=True)) for r in (record, truth))
    for name in rows:
        if name in ("sum", "bias_sum", "weight_sum"):
            near(actual[name], truth[name], 1e-6 * _unit(dtype) * truth[name.replace("sum", "abs_sum")], name)
        elif name.endswith(("abs_sum", "square_sum")):
            near(actual[name], truth[name], 1e-6 * _unit(dtype) * truth[name], name)
        else:
            assert torch.equal(actual[name], truth[name]), name


def check(
    precision: Precision, case: Case, mode: str, act: str | None, with_residual: bool, device: str = "cpu"
) -> None:
    p = case.problem(precision, device)
    activation, gradient, affine = blank(ACTIVATION, p.x), blank(GRADIENT, p.x), blank(AFFINE, p.x)
    plain = forward(p, mode, act, with_residual, None)
    y, *saved = plain[:4]
    same_bits(forward(p, mode, act, with_residual, activation), plain)
    check_activation(activation, p.x, y)

    normalised = mode != "identity"
    needs = (True, normalised, normalised, with_residual)
    plain = backward(p, mode, act, saved, needs)
    same_bits(backward(p, mode, act, saved, needs, gradient, affine), plain)
    check_sums(gradient, reference.gradient(plain[0]), GRADIENT, p.x.dtype)
    if normalised:
        # The mask of the actual forward, not that of a computation with other roundings.
        mask = reference.pack_mask(~(y <= 0), layout(p.x))
        truth = reference.affine(BackwardCall(p.dy, p.x, p.weight, p.bias, *saved[:2], mask, act))
        check_sums(affine, truth, AFFINE, p.x.dtype)
    else:
        assert torch.equal(affine, blank(AFFINE, p.x))


@pytest.mark.parametrize(("precision", "case"), SWEEP)
def test_training(precision: Precision, case: Case) -> None:
    interpreted(check, precision, case, "training", "relu", True)


@pytest.mark.parametrize("case", FEW, ids=str)
def test_recomputed_mask(case: Case) -> None:
    interpreted(check, FP32, case, "training", "relu", False)
    interpreted(check, FP32, case, "training", None, False)


@pytest.mark.parametrize("case", CASES + HARD[2:], ids=str)
def test_without_normalisation(case: Case) -> None:
    """``normalize`` also computes the moments, and with a ReLU many gradients are zero."""
    interpreted(check, FP32, case, "identity", "relu", True)


@pytest.mark.parametrize("precision", [BF16, FP64], ids=lambda p: p.name)
def test_without_normalisation_in(precision: Precision) -> None:
    interpreted(check, precision, CASE["nhwc_c5_s49"], "identity", "relu", True)


@pytest.mark.parametrize("case", FEW, ids=str)
def test_eval(case: Case) -> None:
    interpreted(check, FP32, case, "eval", "relu", True)
    interpreted(check, FP32, case, "eval", None, False)


def single_needs(case: Case) -> None:
    """Each record alone, and records of gradients that are not needed."""
    p = case.problem()
    saved = forward(p, "eval", "relu", True, None)[1:4]
    gradient, affine = blank(GRADIENT, p.x), blank(AFFINE, p.x)
    backward(p, "eval", "relu", saved, (True, True, True, True), gradient, affine)
    for i in range(4):
        needs = tuple(i == j for j in range(4))
        plain = backward(p, "eval", "relu", saved, needs)
        records = blank(GRADIENT, p.x), blank(AFFINE, p.x)
        same_bits(backward(p, "eval", "relu", saved, needs, records[0], None), plain)
        same_bits(backward(p, "eval", "relu", saved, needs, None, records[1]), plain)
        assert torch.equal(records[0], gradient if i == 0 else blank(GRADIENT, p.x))
        assert torch.equal(records[1], affine)


@pytest.mark.parametrize("case", FEW[:2], ids=str)
def test_single_needs(case: Case) -> None:
    interpreted(single_needs, case)


def records_of(p, mode: str) -> list[Tensor]:
    records = blank(ACTIVATION, p.x), blank(GRADIENT, p.x), blank(AFFINE, p.x)
    saved = forward(p, mode, "relu", True, records[0])[1:4]
    backward(p, mode, "relu", saved, (True, True, True, True), *records[1:])
    return list(records)


def wide_offsets(case: Case) -> None:
    from bnkern.backends.triton import common

    p = case.problem()
    for mode in ("training", "eval") if case.layout == "contiguous" else ("eval",):
        narrow, common.INT32_OFFSETS = records_of(p, mode), 0
        try:
            same_bits(records_of(p, mode), narrow)
        finally:
            common.INT32_OFFSETS = 2**31 - 2**20


@pytest.mark.parametrize("case", [FEW[0], CASE["nhwc_c5_s49"]], ids=str)
def test_wide_offsets(case: Case) -> None:
    """The variants for more than 2^31 elements write the same records."""
    interpreted(wide_offsets, case)


def odd_values(case: Case) -> None:
    """Values with special order: only NaN, only infinities, one infinity at the end, zeros of both signs."""
    p = case.problem()
    x, dy = p.x.clone(), p.dy.clone()
    x[:, 0] = torch.nan
    x[:, 1] = torch.where(x[:, 1] > 0, torch.inf, -torch.inf)
    x[-1, -1, -1, -1] = torch.inf
    dy[-1, 0, -1, -1] = -torch.inf
    dy[:, 1] = torch.nan
    dy[:1, 2], dy[1:, 2] = 0.0, -0.0
    p = p._replace(x=x, dy=dy)
    activation, gradient, affine = (blank(rows, x) for rows in (ACTIVATION, GRADIENT, AFFINE))
    y, *saved = forward(p, "eval", "relu", True, activation)[:4]
    check_activation(activation, x, y)
    dx = backward(p, "eval", "relu", saved, (True, True, True, True), gradient, affine)[0]
    check_sums(gradient, reference.gradient(dx), GRADIENT, x.dtype)
    mask = reference.pack_mask(~(y <= 0), layout(x))
    check_sums(
        affine, reference.affine(BackwardCall(dy, x, p.weight, p.bias, *saved[:2], mask, "relu")), AFFINE, x.dtype
    )
    assert gradient[GRADIENT.index("zero"), 2] == layout(x).count
    assert activation[ACTIVATION.index("min"), 0] == torch.inf
    count = layout(x).count
    assert activation[ACTIVATION.index("nonfinite"), [0, 1, -1]].tolist() == [count, count, 1]
    assert gradient[GRADIENT.index("nonfinite"), [0, 2]].tolist() == [1, 0]


@pytest.mark.parametrize("case", FEW, ids=str)
def test_odd_values(case: Case) -> None:
    interpreted(odd_values, case)


def empty_batch(shape: tuple[int, ...]) -> None:
    triton = backends.choose("triton", "cpu", torch.float32)
    x, c = torch.empty(shape), shape[1]
    for training in (True, False):
        records = []
        for kernels in (triton, reference):
            running = [torch.ones(c), torch.full((c,), 2.0), torch.tensor(2)]
            own_records = blank(ACTIVATION, x), blank(GRADIENT, x), blank(AFFINE, x)
            _, *saved = kernels.forward(
                ForwardCall(x, None, None, x, *running, training, 0.1, 1e-5, "relu", True, record=own_records[0])
            )
            kernels.backward(BackwardCall(
                x, x, None, None, *saved, "relu", training, (True, False, False, True),
                record_gradient=own_records[1], record_affine=own_records[2],
            ))  # fmt: skip
            records.append(own_records)
        torch.testing.assert_close(*records, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4, 4), (2, 3, 0, 4), (2, 0, 3)])
def test_empty_batch(shape: tuple[int, ...]) -> None:
    interpreted(empty_batch, shape)


# ----------------------------------------------------------------------------------------------- on a real GPU


@on_gpu
@pytest.mark.parametrize("mode", ["training", "eval", "identity"])
@pytest.mark.parametrize("case", [*LARGE, *FEW], ids=str)
@pytest.mark.parametrize("precision", [FP32, BF16], ids=lambda p: p.name)
def test_compiled(precision: Precision, case: Case, mode: str) -> None:
    """Compiled kernels, whose programs end in any order."""
    check(precision, case, mode, "relu", True, "cuda")


@on_gpu
@pytest.mark.parametrize("mode", ["training", "identity"])
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_cuda_graph(case: Case, mode: str) -> None:
    """Captured, then replayed on other values: the records are those of these values, with the same bits in every
    replay.
    """
    p = case.problem(BF16, "cuda")
    expected = records_of(p, mode)
    live = p._replace(x=p.x.clone(), dy=p.dy.clone())
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        records_of(live, mode)
    torch.cuda.current_stream().wait_stream(side)
    live.x.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = records_of(live, mode)
    live.x.copy_(p.x)
    for _ in range(20):
        graph.replay()
        same_bits(captured, expected)
