"""Checks of ``batch_norm`` and ``add_act``, for any backend."""

import torch
from torch import Tensor

import bnkern
from tests.support.cases import (
    CASE,
    EPS,
    FP32,
    MOMENTUM,
    Case,
    Precision,
    Target,
    assert_close,
    assert_mask_agrees,
    bits,
    by_channel,
    dx_bound,
    exact,
    leaf,
    mean_bound,
    passed,
    running_bound,
    running_of,
    shift_bound,
    stored,
    sums_bound,
    var_bound,
    y_bound,
)


def true_batch_norm(
    x: Tensor, mean: Tensor | None, var: Tensor | None, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes z, mean and variance in float64 by the formula, so that autograd can differentiate it.

    If mean is None, the statistics are the batch's.

    F.batch_norm in float64 is not accurate enough: its mean of a channel far from zero has an error of hundreds of
    ulps.
    """
    axes = [0, *range(2, x.dim())]
    if mean is None:
        rough = x.detach().mean(axes, keepdim=True)
        mean = (x - rough).mean(axes) + rough.flatten()
        var = (x - by_channel(mean, x)).square().mean(axes)
    z = (x - by_channel(mean, x)) * by_channel(torch.rsqrt(var + EPS), x)
    z = z if weight is None else z * by_channel(weight, x)
    return (z if bias is None else z + by_channel(bias, x)), mean.detach(), var.detach()


def check_batch_norm(
    target: Target,
    case: Case,
    precision: Precision,
    mode: str,
    act: str | None,
    with_residual: bool,
    affine: str = "wb",
) -> None:
    """Compares one call and its backward with the formula in float64 and its derivative by autograd."""
    p, training = case.problem(precision, target.device), mode != "eval"
    running = (None, None) if mode == "untracked" else running_of(p)
    before = exact(*running)
    weight = p.weight if "w" in affine else None
    bias = p.bias if "b" in affine else None
    ours = [leaf(t) for t in (p.x, weight, bias, p.residual if with_residual else None)]
    x, weight, bias, residual = ours
    y = bnkern.batch_norm(x, *running, weight, bias, training, MOMENTUM, EPS, residual=residual, act=act)
    grads = iter(torch.autograd.grad(y, [t for t in ours if t is not None], p.dy))
    dx, dweight, dbias, dresidual = (None if t is None else next(grads) for t in ours)

    # The truth uses the ReLU mask of our y. A later assertion checks this mask.
    wide = [leaf(t) for t in exact(*ours)]
    z, mean, var = true_batch_norm(wide[0], *((None, None) if training else before), *wide[1:3])
    z = z if residual is None else z + wide[3]
    g = exact(p.dy)[0].where(passed(y.cpu()), 0.0) if act else exact(p.dy)[0]
    true_grads = iter(torch.autograd.grad(z, [t for t in wide if t is not None], g))
    true_dx, true_dweight, true_dbias, true_dresidual = (None if t is None else next(true_grads) for t in wide)
    z = z.detach()

    invstd = torch.rsqrt(var + EPS)
    # Running statistics are exact inputs. Only the mean of the batch is rounded during the computation.
    shift = by_channel(shift_bound(mean, invstd, x.dtype), x) if training else 0.0
    xhat = (wide[0].detach() - by_channel(mean, x)) * by_channel(invstd, x)
    scale = torch.ones_like(mean) if weight is None else exact(weight)[0]

    bound = y_bound(z, x.dtype, by_channel(scale, x), shift)
    assert_close(y, z.relu() if act else z, bound, "y")
    if act:
        assert_mask_agrees(y, z, bound)
    scale = by_channel(scale * invstd, x)
    assert_close(dx, true_dx, dx_bound(true_dx, g, xhat, scale, x.dtype, training, shift), "dx")
    dbias_bound, dweight_bound = sums_bound(g, xhat, x.dtype, shift)
    if weight is not None:
        assert dweight.dtype == weight.dtype
        assert_close(dweight, true_dweight, stored(dweight_bound, true_dweight, weight.dtype), "dweight")
    if bias is not None:
        assert dbias.dtype == bias.dtype
        assert_close(dbias, true_dbias, stored(dbias_bound, true_dbias, bias.dtype), "dbias")
    if residual is not None:
        assert_close(dresidual, true_dresidual, 0.0, "the residual's gradient, which is dy or 0")

    if mode != "training":
        assert mode == "untracked" or all(map(torch.equal, exact(*running), before)), "eval changed the statistics"
        return
    unbiased = x.numel() / x.shape[1] / (x.numel() / x.shape[1] - 1)
    for old, new, batch, bound, name in (
        (before[0], running[0], mean, mean_bound(mean, var, x.dtype), "running_mean"),
        (before[1], running[1], var * unbiased, var_bound(mean, var, x.dtype) * unbiased, "running_var"),
    ):
        truth = (1 - MOMENTUM) * old + MOMENTUM * batch
        bound = running_bound(bound, old, batch, MOMENTUM, new.dtype)
        healthy = truth.isfinite()  # the running statistics of a channel with Inf or NaN are not specified
        assert_close(new.cpu()[healthy], truth[healthy], bound[healthy], name)
        assert not new.cpu()[~healthy].isfinite().any()


def check_add_act(target: Target, precision: Precision, case: Case, act: str | None, with_residual: bool) -> None:
    """The results and gradients have the bits of torch's addition and ReLU."""
    p = case.problem(precision, target.device)
    leaves = [leaf(p.x), *([leaf(p.residual)] if with_residual else [])]
    y = bnkern.add_act(*leaves, act=act)
    expected = sum(leaves[1:], leaves[0])
    expected = expected.relu() if act else expected * 1
    assert torch.equal(bits(y), bits(expected))
    for ours, theirs in zip(*(torch.autograd.grad(t, leaves, p.dy) for t in (y, expected)), strict=True):
        assert torch.equal(bits(ours), bits(theirs))


def check_running_statistics(target: Target, precision: Precision, momentum: float | None) -> None:
    """Compares three batches with torch's module in float64.

    With ``momentum`` None the statistics are cumulative means.
    """
    truth = torch.nn.BatchNorm1d(17, momentum=momentum, dtype=torch.float64)
    mean = torch.zeros(17, dtype=precision.params, device=target.device)
    var, counter = torch.ones_like(mean), torch.tensor(0, device=target.device)
    for name in ("nc", "sliced_columns", "ratio_100"):
        case = CASE[name]
        x = Case(name, (case.shape[0], 17), "", case.layout, case.ratio).problem(precision, target.device).x
        # Each step starts from the stored statistics, so that earlier roundings do not count as errors.
        old, before = exact(mean, var), (bits(mean), bits(var))
        truth.running_mean.copy_(old[0])
        truth.running_var.copy_(old[1])
        bnkern.batch_norm(x, mean, var, training=True, momentum=momentum, num_batches_tracked=counter)
        truth(*exact(x))
        batch_var, batch_mean = torch.var_mean(*exact(x), dim=0)
        share = momentum if momentum is not None else 1 / truth.num_batches_tracked.item()
        bounds = mean_bound(batch_mean, batch_var, x.dtype), 1.1 * var_bound(batch_mean, batch_var, x.dtype)
        for ours, true, bound, old_value, batch, name in zip(
            (mean, var),
            (truth.running_mean, truth.running_var),
            bounds,
            old,
            (batch_mean, batch_var),
            ("running_mean", "running_var"),
            strict=True,
        ):
            assert_close(ours, true, running_bound(bound, old_value, batch, share, ours.dtype), name)
        if momentum == 0.0:
            assert all(map(torch.equal, before, (bits(mean), bits(var))))
    assert counter.item() == truth.num_batches_tracked.item() == 3


def check_counter(target: Target) -> None:
    """The counter is incremented in training, with or without running statistics. In eval mode nothing is written."""
    p = CASE["nc"].problem(FP32, target.device)
    counter, running = torch.tensor(7, device=target.device), running_of(p)
    bnkern.batch_norm(p.x, None, None, training=True, num_batches_tracked=counter)
    assert counter.item() == 8
    before = [bits(t) for t in running]
    bnkern.batch_norm(p.x, *running, training=False, num_batches_tracked=counter)
    assert counter.item() == 8
    assert all(map(torch.equal, before, map(bits, running)))
