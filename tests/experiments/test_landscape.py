"""The loss and the gradient along a step: against a direct computation, dead networks, and bounds."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from experiments.procedures import landscape

RATES = [1e-3, 1e-2, 1e-1, 1.0]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 10)).double()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(16, 3, 2, 2, dtype=torch.float64), torch.randint(10, (16,))


def along(net: nn.Module, rates: list[float] = RATES, gradients: bool = True) -> dict:
    return landscape.along_gradient(net, *batch(), rates, gradients, lambda share: None)


def test_losses_and_gradients_along_a_step() -> None:
    net, (images, labels) = network(), batch()
    found = along(net)
    start = F.cross_entropy(net(images), labels)
    gradient = torch.autograd.grad(start, list(net.parameters()))
    norm = torch.cat([g.flatten() for g in gradient]).norm()
    assert found["start"] == pytest.approx(start.item()) and found["norm"] == pytest.approx(norm.item())
    for k, rate in enumerate(RATES):
        moved = network()
        with torch.no_grad():
            for parameter, g in zip(moved.parameters(), gradient, strict=True):
                parameter -= rate * g
        loss = F.cross_entropy(moved(images), labels)
        gradient_there = torch.autograd.grad(loss, list(moved.parameters()))
        change = torch.cat([(a - b).flatten() for a, b in zip(gradient_there, gradient, strict=True)]).norm()
        assert found["relative"][k] == pytest.approx((loss / start).item())
        assert found["predictiveness"][k] == pytest.approx((change / norm).item())
        assert found["smoothness"][k] == pytest.approx((change / (rate * norm)).item())


def test_the_parameters_are_restored() -> None:
    net = network()
    before = [parameter.clone() for parameter in net.parameters()]
    along(net)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), before, strict=True))


def test_a_network_with_equal_logits_is_dead() -> None:
    """All images have the same logits. Its loss is near ln 10, far below a bad start, and no improvement."""
    net, (images, _) = network(), batch()
    assert not landscape.is_dead(net(images))
    nn.init.constant_(net[1].bias, -1e6)  # no ReLU lets anything through
    assert landscape.is_dead(net(images))
    assert not landscape.is_dead(torch.full((4, 10), torch.inf)), "a network that blows up is not dead"
    found = along(net)
    assert found["dead at start"] and all(found["dead"])
    assert (found["improving"], found["improving bound"]) == (RATES[0], -1) and np.isnan(found["lowest"])


def test_dead_networks_do_not_count_as_improved() -> None:
    rates = np.array(RATES)
    found = landscape.summary(np.array([0.9, 1.2, 50.0, 0.01]), np.array([False, False, False, True]), rates)
    assert (found["best rate"], found["lowest"], found["improving"]) == (1e-3, 0.9, 1e-3)
    assert found["best rate bound"] == -1, "a smaller rate may be better"


def test_a_result_at_the_end_of_the_rates_is_a_bound() -> None:
    rates, living = np.array(RATES), np.zeros(4, bool)
    falls = landscape.summary(np.array([0.9, 0.8, 0.7, 0.6]), living, rates)
    assert (falls["improving"], falls["improving bound"]) == (1.0, 1)
    assert (falls["best rate"], falls["best rate bound"]) == (1.0, 1)
    assert (falls["passes 1e3"], falls["passes 1e3 bound"]) == (1.0, 1), "not reached: at least the last rate"
    rises = landscape.summary(np.array([2.0, 5e3, 5e6, np.nan]), living, rates)
    assert (rises["improving"], rises["improving bound"]) == (1e-3, -1)
    assert (rises["passes 1e3"], rises["passes 1e3 bound"]) == (1e-2, 0)
    assert (rises["passes 1e6"], rises["largest to 0.2"]) == (1e-1, 5e6)
    at_once = landscape.summary(np.array([2e3, 1.0, 1.0, 1.0]), living, rates)
    assert (at_once["passes 1e3"], at_once["passes 1e3 bound"]) == (1e-3, -1)


def test_the_reach_ends_where_the_gradient_has_changed_by_half() -> None:
    changes = np.array([0.1, 0.2, 0.6, 0.3])
    assert landscape.before_the_first(changes >= 0.5, np.array(RATES)) == (1e-2, 0)
