"""Convolutions between batch norms: the kernels against the reference in float64."""

import pytest
import torch
from torch import Tensor

from bnkern.backends import cpu, reference
from bnkern.backends.calls import BackwardCall, ForwardCall
from tests.support.conv_norm import last
from tests.support.threads import equal as same_values
from tests.support.threads import for_any_number_of_threads

# Images, channels in and out, rows, columns: strips of whole images and of rows, odd sizes, a few and many channels.
SIZES = [
    (8, 16, 16, 32, 32),
    (7, 32, 32, 16, 16),
    (9, 64, 64, 8, 8),
    (3, 16, 32, 31, 29),
    (2, 64, 16, 57, 57),
    (1, 16, 16, 33, 200),
    (5, 272, 48, 7, 7),
    (2, 16, 16, 1, 6),
]
# Relative to the largest value of the result: sums of up to 9 * 272 products, through two transforms and a norm.
TOLERANCE = 3e-6


def close(actual: Tensor | None, expected: Tensor | None) -> None:
    assert (actual is None) == (expected is None)
    if actual is not None and actual.dtype is torch.uint8:
        differing = (actual ^ expected).view(-1, 1).bitwise_and(1 << torch.arange(8)).bool().sum()
        assert differing <= 4e-6 * 8 * actual.numel() + 1  # where z is 0 up to rounding
    elif actual is not None:
        error = (actual.double() - expected.double()).abs().max()
        assert error <= TOLERANCE * expected.double().abs().max(), float(error)


def double(call: ForwardCall | BackwardCall) -> ForwardCall | BackwardCall:
    return type(call)(*(t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in call))


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("act", [None, "relu"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_kernels(sizes: tuple[int, ...], act: str | None, residual: bool) -> None:
    """The convolution has a bias where the norm before it has a residual."""
    n, inputs, outputs, h, w = sizes
    torch.manual_seed(0)
    x, shortcut = (last(torch.randn(n, inputs, h, w)) for _ in range(2))
    x = x * 2 + 1
    weight = torch.randn(outputs, inputs, 3, 3) / (3 * inputs**0.5)
    scales, biases = [torch.rand(c) + 0.5 for c in (inputs, outputs)], [torch.randn(c) for c in (inputs, outputs)]
    mean, invstd = x.mean((0, 2, 3)), torch.rsqrt(x.var((0, 2, 3), unbiased=False) + 1e-5)
    call = ForwardCall(x, scales[0], biases[0], shortcut if residual else None, act=act, save_mask=True)
    shift = torch.randn(outputs) if residual else None

    def norm(dtype: torch.dtype) -> ForwardCall:
        running = torch.zeros(outputs, dtype=dtype), torch.ones(outputs, dtype=dtype)
        return ForwardCall(None, None, None, None, *running, torch.tensor(4), momentum=None)

    def forward() -> tuple:
        behind = norm(torch.float32)
        return *cpu.conv_norm_forward(call, mean, invstd, residual, weight, shift, behind), *behind[4:7]

    y, mask, r, r_mean, r_invstd, *running = for_any_number_of_threads(forward)
    wide = norm(torch.float64)
    options = (weight.double(), None if shift is None else shift.double(), wide)
    truth = reference.conv_norm_forward(double(call), mean.double(), invstd.double(), residual, *options)
    for actual, expected in zip((y, mask, r, r_mean, r_invstd), truth, strict=True):
        close(actual, expected)
    for actual, expected in zip(running, wide[4:7], strict=True):
        close(actual, expected)

    g = last(torch.randn(r.shape))
    behind = BackwardCall(g, r, scales[1], biases[1], r_mean, r_invstd)
    _, sums, *_ = cpu.grad_before_act(behind)
    before = BackwardCall(None, x, scales[0], biases[0], mean, invstd, mask, act)
    options = (y, shortcut if residual else None, (True, True))
    results = for_any_number_of_threads(lambda: cpu.conv_norm_backward(behind, sums, weight, before, *options))
    truth = reference.conv_norm_backward(
        double(behind),
        sums,
        weight.double(),
        double(before),
        *(t.double() if t is not None else t for t in options[:2]),
        options[2],
    )
    for actual, expected in zip(results, truth, strict=True):
        close(actual, expected)
    # without one of the results, and without a norm before the convolution
    only = cpu.conv_norm_backward(behind, sums, weight, before, *options[:2], (False, True))
    assert only[:4] == (None,) * 4 and torch.equal(only[4], results[4])
    only = cpu.conv_norm_backward(behind, sums, weight, before, *options[:2], (True, False))
    assert only[4] is None and torch.equal(only[0], results[0])
    plain = cpu.conv_norm_backward(behind, sums, weight, None, x, None, (True, True))
    truth = reference.conv_norm_backward(double(behind), sums, weight.double(), None, x.double(), None, (True, True))
    for actual, expected in zip(plain, truth, strict=True):
        close(actual, expected)


RECORDED = (("activation", 9), ("gradient", 8), ("affine", 8))


@pytest.mark.parametrize("special", [None, torch.inf, torch.nan])
@pytest.mark.parametrize("sizes", [(7, 16, 16, 32, 32), (3, 16, 32, 31, 29), (2, 64, 16, 57, 57)], ids=str)
def test_records(sizes: tuple[int, ...], special: float | None) -> None:
    """Against the reference's records of the tensors that the kernels computed. They change no bit of these."""
    n, inputs, outputs, h, w = sizes
    torch.manual_seed(0)
    x, weight = last(torch.randn(n, inputs, h, w)), torch.randn(outputs, inputs, 3, 3)
    vectors = torch.zeros(inputs), torch.ones(inputs)
    call, norm = ForwardCall(x, act="relu", record=torch.empty(9, inputs, dtype=torch.float64)), ForwardCall(None)
    call.record.fill_(-1)
    results = cpu.conv_norm_forward(call._replace(record=None), *vectors, True, weight, None, norm)
    record = torch.empty(9, outputs, dtype=torch.float64)
    recorded = for_any_number_of_threads(
        lambda: (
            *cpu.conv_norm_forward(call, *vectors, True, weight, None, norm._replace(record=record)),
            record.clone(),
        )
    )
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(results, recorded[:-1], strict=True))
    y, _, r, mean, invstd = results
    assert torch.equal(call.record[8], (y > 0).sum((0, 2, 3)).double()) and (call.record[:8] == -1).all()
    close_rows(record[:8], reference.activation(r, y.new_zeros(()).expand(r.shape))[:8])

    g = last(torch.randn(r.shape))
    if special is not None:
        g[1, 3, 2:4, 1] = special
    sums = torch.randn(2, outputs, dtype=torch.float64)
    gradient = torch.empty(8, outputs, dtype=torch.float64)
    affine, samples = (torch.zeros(rows, inputs, dtype=torch.float64) for rows in (8, 5))
    whole = h * w * max(inputs, outputs) <= 16_384
    behind, before = (
        BackwardCall(g, r, None, None, mean, invstd),
        BackwardCall(None, x, None, None, *vectors, None, "relu"),
    )
    before_recorded = before._replace(record_affine=affine, record_samples=samples if whole else None)
    options = (weight, before_recorded, y, None, (True, True))
    behind = behind._replace(record_gradient=gradient)
    recorded = for_any_number_of_threads(
        lambda: (*cpu.conv_norm_backward(behind, sums, *options), gradient.clone(), affine.clone(), samples.clone())
    )
    results = cpu.conv_norm_backward(behind._replace(record_gradient=None), sums, weight, before, *options[2:])
    for a, b in zip(results, recorded[:5], strict=True):
        assert same_values(a, b)
    dr, _ = cpu.grad_input(
        behind._replace(record_gradient=None, needs=(True, False, False, False)), (*sums.float(), n * h * w)
    )
    close_rows(gradient, reference.gradient(dr), exact=special is None)
    if special is None:
        close_rows(affine, reference.affine(before._replace(dy=results[0], act=None)))
        if whole:
            close_rows(samples, reference.samples(before._replace(dy=results[0], act=None)))


def close_rows(actual: Tensor, expected: Tensor, exact: bool = True) -> None:
    """Sums are in float32 over a strip. Counts agree, unless rounding moves a value over zero."""
    same = actual == expected
    finite = expected.isfinite()
    assert (same | finite | (actual.isnan() & expected.isnan())).all()
    bound = 1e-4 * expected.where(finite, 0).abs().amax(1, keepdim=True) + (1e-3 if exact else 2)
    assert ((actual - expected).where(finite, 0).abs() <= bound).all()


def test_grad_before_act() -> None:
    torch.manual_seed(1)
    x, dy, residual = (last(torch.randn(3, 16, 9, 7)) for _ in range(3))
    mean, invstd, weight, bias = torch.randn(16), torch.rand(16) + 0.5, torch.randn(16), torch.randn(16)
    _, mask = cpu.normalize(ForwardCall(x, weight, bias, residual, act="relu", save_mask=True), mean, invstd)
    call = BackwardCall(dy, x, weight, bias, mean, invstd, mask, "relu")
    for actual, expected in zip(cpu.grad_before_act(call), reference.grad_before_act(double(call)), strict=True):
        close(actual, expected)
    assert cpu.grad_before_act(call)[1].dtype is torch.float64


def test_wrong_operands() -> None:
    x, weight = last(torch.randn(2, 16, 8, 8)), torch.randn(16, 16, 3, 3)
    vector = torch.ones(16)
    call, norm = ForwardCall(x), ForwardCall(None)
    for arguments in (
        (call, None, None, True, weight, None, norm),  # no statistics
        (call._replace(x=x.contiguous()), vector, vector, True, weight, None, norm),
        (call._replace(x=x.double()), vector.double(), vector.double(), True, weight.double(), None, norm),
        (call, vector, vector, True, weight[:, :8], None, norm),
        (call, vector, vector, True, weight, vector[:8], norm),
        (call, vector, vector, True, weight, None, norm._replace(training=False)),  # without running statistics
        (call._replace(residual=x[:1]), vector, vector, True, weight, None, norm),
        (call, vector, vector, True, weight, None, norm._replace(running_mean=vector[:8], running_var=vector[:8])),
    ):
        with pytest.raises(TypeError, match=r"must be"):
            cpu.conv_norm_forward(*arguments)
    behind, sums = BackwardCall(x, x, None, None, vector, vector), torch.zeros(2, 16, dtype=torch.float64)
    for arguments in (
        (behind._replace(act="relu"), sums, weight, None, x, None, (True, True)),
        (behind, sums[:, :8], weight, None, x, None, (True, True)),
        (behind, sums, weight, None, x[:1], None, (True, True)),
        (behind, sums, weight, None, x, x.contiguous(), (True, True)),
        (behind, sums, weight, None, x, None, True),
    ):
        with pytest.raises(TypeError, match=r"must be"):
            cpu.conv_norm_backward(*arguments)
    with pytest.raises(ValueError, match="multiples of 16"):
        cpu.conv_norm_forward(x, None, None, False, weight[:8], None, norm)
