"""conv_grad_signs: all backends on the same convolutions, the reference and plain loops, bits, errors."""

import functools
import hashlib
import itertools
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

import bnkern
from bnkern import _native, backends
from bnkern.backends import reference
from tests import ROOT
from tests.conv.conv_cases import CONV_CASES, ConvCase, sum_bound
from tests.support.cases import MIXED, Precision, Target, exact

CASE = {case.name: case for case in CONV_CASES}
assert len(CASE) == len(CONV_CASES), "two cases share a name"
ALL = (True,) * 4
DTYPES = pytest.mark.parametrize("precision", MIXED, ids=lambda precision: precision.name)

# Enough work for several threads in every way to share it: chunks of images, of rows, and parts of the outputs.
LARGE = [
    ConvCase("images", (40, 16, 16, 16), 20, (3, 3), "chunks of images", padding=(1, 1)),
    ConvCase("rows", (1, 5, 120, 100), 9, (3, 3), "one image: chunks of rows", (2, 1), (1, 1), "contiguous"),
    ConvCase("outputs", (2, 7, 6, 6), 200, (3, 3), "one chunk: parts of the outputs", padding=(1, 1)),
]


def run(target: Target, x: Tensor, dy: Tensor, case: ConvCase, wanted: tuple[bool, ...] = ALL) -> list[Tensor | None]:
    kernels = backends.choose(target.backend, target.device, x.dtype, "conv_grad_signs")
    return list(kernels.conv_grad_signs(x, dy, *case.geometry, wanted))


def assert_close(target: Target, x: Tensor, dy: Tensor, case: ConvCase) -> list[Tensor]:
    """Sums are within their bound of the float64 truth and have the accumulator's dtype.

    Signs and counts are equal, int32.
    """
    results = run(target, x, dy, case)
    truth = reference.conv_grad_signs(*exact(x, dy), *case.geometry, ALL)
    shape = (dy.shape[1], x.shape[1], *case.kernel)
    for result, true in zip(results[:2], truth[:2], strict=True):
        assert result.shape == shape and result.dtype == reference.accumulator(x.dtype)
        excess = (result.cpu().double() - true).abs() - sum_bound(truth[1], x.dtype, target.backend)
        assert excess.max() <= 0, f"beyond its bound by {excess.max():.3g}"
    for result, true in zip(results[2:], truth[2:], strict=True):
        assert result.dtype == torch.int32 and torch.equal(result.cpu(), true)
    return results


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8))


def serves(target: Target, dtype: torch.dtype) -> bool:
    return backends.unavailable(target.backend, target.device, dtype) is None


# ------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("position", [(0, 0, 0, 0), (1, 17, 3, 4), (3, 31, 8, 6)], ids=str)
@pytest.mark.parametrize("negative", ["x", "dy", "both", "neither"])
def test_few_negative_values(target: Target, negative: str, position: tuple[int, ...], stride: int) -> None:
    """After a ReLU no value is negative. A single negative value must count at every position."""
    case = ConvCase("few negatives", (4, 32, 9, 7), 20, (3, 3), "", (stride, stride), (1, 1))
    x, dy = (t.abs() for t in case.operands(torch.float32, target.device))
    if negative in ("x", "both"):
        x[position] *= -1
    if negative in ("dy", "both"):
        n, c, h, w = position
        dy[n, min(c, 19), h // stride, w // stride] *= -1
    assert_close(target, x, dy, case)


def test_the_reference_equals_loops() -> None:
    """Every summand is computed separately, including those with zeros of the padding."""
    case = ConvCase("tiny", (2, 2, 4, 5), 3, (3, 2), "", (2, 1), (1, 2))
    x, dy = case.operands(torch.float64)
    results = reference.conv_grad_signs(x, dy, *case.geometry, ALL)
    assert results[0].shape == (3, 2, 3, 2)
    for o, i, p, q in itertools.product(*map(range, results[0].shape)):
        summands = []
        for n, h, w in itertools.product(range(2), *map(range, dy.shape[2:])):
            row, column = h * 2 + p - 1, w + q - 2
            inside = 0 <= row < 4 and 0 <= column < 5
            summands.append(dy[n, o, h, w].item() * x[n, i, row, column].item() if inside else 0.0)
        expected = [sum(summands), sum(map(abs, summands)), sum((d > 0) - (d < 0) for d in summands)]
        expected.append(sum(d != 0 for d in summands))
        # Sums of at most 40 products of order one in another order: the error is far below 1e-12.
        assert [r[o, i, p, q].item() for r in results] == pytest.approx(expected, rel=0, abs=1e-12)


@DTYPES
@pytest.mark.parametrize("case", CONV_CASES, ids=str)
def test_close_to_the_truth(target: Target, precision: Precision, case: ConvCase) -> None:
    if not serves(target, precision.dtype):
        pytest.skip("the backend does not serve this dtype")
    x, dy = case.operands(precision.dtype, target.device)
    before = x.clone(), dy.clone()
    assert_close(target, x, dy, case)
    assert torch.equal(x, before[0]) and torch.equal(dy, before[1])


@pytest.mark.parametrize("case", LARGE, ids=str)
def test_large(target: Target, case: ConvCase) -> None:
    x, dy = case.operands(torch.float32, target.device)
    assert_close(target, x, dy, case)


def test_every_small_geometry(target: Target) -> None:
    """Kernels, strides and paddings of 1 to 3 (0 to 2) in each direction, in both layouts."""
    for k, s, p in itertools.product(range(1, 4), range(1, 4), range(3)):
        layout = "contiguous" if (k + s + p) % 2 else "channels_last"
        case = ConvCase(f"{k}{s}{p}", (2, 5, 6, 7), 3, (k, 4 - k), "", (s, 4 - s), (p, 2 - p), layout, layout)
        x, dy = case.operands(torch.float32, target.device)
        assert_close(target, x, dy, case)


def test_sums_that_cancel(target: Target) -> None:
    """dy is followed by its negative: sums are zero up to their bound, and signs exactly."""
    case = ConvCase("cancel", (8, 6, 16, 16), 5, (1, 1), "")
    x, dy = case.operands(torch.float32, target.device)
    x, dy = torch.cat([x, x]), torch.cat([dy, -dy])
    results = assert_close(target, x, dy, case)
    assert not results[2].any() and (results[3] > 0).all()


def test_tiny_values_have_signs(target: Target) -> None:
    """Subnormal factors whose product is zero in float32 have the signs of the factors."""
    case = ConvCase("subnormal", (2, 3, 4, 4), 4, (1, 1), "")
    x, dy = torch.full(case.x_shape, -1e-40, device=target.device), torch.full(case.dy_shape, 1e-40)
    _, _, sign_sum, nonzero = run(target, x, dy.to(target.device), case)
    assert (sign_sum == -32).all() and (nonzero == 32).all()


@DTYPES
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_nan_and_inf(target: Target, precision: Precision, layout: str) -> None:
    """Only the sums that they enter are affected. Signs and counts are exact."""
    if not serves(target, precision.dtype):
        pytest.skip("the backend does not serve this dtype")
    case = ConvCase("odd_values", (20, 4, 16, 16), 5, (3, 3), "", (1, 1), (1, 1), layout, layout)
    x, dy = case.operands(precision.dtype, target.device)
    x[3, 1, 5, 6], x[4, 2, 7, 7] = torch.nan, torch.inf
    dy[1, 2, 3, 3], dy[5, 3, 8, 8] = torch.nan, -torch.inf
    results = run(target, x, dy, case)
    truth = reference.conv_grad_signs(*exact(x, dy), *case.geometry, ALL)
    for result, true in zip(results[2:], truth[2:], strict=True):
        assert torch.equal(result.cpu(), true)
    finite_x, finite_dy = (t.nan_to_num(0.0, 0.0, 0.0) for t in (x, dy))
    untouched = reference.conv_grad_signs(*exact(finite_x, finite_dy), *case.geometry, ALL)
    bound = sum_bound(untouched[1], x.dtype, target.backend)[:2][:, [0, 3]]
    for result, true in zip(results[:2], untouched[:2], strict=True):
        assert ((result.cpu().double()[:2][:, [0, 3]] - true[:2][:, [0, 3]]).abs() <= bound).all()
        assert result[2].isnan().all() and result[:, 1].isnan().all()
        assert not result[3].isfinite().any() and not result[:, 2].isfinite().any()


def test_nan_next_to_the_others(target: Target) -> None:
    """NaN counts as nonzero and has no sign, at every position of an image.

    The other values of its block count once.
    """
    case = ConvCase("one_nan", (300, 2, 8, 8), 3, (1, 1), "")
    x, dy = torch.ones(case.x_shape, device=target.device), -torch.ones(case.dy_shape, device=target.device)
    for image in (0, 150, 299):
        odd = dy.clone()
        odd[image, 1, 2, 3] = torch.nan
        _, _, sign_sum, nonzero = run(target, x, odd, case, (False, False, True, True))
        assert (nonzero == 300 * 64).all()
        assert sign_sum[:, 0, 0, 0].tolist() == [-300 * 64, -300 * 64 + 1, -300 * 64]


@pytest.mark.parametrize("shape", [(0, 3, 5, 5), (2, 0, 5, 5)], ids=["no_images", "no_channels"])
def test_empty(target: Target, shape: tuple[int, ...]) -> None:
    x, dy = torch.ones(shape, device=target.device), torch.ones(shape[0], 4, 3, 3, device=target.device)
    results = bnkern.conv2d_grad_signs(x, dy, 3)
    for result, dtype in zip(results, (torch.float32,) * 2 + (torch.int32,) * 2, strict=True):
        assert result.shape == (4, shape[1], 3, 3) and result.dtype == dtype and not result.any()


# --------------------------------------------------------------------------------------------------- the same bits


def assert_requested_sums_change_no_bits(target: Target, x: Tensor, dy: Tensor, case: ConvCase) -> None:
    full = run(target, x, dy, case)
    for wanted in itertools.product((False, True), repeat=4):
        for result, expected, is_requested in zip(run(target, x, dy, case, wanted), full, wanted, strict=True):
            assert (result is None) == (not is_requested)
            assert result is None or same_bits(result, expected), f"{wanted}"


@DTYPES
@pytest.mark.parametrize("name", ["stage1", "stage2_nchw", "projection", "stem", "odd"])
def test_requested_sums_change_no_bits(target: Target, precision: Precision, name: str) -> None:
    if not serves(target, precision.dtype):
        pytest.skip("the backend does not serve this dtype")
    if target == Target("reference", "cuda"):
        pytest.skip("torch's convolutions on a GPU may give different bits in each call")
    assert_requested_sums_change_no_bits(target, *CASE[name].operands(precision.dtype, target.device), CASE[name])


@DTYPES
@pytest.mark.parametrize("last", [-0.0, -1.0])
@pytest.mark.parametrize("name", ["stage1", "stage2_nchw", "projection", "stem", "odd"])
def test_rectified_inputs_on_the_cpu(precision: Precision, name: str, last: float) -> None:
    """If x has no negative value (-0.0 is none), both sums use a separate path. A single value changes the path."""
    x, dy = CASE[name].operands(precision.dtype)
    x = x.clamp(min=0)
    x[x == 0] = -0.0
    x[..., -1, -1] = last
    assert_requested_sums_change_no_bits(Target("cpu", "cpu"), x, dy, CASE[name])


@DTYPES
@pytest.mark.parametrize("case", [*LARGE, CASE["stage3"], CASE["stem_nchw"]], ids=str)
def test_number_of_threads(threads: None, precision: Precision, case: ConvCase) -> None:
    x, dy = case.operands(precision.dtype)
    runs = []
    for count in (1, 2, 3, 7):
        torch.set_num_threads(count)
        runs.append(run(Target("cpu", "cpu"), x, dy, case))
    for other in runs[1:]:
        assert all(itertools.starmap(same_bits, zip(runs[0], other, strict=True)))


@pytest.mark.parametrize("name", ["stage1", "stage3", "projection_nchw"])
def test_repeated_runs(target: Target, name: str) -> None:
    x, dy = CASE[name].operands(torch.float32, target.device)
    first = run(target, x, dy, CASE[name])
    for _ in range(3):
        assert all(itertools.starmap(same_bits, zip(first, run(target, x, dy, CASE[name]), strict=True)))


@DTYPES
@pytest.mark.parametrize("name", ["stage1", "stage2_down", "projection", "stem", "odd", "even_kernel"])
def test_layouts_have_the_same_bits_on_the_cpu(precision: Precision, name: str) -> None:
    """On the CPU blocks and chains do not depend on the memory layout."""
    x, dy = CASE[name].operands(precision.dtype)
    full = run(Target("cpu", "cpu"), x, dy, CASE[name])
    for a, b in itertools.product((torch.contiguous_format, torch.channels_last), repeat=2):
        other = run(Target("cpu", "cpu"), x.contiguous(memory_format=a), dy.contiguous(memory_format=b), CASE[name])
        assert all(itertools.starmap(same_bits, zip(full, other, strict=True)))


@functools.cache
def digests(isa: str, extensions: bool = True) -> list[str]:
    process = subprocess.run(
        [sys.executable, "-m", "tests.conv.test_conv_grad_signs"],
        cwd=ROOT,
        env=os.environ | {"BNKERN_ISA": isa, "BNKERN_EXTENSIONS": str(int(extensions))},
        capture_output=True,
        text=True,
    )
    if "this machine cannot run it" in process.stderr:
        pytest.skip(f"this machine does not run {isa}")
    assert process.returncode == 0, process.stderr
    first, *lines = process.stdout.splitlines()
    assert first == isa and len(lines) == len(CONV_CASES) * len(MIXED)
    return lines


@pytest.mark.parametrize("isa", [isa for isa in _native.build_info()["isas"] if isa != _native.isa()])
def test_instruction_sets_have_the_same_bits(isa: str) -> None:
    for expected, actual in zip(digests(_native.isa()), digests(isa), strict=True):
        assert expected == actual


@pytest.mark.skipif(_native.isa() != "avx512", reason="the other instruction sets have no extensions that are used")
def test_same_bits_without_extensions() -> None:
    for expected, actual in zip(digests("avx512"), digests("avx512", extensions=False), strict=True):
        assert expected == actual


# ----------------------------------------------------------------------------------------------- the public function


def test_no_sums_requested(target: Target) -> None:
    case = CASE["even_kernel"]
    assert bnkern.conv2d_grad_signs(*case.operands(torch.float32, target.device), *case.geometry, wanted=()) == (
        (None,) * 4
    )


def test_public_function(target: Target) -> None:
    case = CASE["even_kernel"]
    x, dy = case.operands(torch.float32, target.device)
    full = bnkern.conv2d_grad_signs(x, dy, *case.geometry)
    assert all(itertools.starmap(same_bits, zip(full, run(target, x, dy, case), strict=True)))
    two_sums = bnkern.conv2d_grad_signs(x, dy, *case.geometry, wanted=["nonzero", "sum"])
    assert two_sums.abs_sum is None and two_sums.sign_sum is None
    assert same_bits(two_sums.sum, full.sum) and same_bits(two_sums.nonzero, full.nonzero)
    no_sums = bnkern.conv2d_grad_signs(x, dy, *case.geometry, wanted=())
    assert no_sums == bnkern.GradSigns(None, None, None, None)


def test_it_is_the_gradient_of_a_convolution(target: Target) -> None:
    conv = torch.nn.Conv2d(5, 6, 3, stride=2, padding=1, device=target.device)
    x = torch.randn(4, 5, 9, 8, device=target.device, requires_grad=True)
    y = conv(x)
    dy = torch.randn_like(y)
    y.backward(dy)
    result = bnkern.conv2d_grad_signs(x, dy, 3, 2, 1)
    assert not result.sum.requires_grad
    # Two float32 sums of 80 products each, in different orders.
    assert torch.allclose(result.sum, conv.weight.grad, rtol=0, atol=1e-4)


def test_malformed_calls() -> None:
    x, dy = torch.ones(2, 3, 8, 8), torch.ones(2, 4, 8, 8)
    good = {"x": x, "dy": dy, "kernel_size": 3, "padding": 1}
    bnkern.conv2d_grad_signs(**good)
    for argument, wrong, error, message in [
        ("x", None, TypeError, "x must be a torch.Tensor, got NoneType"),
        ("dy", [1.0], TypeError, "dy must be a torch.Tensor, got list"),
        ("x", x.int(), TypeError, "x must be float32, bfloat16, float16 or float64, got torch.int32"),
        ("x", x.to_sparse(), TypeError, "x must be a strided (dense) tensor"),
        ("dy", dy[0], ValueError, "dy must have 4 dimensions, got shape [4, 8, 8]"),
        ("dy", dy.half(), TypeError, "dy must have the dtype of x, torch.float32, got torch.float16"),
        ("dy", dy.to("meta"), ValueError, "dy must be on the device of x, cpu, got meta"),
        ("dy", dy[:1], ValueError, "dy must be [2, O, 8, 8], the convolution's output for x [2, 3, 8, 8], got [1, 4,"),
        ("dy", dy[..., 1:], ValueError, "dy must be [2, O, 8, 8]"),
        ("kernel_size", 0, ValueError, "kernel_size must be at least 1, got 0"),
        ("kernel_size", (3, 3, 3), TypeError, "kernel_size must be an int or a pair of ints, got (3, 3, 3)"),
        ("kernel_size", 3.0, TypeError, "kernel_size must be an int or a pair of ints, got 3.0"),
        ("kernel_size", True, TypeError, "kernel_size must be an int or a pair of ints, got True"),
        ("kernel_size", (11, 3), ValueError, "kernel_size (11, 3) does not fit x, [2, 3, 8, 8], with padding (1, 1)"),
        ("stride", (1, 0), ValueError, "stride must be at least 1, got (1, 0)"),
        ("padding", -1, ValueError, "padding must be at least 0, got -1"),
        ("padding", "same", TypeError, "padding must be an int or a pair of ints, got 'same'"),
        ("padding", "valid", TypeError, "padding must be an int or a pair of ints, got 'valid'"),
        ("wanted", "sum", TypeError, "wanted must be a collection of names, got 'sum'"),
        ("wanted", None, TypeError, "wanted must be a collection of names, got None"),
        ("wanted", ["sum", "signs"], ValueError, "among sum, abs_sum, sign_sum, nonzero; got 'signs'"),
    ]:
        with pytest.raises(error) as caught:
            bnkern.conv2d_grad_signs(**{**good, argument: wrong})
        assert type(caught.value) is error and message in str(caught.value), str(caught.value)
    huge = torch.ones(1, 1, 1, 1).expand(1 << 16, 1, 1 << 8, 1 << 8)
    with pytest.raises(ValueError, match="int32 cannot hold the counts"):
        bnkern.conv2d_grad_signs(huge, huge, 1)


def main() -> None:
    print(_native.isa())
    torch.set_num_threads(2)
    for case in CONV_CASES:
        for precision in MIXED:
            bits = hashlib.sha256()
            for result in run(Target("cpu", "cpu"), *case.operands(precision.dtype), case):
                bits.update(result.contiguous().view(torch.uint8).numpy().tobytes())
            print(case, precision.name, bits.hexdigest())


if __name__ == "__main__":
    main()
