"""Properties of batch norm for arbitrary values. hypothesis chooses shapes, layouts and values."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import bnkern
from bnkern import backends
from tests.support.cases import (
    EPS,
    FP32,
    FP64,
    LAYOUTS,
    TARGETS,
    Case,
    Problem,
    Target,
    assert_close,
    by_channel,
    exact,
    mean_bound,
    per_channel,
    var_bound,
)

SIZES = st.integers(1, 9)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Two to four dimensions, at least two values per channel, in either layout."""
    space = draw(st.lists(SIZES, max_size=2))
    n, c = draw(st.integers(2, 9)), draw(st.integers(1, 40))
    layout = draw(st.sampled_from(["contiguous", "channels_last", "sliced_channels", "sliced_batch"]))
    ratio = draw(st.sampled_from([0.0, 1.0, 30.0, 1000.0]))
    shape = (n, c, *space)
    return Case(f"{shape} {layout} {ratio}", shape, "", layout, ratio)


def on_every_target(function):
    """Runs a property on each backend. It uses a parameter, since a fixture would run only once for all examples."""
    marked = [
        pytest.param(target, id=str(target), marks=[pytest.mark.gpu] if target.device == "cuda" else [])
        for target in TARGETS
    ]
    return pytest.mark.parametrize("target", marked)(settings(max_examples=60)(function))


def gradients(p: Problem, training: bool = True, act: str | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, dx, dweight, dbias."""
    leaves = [t.detach().requires_grad_() for t in (p.x, p.weight, p.bias)]
    y = bnkern.batch_norm(leaves[0], None, None, *leaves[1:], training, eps=EPS, act=act)
    return (y.detach(), *torch.autograd.grad(y, leaves, p.dy))


@on_every_target
@given(case=cases(), act=st.sampled_from([None, "relu"]))
def test_input_gradient_is_orthogonal(target: Target, case: Case, act: str | None) -> None:
    """sum dx = 0 and sum dx * xhat = 0 per channel, except for the eps term of the latter.

    With eps in xhat, sum xhat^2 = M var / (var + eps), and so sum dx * xhat = weight * invstd * dweight * (1 - var /
    (var + eps)).
    """
    with bnkern.use_backend(target.backend):
        p = case.problem(FP64, target.device)
        _, dx, dweight, _ = gradients(p, act=act)
    x, dx, weight, dy = exact(p.x, dx, p.weight, p.dy)
    var, mean = torch.var_mean(x, dim=[0, *range(2, x.dim())], correction=0)
    invstd = torch.rsqrt(var + EPS)
    xhat = (x - by_channel(mean, x)) * by_channel(invstd, x)
    # Each term that cancels is at most |weight| invstd |dy|. Roundings of x and mean count in proportion to their
    # ratio.
    scale = (weight * invstd).abs() * per_channel(torch.sum, dy.abs()).flatten() * (1 + mean.abs() * invstd) * 1e-14
    eps_term = weight * invstd * exact(dweight)[0] * EPS / (var + EPS)
    assert_close(per_channel(torch.sum, dx).flatten(), torch.zeros_like(mean), scale, "sum dx")
    products = per_channel(torch.sum, dx * xhat).flatten()
    assert_close(products, eps_term, scale * (1 + xhat.abs().max()), "sum dx * xhat")


@on_every_target
@given(case=cases())
def test_output_is_normalised(target: Target, case: Case) -> None:
    """In each channel y has the mean bias and the variance weight^2 var / (var + eps)."""
    with bnkern.use_backend(target.backend):
        p = case.problem(FP64, target.device)
        y = gradients(p)[0]
    x, y, weight, bias = exact(p.x, y, p.weight, p.bias)
    axes = [0, *range(2, x.dim())]
    var, mean = torch.var_mean(x, dim=axes, correction=0)
    y_var, y_mean = torch.var_mean(y, dim=axes, correction=0)
    slack = 1e-13 * (1 + mean.abs() / (var + EPS).sqrt())
    assert_close(y_mean, bias, slack, "mean of y")
    assert_close(y_var, weight**2 * var / (var + EPS), slack, "variance of y")


@on_every_target
@given(case=cases(), shift=st.integers(-1000, 1000), act=st.sampled_from([None, "relu"]))
def test_shift_invariance(target: Target, case: Case, shift: int, act: str | None) -> None:
    """x + c gives the same y and gradients, except for the roundings of x + c."""
    with bnkern.use_backend(target.backend):
        p = case.problem(FP64, target.device)
        results = [gradients(p._replace(x=x)) for x in (p.x, p.x + shift)]
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


@on_every_target
@given(case=cases(), power=st.integers(-6, 6), act=st.sampled_from([None, "relu"]))
def test_scale_invariance(target: Target, case: Case, power: int, act: str | None) -> None:
    """With eps scaled too, 2^k x gives the same bits of y and the parameters' gradients, and 2^-k dx.

    A power of two changes no rounding, so different bits would indicate a hidden constant.
    """
    scale, results = 2.0**power, []
    p = case.problem(FP32, target.device)
    with bnkern.use_backend(target.backend):
        for factor in (1.0, scale):
            x, weight, bias = leaves = [t.detach().requires_grad_() for t in (p.x * factor, p.weight, p.bias)]
            y = bnkern.batch_norm(x, None, None, weight, bias, True, eps=2.0**-16 * factor**2, act=act)
            dx, dweight, dbias = torch.autograd.grad(y, leaves, p.dy)
            results.append((y, dx * factor, dweight, dbias))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@on_every_target
@given(case=cases(), power=st.integers(-6, 6))
def test_backward_is_linear_in_dy(target: Target, case: Case, power: int) -> None:
    """2^k dy gives exactly 2^k times every gradient."""
    p = case.problem(FP32, target.device)
    with bnkern.use_backend(target.backend):
        scaled = LAYOUTS[case.layout](p.dy * 2.0**power)  # another layout could change the order of sums
        one, other = gradients(p, act="relu"), gradients(p._replace(dy=scaled), act="relu")
    for a, b in zip(one[1:], other[1:], strict=True):
        assert torch.equal(a * 2.0**power, b)


@on_every_target
@given(case=cases(), act=st.sampled_from([None, "relu"]))
def test_sign_symmetry(target: Target, case: Case, act: str | None) -> None:
    """(-x, -weight) gives exactly the y of (x, weight), and -dx."""
    p = case.problem(FP32, target.device)
    with bnkern.use_backend(target.backend):
        negated = LAYOUTS[case.layout](-p.x)  # another layout could change the order of sums
        one, other = gradients(p, act=act), gradients(p._replace(x=negated, weight=-p.weight), act=act)
    for sign, a, b in zip((1, -1, -1, 1), one, other, strict=True):
        assert torch.equal(a, sign * b)


@on_every_target
@given(case=cases(), seed=st.integers(0, 100), act=st.sampled_from([None, "relu"]))
def test_batch_permutation(target: Target, case: Case, seed: int, act: str | None) -> None:
    """A permutation of the samples permutes the results, except for the order of summation."""
    order = torch.randperm(case.shape[0], generator=torch.Generator().manual_seed(seed)).to(target.device)
    with bnkern.use_backend(target.backend):
        p = case.problem(FP64, target.device)
        y, dx, dweight, dbias = gradients(p, act=act)
        permuted = gradients(p._replace(x=p.x[order], dy=p.dy[order]), act=act)
    for one, other in zip((y[order], dx[order], dweight, dbias), permuted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@on_every_target
@given(case=cases(), seed=st.integers(0, 100))
def test_channels_are_independent(target: Target, case: Case, seed: int) -> None:
    """In eval mode the results of a channel have the same bits at every position."""
    order = torch.randperm(case.shape[1], generator=torch.Generator().manual_seed(seed)).to(target.device)
    p = case.problem(FP32, target.device)

    def call(x: Tensor, dy: Tensor, *vectors: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_()
        y = bnkern.batch_norm(x, *vectors, act="relu")
        return y.detach(), torch.autograd.grad(y, x, dy)[0]

    vectors = (p.mean, p.invstd**-2, p.weight, p.bias)
    with bnkern.use_backend(target.backend):
        plain = call(p.x, p.dy, *vectors)
        permuted = call(p.x[:, order], p.dy[:, order], *(v[order] for v in vectors))
    for one, other in zip(plain, permuted, strict=True):
        assert torch.equal(one[:, order], other)


@on_every_target
@given(
    counts=st.lists(st.integers(0, 50), min_size=1, max_size=6),
    ratio=st.sampled_from([0.0, 10.0, 1000.0]),
    seed=st.integers(0, 1000),
    data=st.data(),
)
def test_merge_is_free_of_order(
    target: Target, counts: list[int], ratio: float, seed: int, data: st.DataObject
) -> None:
    """Every order and grouping of the parts gives the moments of the whole, to rounding."""
    merge = backends.choose(target.backend, target.device, torch.float32).merge
    moments = backends.choose(target.backend, target.device, torch.float32).moments
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(sum(counts), 3, generator=generator) + ratio).to(target.device)
    parts = [moments(part) for part in x.split(counts)]

    def merged(parts: list) -> tuple[int, Tensor, Tensor]:
        n, means, m2s = zip(*parts, strict=True)
        count, mean, m2 = merge(
            torch.tensor([int(k) for k in n], device=target.device), torch.stack(means), torch.stack(m2s)
        )
        return int(count), mean, m2

    order = data.draw(st.permutations(range(len(parts))))
    cut = data.draw(st.integers(1, len(parts)))
    shuffled = [parts[k] for k in order]
    grouped = [merged(shuffled[:cut]), *shuffled[cut:]]
    (wide,) = exact(x)
    true_mean = wide.mean(0) if len(wide) else torch.zeros(3, dtype=torch.float64)
    true_var = wide.var(0, correction=0) if len(wide) else true_mean
    # Each part's mean is rounded by eps / 2 of itself. So the difference of two means has an error up to eps * |mean|,
    # and its square, a part of the variance, up to 2 * eps * |mean| * sigma.
    rounded_means = 2 * torch.finfo(x.dtype).eps * true_mean.abs() * true_var.sqrt()
    for count, mean, m2 in (merged(parts), merged(shuffled), merged(grouped)):
        assert count == len(x)
        assert_close(mean, true_mean, mean_bound(true_mean, true_var, x.dtype), "mean")
        bound = var_bound(true_mean, true_var, x.dtype) + rounded_means
        assert_close(m2 / max(count, 1), true_var, bound, "variance")


@on_every_target
@given(case=cases())
def test_training_equals_eval_with_the_batch_statistics(target: Target, case: Case) -> None:
    """Eval mode with the batch's mean and biased variance gives the y of training."""
    with bnkern.use_backend(target.backend):
        p = case.problem(FP64, target.device)
        _, mean, var = bnkern.channel_moments(p.x)
        y = bnkern.batch_norm(p.x, None, None, p.weight, p.bias, True)
        z = bnkern.batch_norm(p.x, mean, var, p.weight, p.bias)
    torch.testing.assert_close(y, z, rtol=1e-12, atol=1e-12)


@on_every_target
@given(case=cases(), act=st.sampled_from([None, "relu"]))
def test_fusing_changes_at_most_a_rounding(target: Target, case: Case, act: str | None) -> None:
    """Fused addition and ReLU equal those of torch after the plain call."""
    p = case.problem(FP32, target.device)
    with bnkern.use_backend(target.backend):
        fused = bnkern.batch_norm(p.x, None, None, p.weight, p.bias, True, residual=p.residual, act=act)
        apart = bnkern.batch_norm(p.x, None, None, p.weight, p.bias, True) + p.residual
    torch.testing.assert_close(fused, apart.relu() if act else apart, rtol=1e-6, atol=2e-6)
