"""Batch norm from end to end: forward and backward through autograd, outputs and gradients fresh each time.

Gradients are asked for by torch.autograd.grad, as the layer before would receive them. y.backward() into leaf tensors
would make eager copy the gradient that residual and batch norm share, which happens in no network.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from benchmarks import peers, shapes, traffic
from benchmarks.shapes import Case, Inputs

ANY_SHAPE = True


def cases(device: torch.device) -> list[Case]:
    on = {"cpu": ("cifar", "beyond", "narrow"), "cuda": ("cifar", "resnet50-64", "small", "odd", "large64")}
    return shapes.cases(on[device.type], device)


def differentiate(module: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    """One forward and backward: y and the gradients."""
    x, residual, dy = inputs
    y = module(x) if residual is None else module(x, residual)
    leaves = {"dx": x, "dresidual": residual, "dweight": module.weight, "dbias": module.bias}
    leaves = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    return {"y": y, **dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy), strict=True))}


def relative_errors(results: dict[str, Tensor], module: nn.Module, inputs: Inputs) -> dict[str, float]:
    """Root mean square of each result's error over that of the truth, which is torch's in float64.

    Channels do not meet in batch norm, so some 8 of them, evenly spread, stand for all.
    """
    every = slice(None, None, max(len(module.weight) // 8, 1))
    x, residual, dy = (t if t is None else t.detach()[:, every].double() for t in inputs)
    truth = peers.Eager(x.shape[1], module.act).to(x)
    truth.weight.data.copy_(module.weight[every])
    truth.bias.data.copy_(module.bias[every])
    errors = {}
    for name, exact in differentiate(truth, Inputs(x, residual, dy).requiring_grad()).items():
        result = results[name].detach()
        result = result[every] if result.dim() == 1 else result[:, every]
        errors[name] = float((result - exact.detach()).norm() / exact.detach().norm())
    return errors


@pytest.mark.parametrize("op", traffic.OPS)
def test_batch_norm(
    op: str,
    case: Case,
    mode: str,
    inputs: Inputs,
    device: torch.device,
    without_compile: str | None,
    compare: Callable,
) -> None:
    if op == "bn":
        inputs = inputs._replace(residual=None)
    modules = peers.batch_norms(case.size[1], "relu" if op == "bn_add_relu" else None, device)
    more, missing = peers.others(modules["bnkern"], device, without_compile)
    modules |= more
    if without_compile:
        del modules["compile"]
        missing["compile"] = f"left out by {without_compile}"
    moved = traffic.moved(("forward", "backward"), op, case.elements, case.itemsize)
    compare(
        op,
        case,
        {name: lambda data, m=m: differentiate(m, data) for name, m in modules.items()},
        make_data=lambda: inputs.clone().requiring_grad(),
        mode=mode,
        missing=missing,
        moved=lambda name: moved,
        check=lambda results: {"error": relative_errors(results, modules["bnkern"], inputs)},
    )
