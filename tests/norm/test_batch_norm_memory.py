"""Memory of ``batch_norm`` and ``add_act``: saved tensors, unchanged arguments, and fully written outputs."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import bnkern
from bnkern.backends.calls import BackwardCall, ForwardCall
from tests.support.cases import (
    BF16,
    CASE,
    EPS,
    FEW,
    FP16,
    FP32,
    FUSED,
    MODES,
    MOMENTUM,
    Case,
    Target,
    bits,
    leaf,
    running_of,
)


@FUSED
@MODES
@pytest.mark.parametrize("case", FEW, ids=str)
def test_saved_for_backward(target: Target, case: Case, mode: str, act: str | None, with_residual: bool) -> None:
    """Of the size of activations only the input is saved and, for a residual with ReLU, one bit per element."""
    p = case.problem(FP32, target.device)
    x, weight, bias, residual = (leaf(t) for t in (p.x, p.weight, p.bias, p.residual))
    running = (None, None) if mode == "untracked" else running_of(p)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        bnkern.batch_norm(
            x, *running, weight, bias, mode != "eval", residual=residual if with_residual else None, act=act
        )
    argument_addresses = {t.data_ptr() for t in (x, weight, bias)}
    extra = [t for t in saved if t.data_ptr() not in argument_addresses]
    vectors = [t for t in extra if t.dtype != torch.uint8]
    assert [tuple(t.shape) for t in vectors] == [(x.shape[1],)] * 2
    masks = [t for t in extra if t.dtype == torch.uint8]
    assert len(masks) == (act is not None and with_residual)
    planes = x.shape[0] * x.shape[1]
    assert all(t.numel() <= x.numel() / 8 + planes for t in masks)
    assert residual.data_ptr() not in {t.data_ptr() for t in saved}


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@FUSED
def test_nothing_is_saved_without_grad(target: Target, training: bool, act: str | None, with_residual: bool) -> None:
    p = CASE["nchw_tail"].problem(FP32, target.device)

    def pack(_: Tensor) -> None:
        raise AssertionError("a tensor was saved")

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        residual = p.residual if with_residual else None
        y = bnkern.batch_norm(p.x, *running_of(p), p.weight, p.bias, training, residual=residual, act=act)
        with torch.no_grad():
            bnkern.batch_norm(leaf(p.x), *running_of(p), p.weight, p.bias, training, residual=residual, act=act)
    assert not y.requires_grad


@FUSED
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("case", [*FEW, CASE["expanded_batch"], CASE["expanded_space"]], ids=str)
def test_arguments_are_only_read(target: Target, case: Case, training: bool, act: str | None, with_residual) -> None:
    p = case.problem(BF16, target.device)
    before = [bits(t) for t in p]
    x, weight, bias, residual = leaves = [leaf(t) for t in (p.x, p.weight, p.bias, p.residual)]
    y = bnkern.batch_norm(
        x, *running_of(p), weight, bias, training, residual=residual if with_residual else None, act=act
    )
    torch.autograd.grad(y, leaves, p.dy, allow_unused=True)
    assert all(torch.equal(old, bits(t)) for old, t in zip(before, p, strict=True))
    assert y.data_ptr() not in {t.data_ptr() for t in p}


@pytest.fixture
def poisoned() -> Callable[[bool], None]:
    """torch fills the results of torch.empty and similar functions with NaN, or with the largest integer."""
    before = torch.are_deterministic_algorithms_enabled()
    yield torch.use_deterministic_algorithms
    torch.use_deterministic_algorithms(before)


@FUSED
@MODES
@pytest.mark.parametrize("case", [*FEW, CASE["nhwc_c3"], CASE["nchw_s49"], CASE["expanded_batch"]], ids=str)
def test_outputs_are_fully_written(
    target: Target, case: Case, mode: str, act: str | None, with_residual: bool, poisoned: Callable[[bool], None]
) -> None:
    """Results and the padding of the mask have the same bits, whatever the memory held before."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    p, training = case.problem(FP16, target.device), mode != "eval"
    residual = p.residual if with_residual else None
    running = [(None, None) if mode == "untracked" else running_of(p) for _ in range(2)]
    results = []
    for fill, statistics in zip((False, True), running, strict=True):
        poisoned(fill)
        kernels = bnkern.backends.choose(target.backend, target.device, p.x.dtype)
        y, mean, invstd, mask = kernels.forward(
            ForwardCall(p.x, p.weight, p.bias, residual, *statistics, None, training, MOMENTUM, EPS, act, True)
        )
        needs = (True, True, True, with_residual)
        grads = kernels.backward(BackwardCall(p.dy, p.x, p.weight, p.bias, mean, invstd, mask, act, training, needs))
        results.append([y, mean, invstd, mask, *grads, *statistics])
    for clean, dirty in zip(*results, strict=True):
        assert (clean is None) == (dirty is None)
        assert clean is None or torch.equal(bits(clean), bits(dirty))
    assert results[0][0].isfinite().all()
