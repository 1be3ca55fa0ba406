"""One forward and backward of a batch norm, and the errors of its results."""

import torch
from torch import Tensor, nn

from benchmarks.cases import peers
from benchmarks.cases.shapes import Inputs


def differentiate(module: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    """y and the gradients of one forward and backward."""
    x, residual, dy = inputs
    y = module(x) if residual is None else module(x, residual)
    leaves = {"dx": x, "dresidual": residual, "dweight": module.weight, "dbias": module.bias}
    leaves = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    return {"y": y, **dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy), strict=True))}


def relative_errors(results: dict[str, Tensor], module: nn.Module, inputs: Inputs) -> dict[str, float]:
    """The relative error of each result: RMS of the error over RMS of the exact values, torch's in float64.

    The channels of batch norm are independent, so about 8 of them, evenly spread, are compared.
    """
    chosen = slice(None, None, max(len(module.weight) // 8, 1))
    x, residual, dy = (t if t is None else t.detach()[:, chosen].double() for t in inputs)
    truth = peers.Eager(x.shape[1], module.act).to(x)
    truth.weight.data.copy_(module.weight[chosen])
    truth.bias.data.copy_(module.bias[chosen])
    errors = {}
    for name, exact in differentiate(truth, Inputs(x, residual, dy).requiring_grad()).items():
        result = results[name].detach()
        result = result[chosen] if result.dim() == 1 else result[:, chosen]
        errors[name] = float((result - exact.detach()).norm() / exact.detach().norm())
    return errors
