"""The Triton kernel of ``conv_grad_signs``: its results through the interpreter, and the compiled kernels."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product

import pytest
import torch
from torch import Tensor

from bnkern import backends
from bnkern.backends import reference
from tests.backends.triton.interpreter import interpreted

triton = pytest.importorskip("triton")
resources = pytest.importorskip("tests.backends.triton.resources")

ALL = (True, True, True, True)
# Each sum alone, all but one, and pairs.
SUBSETS = [tuple(not ((bits >> i) & 1) for i in range(4)) for bits in (14, 13, 11, 7, 1, 2, 4, 8, 12, 3, 15)]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Conv:
    """A convolution: sizes (N, I, H, W) and (O, *kernel), stride, padding, and its device."""

    name: str
    x: tuple[int, int, int, int]
    weight: tuple[int, int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    device: str = "cpu"

    def __str__(self) -> str:
        return self.name

    def arguments(self, dtype: torch.dtype, memory_format: torch.memory_format) -> tuple:
        """x and dy, which contain zeros, as after a ReLU, and the sizes."""
        g = torch.Generator().manual_seed(7)
        (n, _, *size), (o, *kernel) = self.x, self.weight
        out = [(s + 2 * p - k) // t + 1 for s, p, k, t in zip(size, self.padding, kernel, self.stride, strict=True)]
        x = (torch.randn(self.x, generator=g) + 0.3).relu()
        dy = torch.randn(n, o, *out, generator=g) * (torch.rand(n, o, *out, generator=g) < 0.8)
        x, dy = (t.to(self.device, dtype).contiguous(memory_format=memory_format) for t in (x, dy))
        return x, dy, tuple(kernel), self.stride, self.padding


CASES = [
    Conv("3x3", (3, 8, 6, 8), (8, 3, 3), padding=(1, 1)),  # whole vectors of channels, and of positions of dy
    Conv("3x3_odd", (2, 3, 5, 7), (5, 3, 3), padding=(1, 1)),
    Conv("3x3_stride_2", (3, 5, 9, 8), (7, 3, 3), stride=(2, 2), padding=(1, 1)),
    Conv("1x1", (2, 8, 4, 6), (5, 1, 1)),  # in planes, x is read by vectors
    Conv("1x1_stride_2", (3, 4, 7, 8), (3, 1, 1), stride=(2, 2)),  # a projection: three splits, folded in pairs
    Conv("2x5_stride_3_1", (2, 3, 7, 9), (4, 2, 5), stride=(3, 1), padding=(0, 2)),
    Conv("padding_beyond_kernel", (2, 2, 3, 3), (3, 1, 2), padding=(2, 2)),  # outputs that depend only on padding
    Conv("whole_image", (5, 3, 4, 4), (6, 4, 4)),  # one position per image
    Conv("one_place", (9, 3, 1, 1), (4, 3, 3), padding=(1, 1)),  # rows in both memory formats
    Conv("one_channel", (2, 1, 6, 5), (1, 3, 3), padding=(1, 1)),
]
FEW = CASES[:3]
FORMATS = (torch.contiguous_format, torch.channels_last)


@contextmanager
def tiny() -> Iterator[None]:
    """Blocks so small that small tensors have several of each kind, complete and partial, in several splits."""
    import sys

    module = sys.modules["bnkern.backends.triton.conv_grad_signs"]
    before = module.blocks, module.PROGRAMS, module.PARTS, module.ELEMENTS
    module.blocks = lambda by_channels, itemsize, outputs: module.Blocks(4, 32, 16)
    module.PROGRAMS, module.PARTS, module.ELEMENTS = 4, 2, 16
    try:
        yield
    finally:
        module.blocks, module.PROGRAMS, module.PARTS, module.ELEMENTS = before


def kernels(device: str = "cpu", dtype: torch.dtype = torch.float32):
    return backends.choose("triton", device, dtype)


def check_sums(arguments: tuple, results: tuple[Tensor | None, ...], wanted: tuple[bool, ...] = ALL) -> None:
    """Compares with float64 arithmetic: counts must be exact, and sums exact to rounding."""
    x, dy, *sizes = arguments
    truth = reference.conv_grad_signs(x.double(), dy.double(), *sizes, ALL)
    acc = reference.accumulator(x.dtype)
    dtypes = (acc, acc, torch.int32, torch.int32)
    # Products of two half-precision values are exact in float32, others round once, and each partial sum rounds once.
    # Sums of up to a few hundred terms have errors below 32 roundings of sum |d|; the worst case is one rounding per
    # term.
    bound = 32 * torch.finfo(acc).eps * truth[1]
    for result, expected, is_requested, dtype in zip(results, truth, wanted, dtypes, strict=True):
        if not is_requested:
            assert result is None
            continue
        assert result.dtype is dtype
        assert result.shape == expected.shape
        if dtype is torch.int32:
            assert torch.equal(result, expected)
        else:
            assert ((result.double() - expected).abs() <= bound).all()


# ------------------------------------------------------------------------------------- through the interpreter


def against_float64(case: Conv, dtype: torch.dtype) -> None:
    for memory_format in FORMATS:
        arguments = case.arguments(dtype, memory_format)
        with tiny():
            check_sums(arguments, kernels().conv_grad_signs(*arguments, ALL))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(case: Conv) -> None:
    interpreted(against_float64, case, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("case", FEW, ids=str)
def test_dtypes(case: Conv, dtype: torch.dtype) -> None:
    interpreted(against_float64, case, dtype)


def blocks_as_launched(dtype: torch.dtype) -> None:
    for memory_format in FORMATS:
        arguments = Conv("blocks", (2, 8, 6, 8), (36, 3, 3), padding=(1, 1)).arguments(dtype, memory_format)
        check_sums(arguments, kernels().conv_grad_signs(*arguments, ALL))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_blocks_as_launched(dtype: torch.dtype) -> None:
    """The same with the block sizes of GPUs: several blocks of outputs, columns and positions, the last one partial."""
    interpreted(blocks_as_launched, dtype)


def subsets(case: Conv) -> None:
    for memory_format in FORMATS:
        arguments = case.arguments(torch.float32, memory_format)
        with tiny():
            every = kernels().conv_grad_signs(*arguments, ALL)
            for wanted in SUBSETS if memory_format is torch.channels_last else SUBSETS[:1]:
                selected = kernels().conv_grad_signs(*arguments, wanted)
                for result, expected, is_requested in zip(selected, every, wanted, strict=True):
                    assert torch.equal(result, expected) if is_requested else result is None


@pytest.mark.parametrize("case", FEW[1:2], ids=str)
def test_subsets(case: Conv) -> None:
    """Each sum has the same bits in every set of requested sums."""
    interpreted(subsets, case)


def views() -> None:
    x, dy, *sizes = CASES[0].arguments(torch.float32, torch.contiguous_format)
    with tiny():
        expected = kernels().conv_grad_signs(x, dy, *sizes, ALL)
        check_sums((x, dy, *sizes), expected)
        nan = torch.full((2, 24, *x.shape[2:]), torch.nan)
        inside = [torch.cat([nan[:, :8], t, nan[:, :8]], 1)[:, 8:-8] for t in (x[:2], dy[:2])]
        check_sums((x[:2], dy[:2], *sizes), kernels().conv_grad_signs(*inside, *sizes, ALL))
        # A batch of 70 positions, no whole number of blocks, followed by NaN.
        short = CASES[1].arguments(torch.float32, torch.channels_last)
        inside = [torch.cat([t, torch.full_like(t, torch.nan)])[:2] for t in short[:2]]
        check_sums(short, kernels().conv_grad_signs(*inside, *short[2:], ALL))
        for other in (x.contiguous(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3)):
            check_sums((x, dy, *sizes), kernels().conv_grad_signs(other, dy, *sizes, ALL))
        ones = torch.ones(()).expand(dy.shape)
        check_sums((x, ones, *sizes), kernels().conv_grad_signs(x, ones, *sizes, ALL))
        # One element after an aligned address.
        misaligned = torch.cat([torch.zeros(1), x.flatten()])[1:].view(x.shape)
        assert all(map(torch.equal, kernels().conv_grad_signs(misaligned, dy, *sizes, ALL), expected))


def test_views() -> None:
    """Slices of channels and batch, the other memory format, transposed, expanded, and unaligned tensors."""
    interpreted(views)


def specials() -> None:
    """NaN has sign 0 and is not zero. Infinities have their sign, and -0 is a zero."""
    x, dy, *sizes = CASES[1].arguments(torch.float32, torch.contiguous_format)
    x.view(-1)[::11], x.view(-1)[5::13] = torch.nan, -0.0
    dy.view(-1)[::7], dy.view(-1)[3::17] = -torch.inf, torch.nan
    for memory_format in FORMATS:
        arguments = (x.contiguous(memory_format=memory_format), dy, *sizes)
        with tiny():
            ours = kernels().conv_grad_signs(*arguments, ALL)
        truth = reference.conv_grad_signs(*arguments, ALL)
        assert all(map(torch.equal, ours[2:], truth[2:]))


def test_specials() -> None:
    interpreted(specials)


def wide_offsets() -> None:
    import sys

    module = sys.modules["bnkern.backends.triton.conv_grad_signs"]
    for case, memory_format in product(FEW[1:2], FORMATS):
        arguments = case.arguments(torch.float32, memory_format)
        with tiny():
            narrow, before = kernels().conv_grad_signs(*arguments, ALL), module.INT32_OFFSETS
            module.INT32_OFFSETS = 0
            try:
                wide = kernels().conv_grad_signs(*arguments, ALL)
            finally:
                module.INT32_OFFSETS = before
        assert all(map(torch.equal, narrow, wide))


def test_wide_offsets() -> None:
    """The variant for more than 2^31 elements gives the same bits."""
    interpreted(wide_offsets)


def no_positions() -> None:
    for x, dy in (((0, 3, 4, 4), (0, 5, 4, 4)), ((2, 3, 0, 4), (2, 5, 0, 4)), ((2, 0, 4, 4), (2, 5, 4, 4))):
        for memory_format in FORMATS:
            t = torch.ones(x).contiguous(memory_format=memory_format)
            ours = kernels().conv_grad_signs(t, torch.ones(dy), (3, 3), (1, 1), (1, 1), (True, False, True, True))
            assert ours[1] is None
            for result, dtype in zip((ours[0], *ours[2:]), (torch.float32, torch.int32, torch.int32), strict=True):
                assert torch.equal(result, torch.zeros(5, x[1], 3, 3, dtype=dtype))


def test_no_positions() -> None:
    """Sums over no positions are zero."""
    interpreted(no_positions)


def memory_format_of(case: Conv) -> None:
    for memory_format in FORMATS:
        arguments = case.arguments(torch.float32, memory_format)
        for result in kernels().conv_grad_signs(*arguments, ALL):
            assert result.is_contiguous(memory_format=memory_format)


def test_memory_format() -> None:
    """The results have the memory format of x, as the weights of a network in that format do."""
    interpreted(memory_format_of, CASES[0])


# ----------------------------------------------------------------------------------------- what is compiled

compiled = pytest.mark.skipif(
    resources.backend.refuses(torch.device("cpu"), torch.float32) is None,
    reason="TRITON_INTERPRET is set, so no kernel is compiled",
)
EVERY_TEST = [pytest.param(90, ["bf16"], id="sm_90")]
SLOW = [
    pytest.param(arch, list(resources.CONV_DTYPES), id=f"sm_{arch}_all", marks=pytest.mark.slow)
    for arch in resources.ARCHITECTURES
]


@compiled
@pytest.mark.parametrize(("architecture", "precisions"), EVERY_TEST + SLOW)
def test_resources(architecture: int, precisions: list[str]) -> None:
    """No kernel spills, products use tensor cores, operands are read 16 bytes at a time, and the table agrees."""
    table = json.loads(resources.TABLE.read_text()).get(triton.__version__, {}).get(f"sm_{architecture}", {})
    for name, (variant, usage) in resources.conv_entries_of(architecture, precisions).items():
        assert usage.spilled == 0, f"{name} spills {usage.spilled}"
        if table and set(precisions) & set(resources.TABLED) and (name in table or name.split()[1] in resources.TABLED):
            assert usage.entry == table[name], name
        if "ROWS" not in variant.constants:
            continue
        floats = sum(variant.signature[name] != "constexpr" for name in ("sum_ptr", "abs_sum_ptr"))
        counts = sum(variant.signature[name] != "constexpr" for name in ("sign_sum_ptr", "nonzero_ptr"))
        products = re.findall(r"(?:wgmma\.mma_async|mma|tcgen05\.mma)\.\S+", usage.ptx)
        integers = [p for p in products if ".s32.s8.s8" in p]
        assert (len(integers) > 0) == (counts > 0), name
        if variant.signature["x_ptr"] in ("*fp16", "*bf16"):
            assert (len(products) > len(integers)) == (floats > 0), name
        whole = len(re.findall(r"ld\.global\S*\.(?:v4\.b32|v2\.b64)", usage.ptx))
        itemsize = 2 if "16" in variant.signature["x_ptr"] else 4 if "32" in variant.signature["x_ptr"] else 8
        expected = 0
        for operand, channels in (("X", "N"), ("DY", "M")):
            a_thread = variant.constants[f"BLOCK_{channels}"] * variant.constants["BLOCK_K"] * itemsize // 128
            if variant.constants[f"{operand}_VECTOR"] == 8:
                expected += a_thread // 16  # in the smallest blocks a thread has 8 bytes of dy
        assert whole >= expected, f"{name}: {whole} whole vectors, not {expected}"


@compiled
def test_instances() -> None:
    """A network of 3, 16, 32 and 64 channels needs few kernels: with or without probes, two block sizes, the stem."""
    recorded = set()
    for inputs, outputs in ((3, 16), (16, 16), (16, 32), (32, 32), (32, 64), (64, 64)):
        for memory_format, wanted in product(FORMATS, ((True, False, False, False), ALL)):
            case = Conv("", (2, inputs, 8, 8), (outputs, 3, 3), padding=(1, 1))
            recorded |= {v.key for v in resources.conv_variants(case.arguments(torch.bfloat16, memory_format), wanted)}
    # For each format 2 block sizes and, in rows, the elements of the stem, each with and without probes. The fold is
    # compiled with and without probes.
    assert len(recorded) <= 2 * (2 + 3) + 2


# ----------------------------------------------------------------------------------------------- on a real GPU


def on_gpu(test):
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")(test))


LARGE = [
    Conv("stem", (128, 3, 32, 32), (16, 3, 3), padding=(1, 1), device="cuda"),
    Conv("stage_1", (128, 16, 32, 32), (16, 3, 3), padding=(1, 1), device="cuda"),
    Conv("stage_2_first", (128, 16, 32, 32), (32, 3, 3), stride=(2, 2), padding=(1, 1), device="cuda"),
    Conv("stage_2_projection", (128, 16, 32, 32), (32, 1, 1), stride=(2, 2), device="cuda"),
    Conv("stage_3", (128, 64, 8, 8), (64, 3, 3), padding=(1, 1), device="cuda"),
    Conv("ragged", (37, 17, 13, 11), (19, 2, 5), stride=(1, 2), padding=(2, 1), device="cuda"),
]


@on_gpu
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_on_gpu(case: Conv, dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    """The results are correct, and each sum has the same bits in every run and in every set of requested sums."""
    arguments = case.arguments(dtype, memory_format)
    every = kernels("cuda", dtype).conv_grad_signs(*arguments, ALL)
    x, dy, *sizes = arguments
    truth = reference.conv_grad_signs(x.double(), dy.double(), *sizes, ALL)
    acc = reference.accumulator(dtype)
    # Some thousand terms in a program and some hundred programs: 2^12 roundings are far above a random walk's.
    for result, expected in zip(every[:2], truth[:2], strict=True):
        assert ((result.double() - expected).abs() <= 2**12 * torch.finfo(acc).eps * truth[1]).all()
    assert all(map(torch.equal, every[2:], truth[2:]))
    for wanted in SUBSETS:
        selected = kernels("cuda", dtype).conv_grad_signs(*arguments, wanted)
        assert all(
            torch.equal(s, e) if is_requested else s is None
            for s, e, is_requested in zip(selected, every, wanted, strict=True)
        )
