"""bnkern.convert on random networks never fails where torch works, and gives an equal network."""

import copy
import warnings
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

import bnkern
from tests.convert.converting import ADD, RELU
from tests.convert.drawn_forwards import SHAPE, Forward, forwards

# Roundings of about twenty float64 operations, each of which amplifies by at most 1 / sqrt(eps) = 3, are far smaller.
TOLERANCE = 1e-10


def inputs() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(SHAPE, generator=generator, dtype=torch.float64) for _ in range(2)]


def results(model: nn.Module) -> dict[str, Tensor]:
    """Outputs, inputs afterwards and state, in eval mode and in training, and gradients if autograd has them.

    The state after a forward that raised is not compared: which batch norms ran before depends on the order of
    independent operations, and a fusion may change this order.
    """
    result: dict[str, Any] = {}
    for training in (False, True):
        model.train(training)
        xs = inputs()
        with torch.no_grad():
            outputs = tree_leaves(model(*xs))
        result |= {f"{training}: {k} without gradients": t.clone() for k, t in model.state_dict().items()}
        model.zero_grad()
        leaves = [x.requires_grad_() for x in inputs()]
        finished = False
        try:
            differentiable = [y for y in tree_leaves(model(*[x * 1 for x in leaves])) if y.requires_grad]
            finished = True
            if differentiable:
                sum((y * torch.linspace(-1, 2, y.numel()).view(y.shape)).sum() for y in differentiable).backward()
        except RuntimeError as error:  # a value that the backward needs was changed in place
            result[f"{training}: no gradients"] = str(error)
        else:
            parameters = {**dict(model.named_parameters()), **dict(zip("xz", leaves, strict=True))}
            result |= {f"{training}: grad {k}": p.grad.clone() for k, p in parameters.items() if p.grad is not None}
        result |= {f"{training}: {k}": y for k, y in enumerate([*outputs, *xs])}
        if finished:
            result |= {f"{training}: {k}": t.clone() for k, t in model.state_dict().items()}
    return result


def assert_same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    failed = [name for name in theirs if name.endswith("no gradients")]
    modes = [name.split(":")[0] for name in failed]  # if torch has no gradients, ours may exist
    for name, expected in theirs.items():
        if name in failed:
            continue
        assert name in ours, f"{name} is missing; {[v for k, v in ours.items() if k.endswith('no gradients')]}"
        assert ours[name].shape == expected.shape and ours[name].dtype == expected.dtype, name
        if expected.is_floating_point():
            error = (ours[name] - expected).abs().max().item()
            assert error <= TOLERANCE * expected.abs().max().clamp(min=1).item(), f"{name}: {error}"
        else:
            assert torch.equal(ours[name], expected), name
    extra = [k for k in ours.keys() - theirs.keys() if k.split(":")[0] not in modes]
    assert not extra, extra


def check(forward: Forward, seen: Counter[str]) -> None:
    before = forward.build()
    after = copy.deepcopy(before)
    try:
        theirs = results(before)
    except RuntimeError:
        assume(False)  # torch itself cannot run this network
    assert bnkern.convert(after) is after
    assert list(after.state_dict()) == list(before.state_dict())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "bnkern.convert")
        ours = results(after)
    assert_same(ours, theirs)
    summary = bnkern.convert.summary(after)
    assert all(layer.outcome in (RELU, ADD) or (layer.why and "could not be" not in layer.why) for layer in summary)
    seen.update(layer.outcome for layer in summary)
    seen.update(["networks"])
    seen.update(["with gradients"] * (not any("no gradients" in name for name in theirs)))


@pytest.mark.parametrize("examples", [120, pytest.param(3000, marks=pytest.mark.slow)])
def test_any_forward(examples: int) -> None:
    """The outputs, changes of inputs, gradients, statistics and state_dict keys are the same."""
    recorded: Counter[str] = Counter()

    @settings(max_examples=examples)
    @given(forward=forwards())
    def any_forward(forward: Forward) -> None:
        check(forward, recorded)

    any_forward()
    print(recorded)
    assert recorded[RELU] + recorded[ADD] > 0.3 * recorded["networks"]
    assert recorded[ADD] > 0.1 * recorded["networks"]
    assert recorded["with gradients"] > 0.3 * recorded["networks"]


@pytest.mark.parametrize("examples", [20, pytest.param(1000, marks=pytest.mark.slow)])
def test_any_forward_under_symbolic_trace(examples: int) -> None:
    """If torch.fx traces a network correctly, it also traces the converted network correctly."""
    traced_networks = 0

    @settings(max_examples=examples)
    @given(forward=forwards())
    def any_forward(forward: Forward) -> None:
        nonlocal traced_networks
        before = forward.build()
        after = bnkern.convert(copy.deepcopy(before))
        try:
            theirs = results(copy.deepcopy(before))
            assert_same(results(fx.symbolic_trace(copy.deepcopy(before))), theirs)
        except (RuntimeError, TypeError, fx.proxy.TraceError, AssertionError):
            assume(False)  # for example, torch.fx records x += y as x = x + y
        assert_same(results(fx.symbolic_trace(after)), theirs)
        traced_networks += 1

    any_forward()
    assert traced_networks > 0.3 * examples
