"""``batch_norm`` and ``add_act``: values, gradients and statistics, compared with torch in float64."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import bnkern
from tests.support.batch_norm import check_add_act, check_batch_norm, check_counter, check_running_statistics
from tests.support.cases import (
    CASE,
    FEW,
    FP32,
    FP64,
    FUSED,
    LAYOUTS,
    MIXED,
    MODES,
    PRECISIONS,
    SWEEP,
    Case,
    Precision,
    Target,
    bits,
    leaf,
    running_of,
)

# --------------------------------------------------------------------------------- values, gradients, statistics


@FUSED
@SWEEP
def test_training(target: Target, precision: Precision, case: Case, act: str | None, with_residual: bool) -> None:
    check_batch_norm(target, case, precision, "training", act, with_residual)


@FUSED
@MODES
@pytest.mark.parametrize("affine", ["wb", "w", "b", "-"])
@pytest.mark.parametrize("case", FEW, ids=str)
def test_every_mode(
    target: Target, precision: Precision, case: Case, affine: str, mode: str, act: str | None, with_residual: bool
) -> None:
    check_batch_norm(target, case, precision, mode, act, with_residual, affine)


def test_mean_of_1e4_sigma_in_channels_last(target: Target) -> None:
    """Here the variance of torch 2.13's channels_last CPU kernel is several times too large."""
    case = Case("torch_is_wrong", (128, 4, 32, 32), "", "channels_last", ratio=1e4)
    for act in (None, "relu"):
        check_batch_norm(target, case, FP32, "training", act, False)


@pytest.mark.parametrize("odd", ["inf", "nan"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_inf_or_nan_stays_in_its_channel(target: Target, layout: str, odd: str) -> None:
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
    check_add_act(target, precision, case, act, with_residual)


# ---------------------------------------------------------------------------------------------- running statistics


@pytest.mark.parametrize("momentum", [0.1, None, 0.0, 1.0, 1])
@pytest.mark.parametrize("precision", PRECISIONS, ids=lambda p: p.name)
def test_running_statistics_over_batches(target: Target, precision: Precision, momentum: float | None) -> None:
    check_running_statistics(target, precision, momentum)


def test_counter_alone(target: Target) -> None:
    check_counter(target)


def test_statistics_are_tracked_by_autograd(target: Target) -> None:
    """The update increments the statistics' version counters, so that a graph that saved them raises an error."""
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
    """Any subset of input, weight, bias and residual may require grad. Each gradient is independent of the subset."""
    p = case.problem(FP32, target.device)
    tensors = [p.x, p.weight, p.bias, *([p.residual] if with_residual else [])]

    def gradients(requirements: tuple[bool, ...]) -> list[Tensor | None]:
        x, weight, bias, *residual = leaves = [
            t.detach().requires_grad_(required) for t, required in zip(tensors, requirements, strict=True)
        ]
        y = bnkern.batch_norm(
            x, *running_of(p), weight, bias, training, residual=residual[0] if residual else None, act=act
        )
        assert y.requires_grad == any(requirements)
        if y.requires_grad:
            y.backward(p.dy)
        return [t.grad for t in leaves]

    all_gradients = gradients((True,) * len(tensors))
    for requirements in itertools.product([False, True], repeat=len(tensors)):
        for is_required, gradient, expected in zip(requirements, gradients(requirements), all_gradients, strict=True):
            assert torch.equal(bits(gradient), bits(expected)) if is_required else gradient is None


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", [CASE["nchw_tail"], CASE["nhwc"]], ids=str)
def test_gradient_arrives_in_any_layout(target: Target, case: Case, layout: str) -> None:
    """dy has any layout that autograd may produce: expanded, sliced, or the other memory format.

    The order of sums may differ.
    """
    p = case.problem(FP32, target.device)
    x, weight, bias = leaves = [leaf(t) for t in (p.x, p.weight, p.bias)]
    dy = LAYOUTS[layout](p.dy.contiguous())
    y = bnkern.batch_norm(x, None, None, weight, bias, True, act="relu")
    ours = torch.autograd.grad(y, leaves, dy, retain_graph=True)
    plain = torch.autograd.grad(y, leaves, LAYOUTS[case.layout](dy.contiguous()))
    for actual, expected in zip(ours, plain, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=2e-6 * p.dy[:, 0].numel() ** 0.5)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("affine", ["wb", "w", "b", "-"])
@FUSED
def test_gradcheck(target: Target, training: bool, affine: str, act: str | None, with_residual: bool) -> None:
    """First and second derivatives in float64 against finite differences."""
    p = Case("gradcheck", (3, 2, 2, 2), "").problem(FP64, target.device)
    leaves = [leaf(t) for t in (p.x, p.weight, p.bias, p.residual)]
    is_given = [True, "w" in affine, "b" in affine, with_residual]
    running = running_of(p)

    def call(*tensors: Tensor) -> Tensor:
        tensors = iter(tensors)
        x, weight, bias, residual = (next(tensors) if present else None for present in is_given)
        statistics = [t.clone() for t in running]
        return bnkern.batch_norm(x, *statistics, weight, bias, training, residual=residual, act=act)

    inputs = [t for t, present in zip(leaves, is_given, strict=True) if present]
    z = call(*inputs) if act is None else None
    assert z is None or z.requires_grad
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("case", [CASE["nchw_tail"], CASE["nhwc_c5_s49"]], ids=str)
def test_double_backward_equals_torch(target: Target, case: Case, training: bool) -> None:
    """The gradient of the gradient's norm, as in a gradient penalty."""
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
    """The saved tensors remain after a backward with retain_graph, and only then."""
    p = CASE["nchw_tail"].problem(FP32, target.device)
    x = leaf(p.x)
    y = bnkern.batch_norm(x, None, None, training=True, residual=p.residual, act="relu")
    (first,) = torch.autograd.grad(y, x, p.dy, retain_graph=True)
    (second,) = torch.autograd.grad(y, x, p.dy)
    assert torch.equal(bits(first), bits(second))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y, x, p.dy)


@pytest.mark.parametrize("changed", ["x", "weight"])
def test_inplace_change_before_backward_is_detected(target: Target, changed: str) -> None:
    p = CASE["nchw_tail"].problem(FP32, target.device)
    x, weight = leaves = leaf(p.x).clone(), leaf(p.weight).clone()
    y = bnkern.batch_norm(x, None, None, weight, None, training=True, act="relu")
    with torch.no_grad():
        leaves[changed == "weight"].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(p.dy)


def test_eval_backward_after_the_statistics_changed(target: Target) -> None:
    """The gradient uses the statistics of the forward."""
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
    """In training it raises the error of torch, with the same message. In eval mode it is allowed."""
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
    """y is empty, the gradients of parameters are zero, the statistics are unchanged, and the batch is counted."""
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
    for actual, expected in zip(*results, strict=True):
        assert (actual is None) == (expected is None)
        if actual is not None:
            assert actual.shape == expected.shape and actual.dtype == expected.dtype and torch.equal(actual, expected)


def test_empty_batches_keep_later_statistics_finite(target: Target) -> None:
    bn = bnkern.nn.BatchNorm1d(3, momentum=None, device=target.device)
    bn(torch.ones(0, 3, device=target.device))
    bn(torch.randn(8, 3, generator=torch.Generator().manual_seed(0)).to(target.device))
    assert all(t.isfinite().all() for t in bn.state_dict().values())
    assert bn.num_batches_tracked.item() == 2
