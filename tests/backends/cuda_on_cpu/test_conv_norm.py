"""``conv_norm_forward`` on the host: the kernel against the reference in float64, in shuffled orders.

y and its mask must have the bits of the kernels of ``normalize``.
"""

import itertools

import pytest
import torch
from torch import Tensor

from bnkern.backends import reference
from bnkern.backends.calls import ForwardCall
from tests.backends.cuda_on_cpu.conv import (
    BankConflicts,
    Result,
    conv_norm_forward,
    counting_bank_conflicts,
    load_operands,
)
from tests.backends.cuda_on_cpu.native import Device, OnCpu
from tests.backends.cuda_on_cpu.sandbox import sandboxed
from tests.support.conv_norm import CALLS, DTYPES, ODD, STAGES, Problem, check_convolution, check_statistics

SEEDS = (1, 2, 3)


def run(p: Problem, seed: int, **options: object) -> Result:
    operands = (p.source, p.mean, p.invstd, p.keep, p.weight, p.norm)
    return conv_norm_forward(*operands, seed=seed, **options)


def check(p: Problem, seeds: tuple[int, ...] = SEEDS) -> Result:
    first, *others = [run(p, seed) for seed in seeds]
    for other in others:
        for name, a, b in zip(Result._fields, first, other, strict=True):
            same = a is b is None or torch.equal(*(t.reshape(-1).view(torch.uint8) for t in (a, b)))
            assert same, f"{name} depends on the order of threads and blocks"
    y = p.source
    if isinstance(p.source, ForwardCall):
        y, mask = OnCpu().normalize(p.source, p.mean, p.invstd)
        assert (first.y is not None) is p.keep and (first.y is None or same_bits(first.y, y))
        assert (first.mask is None) is (mask is None) and (mask is None or torch.equal(first.mask, mask))
    check_convolution(y, p.weight, first.r)
    check_statistics(p.norm, first.r, first.mean, first.invstd, first[5:])
    return first


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.int16), b.view(torch.int16))


@pytest.mark.parametrize(("norm", "act"), CALLS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", STAGES, ids=str)
@sandboxed
def test_stages(size: tuple[int, ...], dtype: str, norm: str, act: str | None) -> None:
    check(Problem(size, DTYPES[dtype], norm, act), SEEDS[:2])


@pytest.mark.parametrize("size", ODD, ids=str)
@sandboxed
def test_odd_images(size: tuple[int, ...]) -> None:
    for dtype, (norm, act) in zip(itertools.cycle(DTYPES.values()), CALLS, strict=False):
        check(Problem(size, dtype, norm, act))


@sandboxed
def test_more_images_than_multiprocessors() -> None:
    """The parts of 140 images are joined by the last block, in the same order whichever it is."""
    check(Problem((140, 16, 1, 5), torch.bfloat16, "residual", "relu"))


@pytest.mark.parametrize("dtype", DTYPES)
@sandboxed
def test_options(dtype: str) -> None:
    """Contiguous and sliced weights, y that is kept or not, vectors in half precision, cumulative momentum."""
    size = (3, 32, 6, 5)
    for options in (
        {"weight": "contiguous"},
        {"keep": True},
        {"vectors": DTYPES[dtype]},
        {"momentum": None},
    ):
        check(Problem(size, DTYPES[dtype], "plain", "relu", **options))
    check(Problem(size, DTYPES[dtype], "residual", "relu", keep=False))
    p = Problem(size, DTYPES[dtype], "plain", "relu")
    expected = run(p, 1)
    wide = torch.full((32, 40, 3, 4), torch.nan, dtype=p.weight.dtype)
    wide[:, 8:, :, 1:] = p.weight
    p.weight = wide[:, 8:, :, 1:]  # other strides, and not aligned
    for a, b in zip(expected, run(p, 2), strict=True):
        assert a is b is None or torch.equal(a, b)
    p.norm = ForwardCall(None)
    assert run(p, 1).running_mean is None and torch.equal(run(p, 1).r, expected.r)


@sandboxed
def test_special_values() -> None:
    """NaN and infinity in a channel of the input reach r and its statistics as in torch, and nothing else."""
    for value in (torch.nan, torch.inf):
        for image in (0, 1):
            p = Problem((3, 16, 5, 6), torch.bfloat16, "none", None)
            clean = run(p, 1)
            p.weight[3:] = 0  # outputs 3 to 15 are sums of zeros, or NaN
            p.source[image, 2, 2, 3] = value
            result = run(p, 1)
            near = torch.zeros_like(result.r, dtype=torch.bool)
            near[image, :, 1:4, 2:5] = True
            truth = torch.nn.functional.conv2d(p.source.double(), p.weight.double(), padding=1)
            assert torch.equal(result.r[near].isnan(), truth[near].isnan())
            assert same_bits(result.r[:, :3][~near[:, :3]], clean.r[:, :3][~near[:, :3]])
            _, mean, _ = reference.moments(result.r.double())
            assert torch.equal(result.mean.isnan(), mean.isnan())
            assert torch.equal(result.mean.isinf(), mean.isinf()) and result.invstd.isnan().all()


@sandboxed
def test_nan_in_one_channel_of_the_result() -> None:
    """Its statistics are NaN, and those of the other channels keep their bits."""
    p = Problem((3, 32, 7, 7), torch.bfloat16, "plain", "relu")
    clean = run(p, 1)
    p.weight[5, 0, 1, 1] = torch.nan
    result = check_orders(p)
    for name in ("mean", "invstd", "running_mean", "running_var"):
        values = getattr(result, name)
        assert values.isnan().tolist() == [c == 5 for c in range(32)], name
        assert torch.equal(values[~values.isnan()], getattr(clean, name)[~values.isnan()]), name


def check_orders(p: Problem) -> Result:
    first, second = (run(p, seed) for seed in (1, 2))
    for a, b in zip(first, second, strict=True):
        assert a is b is None or torch.equal(*(t.reshape(-1).view(torch.uint8) for t in (a, b)))
    return first


@pytest.mark.parametrize("dtype", DTYPES)
@sandboxed
def test_large_mean(dtype: str) -> None:
    """The mean of r is 64 times its deviation. Sums of squares in float32 would lose 12 of the 24 bits of M2."""
    p = Problem((4, 16, 16, 16), DTYPES[dtype], "none", None)
    p.source.mul_(1 / 64).add_(1)
    p.weight.zero_()
    for c in range(16):
        p.weight[c, c, 1, 1] = 1  # r is the input, also at the border
    result = check(p)
    ratio = result.mean * result.invstd
    assert (ratio > 40).all() and torch.equal(result.r, p.source)


@sandboxed
def test_constant_values() -> None:
    """A variance of exactly zero, also for a number of pixels whose reciprocal is not exact."""
    for size in ((3, 16, 7, 7), (2, 64, 5, 9)):
        p = Problem(size, torch.float16, "none", None)
        p.source.fill_(1.37)
        p.weight.zero_()
        p.weight[:, 0, 1, 1] = 1.91
        result = run(p, 1)
        assert torch.equal(result.mean, result.r.float().amax((0, 2, 3)))
        assert torch.equal(result.invstd, torch.full_like(result.invstd, p.norm.eps**-0.5))


@pytest.mark.parametrize(("size", "loads"), [*zip(STAGES, (2592, 2304, 3456), strict=True)], ids=str)
@sandboxed
def test_no_bank_conflicts(size: tuple[int, ...], loads: int) -> None:
    """Loads of the operands of products, where the rows of the images have a multiple of 4 pixels.

    Each of 8 warps has 9 C / 16 steps. In a step it loads 2 operands for each tile of outputs and 1 for each of pixels.
    The shared memory serves half of such a load, 16 lanes, per cycle, so these are the cycles that an image takes.
    """
    with counting_bank_conflicts() as count:
        run(Problem((1, *size[1:]), torch.bfloat16, "plain", "relu"), 1)
    assert count.result == (loads, 0)


@sandboxed
def conflicts_with_stride(stride: int) -> BankConflicts:
    with counting_bank_conflicts() as count:
        load_operands(stride)
    return count.result


def test_bank_conflicts_are_found() -> None:
    """Without the padding of 32 bytes the pixels of 32 and 64 channels lie in the same banks."""
    assert [conflicts_with_stride(stride) for stride in (32, 96, 160)] == [(2, 0)] * 3
    assert [conflicts_with_stride(stride) for stride in (64, 128)] == [(2, 2), (2, 6)]


@sandboxed
def test_refusals() -> None:
    p = Problem((1, 64, 8, 8), torch.bfloat16, "none", None)
    with pytest.raises(RuntimeError, match=r"a block needs 1[0-9]{5} bytes of shared memory .* gives it 65536"):
        run(p, 1, device=Device(shared_bytes=64 << 10))
    with pytest.raises(RuntimeError, match="16, 32 or 64 channels, got 48"):
        run(Problem((1, 48, 4, 4), torch.bfloat16, "none", None), 1)
    with pytest.raises(RuntimeError, match="at most 16384 values, got 17408"):
        run(Problem((1, 16, 34, 32), torch.bfloat16, "none", None), 1)
    with pytest.raises(RuntimeError, match="takes bfloat16 and float16"):
        run(Problem((1, 16, 4, 4), torch.float32, "none", None), 1)
