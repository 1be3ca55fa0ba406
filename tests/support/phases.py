"""Checks of each phase of batch norm, for any backend. Each compares a phase with the reference in float64."""

import torch

from bnkern import backends
from bnkern.backends import reference
from bnkern.backends.calls import BackwardCall, ForwardCall
from bnkern.backends.layout import layout
from bnkern.backends.reference import accumulator
from tests.support.cases import (
    CASE,
    FP32,
    Case,
    Precision,
    Target,
    assert_close,
    assert_mask_agrees,
    by_channel,
    dx_bound,
    exact,
    mean_bound,
    passed,
    sums_bound,
    var_bound,
    y_bound,
)


def check_moments(target: Target, precision: Precision, case: Case) -> None:
    """Count, mean and M2 against the reference in float64."""
    x = case.problem(precision, target.device).x
    count, mean, m2 = backends.choose(target.backend, target.device, x.dtype).moments(x)
    true_count, true_mean, true_m2 = reference.moments(*exact(x))
    assert count == true_count
    assert mean.dtype == m2.dtype == accumulator(x.dtype)
    not_finite = ~true_m2.isfinite()
    assert not m2.cpu()[not_finite].isfinite().any(), "a channel with Inf or NaN has no finite variance"
    assert not mean.cpu()[not_finite].isfinite().any()
    true_var = (true_m2 / count)[~not_finite]
    true_mean = true_mean[~not_finite]
    assert_close(mean.cpu()[~not_finite], true_mean, mean_bound(true_mean, true_var, x.dtype), "mean")
    assert_close(m2.cpu()[~not_finite] / count, true_var, var_bound(true_mean, true_var, x.dtype), "variance")
    assert (m2.cpu()[~not_finite] >= 0).all()


def check_empty_moments(target: Target, shape: tuple[int, ...]) -> None:
    """Without values all three are zero."""
    kernels = backends.choose(target.backend, target.device, torch.float32)
    count, mean, m2 = kernels.moments(torch.empty(shape, device=target.device))
    assert count == 0
    assert mean.tolist() == m2.tolist() == [0.0, 0.0, 0.0]


def parts_of(x: torch.Tensor, sizes: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Counts [K], means and M2s [K, C] of the parts of x along the samples, by the reference."""
    parts = [reference.moments(part) for part in x.split(sizes)]
    counts, means, m2s = zip(*parts, strict=True)
    return torch.tensor(counts, device=x.device), torch.stack(means), torch.stack(m2s)


def check_merge(target: Target, precision: Precision, case: str, split: str) -> None:
    x = CASE[case].problem(precision, target.device).x
    n = x.shape[0]
    sizes = {"one": [n], "even": [n // 4] * 4, "uneven": [1, n - 3, 2], "with_empty": [0, n - 1, 0, 1, 0]}[split]
    counts, means, m2s = parts_of(x, sizes)
    merge = backends.choose(target.backend, target.device, x.dtype).merge
    count, mean, m2 = merge(counts, means, m2s)
    # The truth is the exact merge of the given parts.
    true_count, true_mean, true_m2 = reference.merge(counts.cpu(), *exact(means, m2s))
    assert count == true_count
    true_var = true_m2 / true_count
    assert_close(mean, true_mean, mean_bound(true_mean, true_var, x.dtype), "mean")
    assert_close(m2 / true_count, true_var, var_bound(true_mean, true_var, x.dtype), "variance")
    # The reference's merge in float64 gives the moments of the undivided tensor.
    wide_count, wide_mean, wide_m2 = reference.moments(*exact(x))
    _, mean_of_parts, m2_of_parts = reference.merge(*parts_of(exact(x)[0], sizes))
    assert count == wide_count
    torch.testing.assert_close(mean_of_parts, wide_mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(m2_of_parts, wide_m2, rtol=1e-7, atol=1e-20)


def check_merge_of_nothing(target: Target) -> None:
    """Parts of count 0 have no mean, whatever values they hold. Merging only such parts gives zeros, not 0/0."""
    merge = backends.choose(target.backend, target.device, torch.float32).merge
    counts = torch.zeros(3, dtype=torch.int64, device=target.device)
    nan = torch.full((3, 4), torch.nan, device=target.device)
    count, mean, m2 = merge(counts, nan, nan)
    assert count == 0
    assert mean.tolist() == m2.tolist() == [0.0] * 4


def check_merge_counts(target: Target) -> None:
    """Counts are integers: 2^24 + 1 and 2^33 + 1, which float32 cannot represent, are kept."""
    merge = backends.choose(target.backend, target.device, torch.float32).merge
    counts = torch.tensor([2**33 + 1, 2**24 + 1], device=target.device)
    count, mean, m2 = merge(counts, torch.ones(2, 3, device=target.device), torch.zeros(2, 3, device=target.device))
    assert count == 2**33 + 2**24 + 2
    assert mean.tolist() == [1.0] * 3
    assert m2.tolist() == [0.0] * 3


def _check_normalize(target: Target, x, mean, invstd, weight, bias, residual, act) -> None:
    kernels = backends.choose(target.backend, target.device, x.dtype)
    y, mask = kernels.normalize(ForwardCall(x, weight, bias, residual, act=act, save_mask=True), mean, invstd)
    wide = exact(x, weight, bias, residual)
    z, _ = reference.normalize(ForwardCall(*wide), *exact(mean, invstd))
    scale = 1.0 if weight is None else by_channel(exact(weight)[0], z)
    bound = y_bound(z, x.dtype, scale)
    assert y.dtype == x.dtype
    assert_close(y, z.relu() if act else z, bound, "y")
    if act and residual is not None:
        assert_mask_agrees(y, z, bound)
        expected = reference.pack_mask(passed(y), layout(x))
        assert torch.equal(mask, expected), "the mask is not the sign of y, bit for bit, with zeros for padding"
    else:
        assert mask is None


def check_normalize(target: Target, precision: Precision, case: Case, with_residual: bool, act) -> None:
    p = case.problem(precision, target.device)
    _check_normalize(target, p.x, p.mean, p.invstd, p.weight, p.bias, p.residual if with_residual else None, act)


def check_normalize_without(target: Target, precision: Precision, case: Case, without: str, with_residual, act) -> None:
    p = case.problem(precision, target.device)
    weight = None if without in ("weight", "affine", "identity") else p.weight
    bias = None if without in ("bias", "affine", "identity") else p.bias
    mean, invstd = (None, None) if without == "identity" else (p.mean, p.invstd)
    _check_normalize(target, p.x, mean, invstd, weight, bias, p.residual if with_residual else None, act)


def check_mask(target: Target, case: Case) -> None:
    """NaN passes the gradient, as in torch, and so does the smallest positive value.

    Zeros and negative values do not.
    """
    x = case.problem(FP32, target.device).x
    values = torch.tensor([torch.nan, 0.0, -0.0, torch.inf, -torch.inf, 1e-45, -1e-45], device=target.device)
    x = x.copy_(values.repeat(x.numel() // 7 + 1)[: x.numel()].view(x.shape))
    kernels = backends.choose(target.backend, target.device, x.dtype)
    y, mask = kernels.normalize(ForwardCall(x, residual=torch.zeros_like(x), act="relu", save_mask=True), None, None)
    bits = reference.unpack_mask(mask, x)
    assert torch.equal(bits, x.isnan() | (x > 0))
    assert torch.equal(y.nan_to_num(7.0), x.relu().nan_to_num(7.0))


def _check_grad_sums(target: Target, dy, x, mean, invstd, weight, bias, residual, act) -> None:
    kernels = backends.choose(target.backend, target.device, x.dtype)
    y, mask = kernels.normalize(ForwardCall(x, weight, bias, residual, act=act, save_mask=True), mean, invstd)
    sum_dy, sum_dy_xhat = kernels.grad_sums(BackwardCall(dy, x, weight, bias, mean, invstd, mask, act))
    wide_dy, wide_x, wide_mean, wide_invstd = exact(dy, x, mean, invstd)
    # The truth uses the mask of the forward's output.
    g = wide_dy.where(passed(y).cpu(), 0.0) if act else wide_dy
    xhat = wide_x if mean is None else (wide_x - by_channel(wide_mean, x)) * by_channel(wide_invstd, x)
    true_dy, true_dy_xhat = reference.grad_sums(BackwardCall(g, wide_x, mean=wide_mean, invstd=wide_invstd))
    dy_bound, dy_xhat_bound = sums_bound(g, xhat, x.dtype)
    assert sum_dy.dtype == sum_dy_xhat.dtype == accumulator(x.dtype)
    assert_close(sum_dy, true_dy, dy_bound, "sum dy")
    assert_close(sum_dy_xhat, true_dy_xhat, dy_xhat_bound, "sum dy * xhat")


def check_grad_sums(target: Target, precision: Precision, case: Case, act: str | None) -> None:
    p = case.problem(precision, target.device)
    residual = p.residual if act == "saved mask" else None
    _check_grad_sums(target, p.dy, p.x, p.mean, p.invstd, p.weight, p.bias, residual, act and "relu")


def check_grad_sums_without(target: Target, precision: Precision, case: Case, without: str, act: str | None) -> None:
    p = case.problem(precision, target.device)
    weight = None if without in ("weight", "affine", "identity") else p.weight
    bias = None if without in ("bias", "affine", "identity") else p.bias
    mean, invstd = (None, None) if without == "identity" else (p.mean, p.invstd)
    residual = p.residual if act == "saved mask" else None
    _check_grad_sums(target, p.dy, p.x, mean, invstd, weight, bias, residual, act and "relu")


def _check_grad_input(target: Target, dy, x, mean, invstd, weight, bias, residual, act, training) -> None:
    kernels = backends.choose(target.backend, target.device, x.dtype)
    y, mask = kernels.normalize(ForwardCall(x, weight, bias, residual, act=act, save_mask=True), mean, invstd)
    wide_dy, wide_x, wide_mean, wide_invstd, wide_weight = exact(dy, x, mean, invstd, weight)
    g = wide_dy.where(passed(y).cpu(), 0.0) if act else wide_dy
    sums = wide_sums = None
    if training:
        # Both get the same sums, rounded to the dtype of sums.
        pair = reference.grad_sums(BackwardCall(g, wide_x, mean=wide_mean, invstd=wide_invstd))
        count = x.numel() // x.shape[1]
        sums = (*(s.to(mean.dtype).to(target.device) for s in pair), count)
        wide_sums = (*exact(*sums[:2]), count)
    dx, dresidual = kernels.grad_input(BackwardCall(dy, x, weight, bias, mean, invstd, mask, act), sums)
    true_dx, _ = reference.grad_input(BackwardCall(g, wide_x, wide_weight, None, wide_mean, wide_invstd), wide_sums)

    ones = torch.ones(x.shape[1], dtype=torch.float64)
    scale = by_channel((ones if weight is None else wide_weight) * (ones if invstd is None else wide_invstd), x)
    xhat = wide_x if mean is None else (wide_x - by_channel(wide_mean, x)) * by_channel(wide_invstd, x)
    assert dx.dtype == dresidual.dtype == x.dtype
    assert_close(dx, true_dx, dx_bound(true_dx, g, xhat, scale, x.dtype, training), "dx")
    assert_close(dresidual, g, 0.0, "the residual's gradient, which is dy or 0")


def check_grad_input(target: Target, precision: Precision, case: Case, act: str | None, training: bool) -> None:
    p = case.problem(precision, target.device)
    residual = p.residual if act == "saved mask" else None
    _check_grad_input(target, p.dy, p.x, p.mean, p.invstd, p.weight, p.bias, residual, act and "relu", training)


def check_grad_input_without(target: Target, precision: Precision, case: Case, without: str, act: str | None) -> None:
    p = case.problem(precision, target.device)
    weight = None if without in ("weight", "affine", "identity") else p.weight
    bias = None if without in ("bias", "affine", "identity") else p.bias
    mean, invstd = (None, None) if without == "identity" else (p.mean, p.invstd)
    residual = p.residual if act == "saved mask" else None
    training = without != "identity"  # without normalisation there are no batch statistics to differentiate
    _check_grad_input(target, p.dy, p.x, mean, invstd, weight, bias, residual, act and "relu", training)
