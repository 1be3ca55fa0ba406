"""``batch_norm`` and ``add_act`` from end to end: values, gradients and statistics against torch in float64."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import bnkern
from tests.support.cases import (
    CASE,
    EPS,
    FEW,
    FP32,
    FP64,
    FUSED,
    LAYOUTS,
    MIXED,
    MODES,
    MOMENTUM,
    PRECISIONS,
    SWEEP,
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
    """z, mean and variance in float64 by the formula, for autograd to differentiate; the batch's own where None.

    F.batch_norm in float64 would not do: its mean of a channel far from zero is hundreds of ulps off.
    """
    axes = [0, *range(2, x.dim())]
    if mean is None:
        rough = x.detach().mean(axes, keepdim=True)
        mean = (x - rough).mean(axes) + rough.flatten()
        var = (x - by_channel(mean, x)).square().mean(axes)
    z = (x - by_channel(mean, x)) * by_channel(torch.rsqrt(var + EPS), x)
    z = z if weight is None else z * by_channel(weight, x)
    return (z if bias is None else z + by_channel(bias, x)), mean.detach(), var.detach()


# --------------------------------------------------------------------------------- values, gradients, statistics


def check(
    target: Target,
    case: Case,
    precision: Precision,
    mode: str,
    act: str | None,
    with_residual: bool,
    affine: str = "wb",
) -> None:
    """One call and its backward against the formula in float64 and its derivative by autograd."""
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

    # The ReLU of the truth is the one that our y shows; whether that is right is asserted below.
    wide = [leaf(t) for t in exact(*ours)]
    z, mean, var = true_batch_norm(wide[0], *((None, None) if training else before), *wide[1:3])
    z = z if residual is None else z + wide[3]
    g = exact(p.dy)[0].where(passed(y.cpu()), 0.0) if act else exact(p.dy)[0]
    true_grads = iter(torch.autograd.grad(z, [t for t in wide if t is not None], g))
    true_dx, true_dweight, true_dbias, true_dresidual = (None if t is None else next(true_grads) for t in wide)
    z = z.detach()

    invstd = torch.rsqrt(var + EPS)
    # Running statistics are given; only the batch's own mean is rounded on the way.
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
        healthy = truth.isfinite()  # what becomes of a lost channel's mean, Inf or NaN, is not specified
        assert_close(new.cpu()[healthy], truth[healthy], bound[healthy], name)
        assert not new.cpu()[~healthy].isfinite().any()


@FUSED
@SWEEP
def test_training(target: Target, precision: Precision, case: Case, act: str | None, with_residual: bool) -> None:
    check(target, case, precision, "training", act, with_residual)


@FUSED
@MODES
@pytest.mark.parametrize("affine", ["wb", "w", "b", "-"])
@pytest.mark.parametrize("case", FEW, ids=str)
def test_every_mode(
    target: Target, precision: Precision, case: Case, affine: str, mode: str, act: str | None, with_residual: bool
) -> None:
    check(target, case, precision, mode, act, with_residual, affine)


def test_mean_of_1e4_sigma_in_channels_last(target: Target) -> None:
    """Where torch 2.13's own channels_last CPU kernel returns a variance several times too large."""
    case = Case("torch_is_wrong", (128, 4, 32, 32), "", "channels_last", ratio=1e4)
    for act in (None, "relu"):
        check(target, case, FP32, "training", act, False)


@pytest.mark.parametrize("odd", ["inf", "nan"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_bad_channel_stays_alone(target: Target, layout: str, odd: str) -> None:
    """Inf or NaN in one channel changes no bit of another."""
    results = []
    for kind in (odd, ""):
        p = Case("alone", (6, 19, 5, 7), "", layout, odd=kind).problem(FP32, target.device)
        running, leaves = running_of(p), [leaf(t) for t in (p.x, p.weight, p.bias, p.residual)]
        running = tuple(torch.ones_like(t) for t in running)
        y = bnkern.batch_norm(leaves[0], *running, *leaves[1:3], True, residual=leaves[3], act="relu")
        grads = torch.autograd.grad(y, leaves, p.dy)
        results.append([t[:, 1:] if t.dim() > 1 else t[1:] for t in (y, *grads, *running)])
        assert y[:, 0].isfinite().all() == (kind == "")
    for bad, good in zip(*results, strict=True):
        assert torch.equal(bits(bad), bits(good))


@pytest.mark.parametrize("case", FEW, ids=str)
@pytest.mark.parametrize("precision", MIXED, ids=lambda p: p.name)
@pytest.mark.parametrize("act", [None, "relu"])
@pytest.mark.parametrize("with_residual", [False, True], ids=["", "residual"])
def test_add_act(target: Target, precision: Precision, case: Case, act: str | None, with_residual: bool) -> None:
    """Bit for bit torch's addition and ReLU, also backward."""
    p = case.problem(precision, target.device)
    leaves = [leaf(p.x), *([leaf(p.residual)] if with_residual else [])]
    y = bnkern.add_act(*leaves, act=act)
    expected = sum(leaves[1:], leaves[0])
    expected = expected.relu() if act else expected * 1
    assert torch.equal(bits(y), bits(expected))
    for ours, theirs in zip(*(torch.autograd.grad(t, leaves, p.dy) for t in (y, expected)), strict=True):
        assert torch.equal(bits(ours), bits(theirs))


# ---------------------------------------------------------------------------------------------- running statistics


@pytest.mark.parametrize("momentum", [0.1, None, 0.0, 1.0, 1])
@pytest.mark.parametrize("precision", PRECISIONS, ids=lambda p: p.name)
def test_running_statistics_over_batches(target: Target, precision: Precision, momentum: float | None) -> None:
    """Three batches, as torch's module in float64 keeps them; ``momentum`` None is the cumulative mean."""
    truth = torch.nn.BatchNorm1d(17, momentum=momentum, dtype=torch.float64)
    mean = torch.zeros(17, dtype=precision.params, device=target.device)
    var, counter = torch.ones_like(mean), torch.tensor(0, device=target.device)
    for name in ("nc", "sliced_columns", "ratio_100"):
        case = CASE[name]
        x = Case(name, (case.shape[0], 17), "", case.layout, case.ratio).problem(precision, target.device).x
        # Each step starts from what was stored, so that the roundings of earlier ones are no error.
        old, before = exact(mean, var), (bits(mean), bits(var))
        truth.running_mean.copy_(old[0])
        truth.running_var.copy_(old[1])
        bnkern.batch_norm(x, mean, var, training=True, momentum=momentum, num_batches_tracked=counter)
        truth(*exact(x))
        batch_var, batch_mean = torch.var_mean(*exact(x), dim=0)
        share = momentum if momentum is not None else 1 / truth.num_batches_tracked.item()
        bounds = mean_bound(batch_mean, batch_var, x.dtype), 1.1 * var_bound(batch_mean, batch_var, x.dtype)
        for ours, true, bound, was, batch, name in zip(
            (mean, var),
            (truth.running_mean, truth.running_var),
            bounds,
            old,
            (batch_mean, batch_var),
            ("running_mean", "running_var"),
            strict=True,
        ):
            assert_close(ours, true, running_bound(bound, was, batch, share, ours.dtype), name)
        if momentum == 0.0:
            assert all(map(torch.equal, before, (bits(mean), bits(var))))
    assert counter.item() == truth.num_batches_tracked.item() == 3


def test_counter_alone(target: Target) -> None:
    """A counter counts in training, with or without running statistics; in eval nothing is written."""
    p = CASE["nc"].problem(FP32, target.device)
    counter, running = torch.tensor(7, device=target.device), running_of(p)
    bnkern.batch_norm(p.x, None, None, training=True, num_batches_tracked=counter)
    assert counter.item() == 8
    before = [bits(t) for t in running]
    bnkern.batch_norm(p.x, *running, training=False, num_batches_tracked=counter)
    assert counter.item() == 8
    assert all(map(torch.equal, before, map(bits, running)))


def test_statistics_are_tracked_by_autograd(target: Target) -> None:
    """The running statistics' version counters move, so that a graph that saved them notices the update."""
    p = CASE["nc"].problem(FP32, target.device)
    running, counter = running_of(p), torch.tensor(0, device=target.device)
    saved = leaf(p.weight) * running[0]
    bnkern.batch_norm(p.x, *running, training=True, num_batches_tracked=counter)
    assert all(t._version > 0 for t in (*running, counter))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.sum().backward()


# ------------------------------------------------------------------------------------------------------- gradients


@FUSED
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("case", [CASE["nchw_tail"], CASE["nhwc_c5_s49"]], ids=str)
def test_partial_gradients(target: Target, case: Case, training: bool, act: str | None, with_residual: bool) -> None:
    """Any subset of input, weight, bias and residual may require grad; each gradient is what it is with all."""
    p = case.problem(FP32, target.device)
    tensors = [p.x, p.weight, p.bias, *([p.residual] if with_residual else [])]

    def gradients(wanted: tuple[bool, ...]) -> list[Tensor | None]:
        x, weight, bias, *residual = leaves = [
            t.detach().requires_grad_(w) for t, w in zip(tensors, wanted, strict=True)
        ]
        y = bnkern.batch_norm(
            x, *running_of(p), weight, bias, training, residual=residual[0] if residual else None, act=act
        )
        assert y.requires_grad == any(wanted)
        if y.requires_grad:
            y.backward(p.dy)
        return [t.grad for t in leaves]

    everything = gradients((True,) * len(tensors))
    for wanted in itertools.product([False, True], repeat=len(tensors)):
        for want, one, all_of_them in zip(wanted, gradients(wanted), everything, strict=True):
            assert torch.equal(bits(one), bits(all_of_them)) if want else one is None


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", [CASE["nchw_tail"], CASE["nhwc"]], ids=str)
def test_gradient_arrives_in_any_layout(target: Target, case: Case, layout: str) -> None:
    """dy comes as autograd made it: expanded, sliced, of the other memory format. The sums' order may differ then."""
    p = case.problem(FP32, target.device)
    x, weight, bias = leaves = [leaf(t) for t in (p.x, p.weight, p.bias)]
    dy = LAYOUTS[layout](p.dy.contiguous())
    y = bnkern.batch_norm(x, None, None, weight, bias, True, act="relu")
    ours = torch.autograd.grad(y, leaves, dy, retain_graph=True)
    plain = torch.autograd.grad(y, leaves, LAYOUTS[case.layout](dy.contiguous()))
    for one, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=2e-6 * p.dy[:, 0].numel() ** 0.5)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("affine", ["wb", "w", "b", "-"])
@FUSED
def test_gradcheck(target: Target, training: bool, affine: str, act: str | None, with_residual: bool) -> None:
    """First and second derivatives in float64 against finite differences."""
    p = Case("gradcheck", (3, 2, 2, 2), "").problem(FP64, target.device)
    leaves = [leaf(t) for t in (p.x, p.weight, p.bias, p.residual)]
    given = [True, "w" in affine, "b" in affine, with_residual]
    running = running_of(p)

    def call(*tensors: Tensor) -> Tensor:
        tensors = iter(tensors)
        x, weight, bias, residual = (next(tensors) if g else None for g in given)
        statistics = [t.clone() for t in running]
        return bnkern.batch_norm(x, *statistics, weight, bias, training, residual=residual, act=act)

    inputs = [t for t, g in zip(leaves, given, strict=True) if g]
    z = call(*inputs) if act is None else None
    assert z is None or z.requires_grad
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("case", [CASE["nchw_tail"], CASE["nhwc_c5_s49"]], ids=str)
def test_double_backward_equals_torch(target: Target, case: Case, training: bool) -> None:
    """The gradient of the gradient's norm, as a gradient penalty needs it."""
    p = case.problem(FP64, target.device)
    results = []
    for fused in (True, False):
        x, weight, bias, residual = leaves = [leaf(t) for t in (p.x, p.weight, p.bias, p.residual)]
        if fused:
            y = bnkern.batch_norm(x, *running_of(p), weight, bias, training, residual=residual, act="relu")
        else:
            y = (F.batch_norm(x, *running_of(p), weight, bias, training) + residual).relu()
        first = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        penalty = sum(t.square().sum() for t in first)
        results.append((penalty.detach(), *torch.autograd.grad(penalty, leaves)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_backward_twice(target: Target) -> None:
    """The saved tensors survive a backward that retains them, and no other."""
    p = CASE["nchw_tail"].problem(FP32, target.device)
    x = leaf(p.x)
    y = bnkern.batch_norm(x, None, None, training=True, residual=p.residual, act="relu")
    (first,) = torch.autograd.grad(y, x, p.dy, retain_graph=True)
    (second,) = torch.autograd.grad(y, x, p.dy)
    assert torch.equal(bits(first), bits(second))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y, x, p.dy)


@pytest.mark.parametrize("changed", ["x", "weight"])
def test_inplace_change_before_backward_is_noticed(target: Target, changed: str) -> None:
    p = CASE["nchw_tail"].problem(FP32, target.device)
    x, weight = leaves = leaf(p.x).clone(), leaf(p.weight).clone()
    y = bnkern.batch_norm(x, None, None, weight, None, training=True, act="relu")
    with torch.no_grad():
        leaves[changed == "weight"].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(p.dy)


def test_eval_backward_after_the_statistics_moved(target: Target) -> None:
    """The gradient belongs to the statistics that the forward used."""
    p = CASE["nchw_tail"].problem(FP32, target.device)
    x, running = leaf(p.x), running_of(p)
    y = bnkern.batch_norm(x, *running, p.weight, p.bias, act="relu")
    (before,) = torch.autograd.grad(y, x, p.dy, retain_graph=True)
    bnkern.batch_norm(p.x + 3, *running, training=True)
    (after,) = torch.autograd.grad(y, x, p.dy)
    assert torch.equal(bits(before), bits(after))


# ------------------------------------------------------------------------------------------------------ few values


@pytest.mark.parametrize("shape", [(1, 3), (1, 3, 1), (1, 3, 1, 1), (1, 3, 1, 1, 1)])
def test_one_value_per_channel(target: Target, shape: tuple[int, ...]) -> None:
    """Refused in training with torch's own words; served in eval."""
    x, mean, var = torch.ones(shape, device=target.device), *torch.ones(2, 3, device=target.device)
    messages = []
    for function in (bnkern.batch_norm, F.batch_norm):
        with pytest.raises(ValueError, match="more than 1 value per channel") as caught:
            function(x, mean, var, training=True)
        messages.append(str(caught.value).replace("torch.Size(", "").rstrip(")"))
    assert messages[0] == messages[1]
    assert mean.tolist() == var.tolist() == [1.0] * 3
    torch.testing.assert_close(bnkern.batch_norm(x, mean, var), F.batch_norm(x, mean, var))


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4), (0, 3, 4, 4), (2, 3, 0, 4), (0, 3, 2, 2, 2)])
@FUSED
def test_empty_batch_equals_torch(
    target: Target, shape: tuple[int, ...], training: bool, act: str | None, with_residual: bool
) -> None:
    """An empty y, zeros for the parameters' gradients, untouched statistics, and still one batch counted."""
    module = {2: torch.nn.BatchNorm1d, 3: torch.nn.BatchNorm1d, 4: torch.nn.BatchNorm2d, 5: torch.nn.BatchNorm3d}
    theirs = module[len(shape)](3, device=target.device).train(training)
    ours = getattr(bnkern.nn, type(theirs).__name__)(3, device=target.device, act=act).train(training)
    results = []
    for bn in (ours, theirs):
        x, residual = (torch.ones(shape, device=target.device, requires_grad=True) for _ in range(2))
        if bn is ours:
            y = bn(x, residual if with_residual else None)
        else:
            y = bn(x) + (residual if with_residual else 0)
            y = y.relu() if act else y
        y.sum().backward()
        results.append([y, x.grad, residual.grad, bn.weight.grad, bn.bias.grad, *bn.state_dict().values()])
    for one, other in zip(*results, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)


def test_empty_moments_do_not_poison_later_batches(target: Target) -> None:
    bn = bnkern.nn.BatchNorm1d(3, momentum=None, device=target.device)
    bn(torch.ones(0, 3, device=target.device))
    bn(torch.randn(8, 3, generator=torch.Generator().manual_seed(0)).to(target.device))
    assert all(t.isfinite().all() for t in bn.state_dict().values())
    assert bn.num_batches_tracked.item() == 2
