"""Whole batch norms: forward and backward through autograd, with fresh outputs and gradients in each call.

Gradients come from torch.autograd.grad, as in a network, where the previous layer receives them. With y.backward() into
leaf tensors eager would copy the gradient that residual and batch norm share. No network does that.
"""

from collections.abc import Callable

import pytest
import torch

from benchmarks.cases import peers, shapes, traffic
from benchmarks.cases.norms import differentiate, relative_errors
from benchmarks.cases.shapes import Case, Inputs

ANY_SHAPE = True


def cases(device: torch.device) -> list[Case]:
    names = {"cpu": ("cifar", "beyond", "narrow"), "cuda": ("cifar", "resnet50-64", "small", "odd", "large64")}
    return shapes.cases(names[device.type], device)


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
