"""One forward and backward of a batch norm, and the errors of its results."""

import torch
from torch import Tensor, nn

from benchmarks.cases import peers
from benchmarks.cases.shapes import Inputs


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
