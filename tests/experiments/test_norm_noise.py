"""The noise of the gradient from the norm layers: what is measured along a run, by plain autograd of torch."""

import math
from pathlib import Path
from types import MethodType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bnkern.train import loop
from experiments import spec
from experiments.procedures import norm_noise, training
from experiments.specs import SCALES
from tests.experiments.support import CPU, IMAGES, configuration, ignore_progress, same_arrays

BATCH, PARTS = 4, 3


def per_sample(norm: nn.Module, samples: int, frozen: bool) -> list[torch.Tensor]:
    """Gives the norm a weight and a bias for each sample, as leaves with equal values, and returns them."""
    weight, bias = (t.detach().repeat(samples, 1)[:, :, None, None].requires_grad_() for t in (norm.weight, norm.bias))

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        y = weight * (x if frozen else F.batch_norm(x, None, None, training=True, eps=self.eps)) + bias
        y = y if residual is None else y + residual
        return F.relu(y) if self.act else y

    norm.forward = MethodType(forward, norm)
    return [weight, bias]


@pytest.mark.parametrize("norm", ["batch", "affine"])
def test_a_measurement_is_that_of_plain_autograd(tmp_path: Path, norm: str) -> None:
    """In float64, on torch's kernels: gradients of the parts, and of norm parameters that each sample has for itself.

    Without batch norm the latter are also the gradients of the samples one by one.
    """
    config = configuration(norm, precision="fp64") | {"batch": BATCH}
    settings = training.settings_of(config, IMAGES)
    torch.manual_seed(0)
    noise = norm_noise.NormNoise(settings, IMAGES, CPU, tmp_path, 2, PARTS)
    network = loop.build(settings, CPU)
    found = noise.record(network, 5)
    plain = loop.build(settings.replace(kernels="torch"), CPU)
    plain.load_state_dict(network.state_dict())
    norms = [module for module in plain.modules() if isinstance(module, nn.BatchNorm2d)]
    chosen = {"network": list(plain.parameters()), "norms": [p for module in norms for p in module.parameters()]}
    batches = [
        [t.clone() for t in noise.batches.at(noise.FIRST_EPOCH + 5, part % len(noise.batches))] for part in range(PARTS)
    ]
    for kind, parameters in chosen.items():
        gradients = torch.stack(
            [
                torch.cat([g.flatten() for g in torch.autograd.grad(F.cross_entropy(plain(x), labels), parameters)])
                for x, labels in batches
            ]
        )
        trace = BATCH * gradients.var(0).sum()
        assert found[f"noise {kind}"] == pytest.approx(trace.item(), rel=1e-9)
        square = gradients.mean(0).square().sum() - trace / (BATCH * PARTS)
        assert found[f"square {kind}"] == pytest.approx(square.item(), rel=1e-9)

    def estimates(h: torch.Tensor) -> tuple[float, float]:
        return h.var(0).sum().item(), (h.mean(0).square().sum() - h.var(0).sum() / BATCH).item()

    if norm == "affine":
        one_by_one = [
            torch.stack(
                [
                    torch.cat(torch.autograd.grad(F.cross_entropy(plain(x[None]), label[None]), chosen["norms"]))
                    for x, label in zip(images, labels, strict=True)
                ]
            )
            for images, labels in batches
        ]
        check(found, [estimates(h) for h in one_by_one])
    own = [t for module in norms for t in per_sample(module, BATCH, norm == "affine")]
    contributions = [
        BATCH * torch.cat([g.flatten(1) for g in torch.autograd.grad(F.cross_entropy(plain(x), labels), own)], 1)
        for x, labels in batches
    ]
    check(found, [estimates(h) for h in contributions])


def check(found: dict[str, np.ndarray], expected: list[tuple[float, float]]) -> None:
    for name, numbers in zip(("noise", "square"), zip(*expected, strict=True), strict=True):
        assert found[f"{name} samples"] == pytest.approx(np.mean(numbers), rel=1e-7)


def test_the_numbers_of_a_run(tmp_path: Path) -> None:
    """From three measurements and one after the last step, of which one has no positive estimate of the square."""
    noise = norm_noise.NormNoise(training.settings_of(configuration(), IMAGES), IMAGES, CPU, tmp_path, 3)
    rows = {"noise network": [10.0, 20, 30], "noise norms": [1.0, 2, 4], "noise samples": [2.0, 4, 8]}
    rows |= {"square network": [1.0, 1, 1], "square norms": [1.0, 1, 1], "square samples": [1.0, 1, 2]}
    for step in range(4):
        np.savez(tmp_path / f"{step}.npz", step=step, **{name: values[step % 3] for name, values in rows.items()})
    found = noise.arrays(2)
    np.testing.assert_array_equal(found["step"], [0, 1, 2])
    np.testing.assert_array_equal(found["scale samples"], [2, 4, 4])
    assert found["rank correlation"] == pytest.approx(math.sqrt(3) / 2) and found["rank correlation of norms"] == 1
    assert found["noise, samples / norms"] == pytest.approx(2) and found["scale, samples / norms"] == 2
    assert found["departure"] == pytest.approx(0.2 / (4 / 30))
    np.savez(tmp_path / "0.npz", step=0, **{name: values[0] for name, values in rows.items()} | {"square samples": -1})
    found = noise.arrays(2)
    assert found["scale samples"][0] == found["departure"] == np.inf and found["rank correlation"] < 0


def test_ranks_and_ratios() -> None:
    x = np.array([3.0, 1, 2, 10])
    assert norm_noise.rank_correlation(x, x**3) == pytest.approx(1)
    assert norm_noise.rank_correlation(x, -x) == pytest.approx(-1)
    assert norm_noise.rank_correlation(np.array([1.0, 2, np.inf, np.inf]), np.arange(4.0)) == pytest.approx(
        0.9487, 1e-3
    )
    assert math.isnan(norm_noise.rank_correlation(np.ones(4), x))
    assert norm_noise.departure(np.array([1.0, 2, 8])) == 4 and norm_noise.departure(np.array([0.5, 2, 3])) == 4
    assert norm_noise.departure(np.array([1.0, np.inf, 2])) == math.inf and math.isnan(norm_noise.departure(x * np.nan))


@pytest.mark.parametrize("norm", ["batch", "affine"])
def test_the_measurement_changes_nothing_of_the_run(tmp_path: Path, norm: str) -> None:
    found = []
    for noise in (0, 4):
        (tmp_path / str(noise)).mkdir()
        config = configuration(norm, noise=noise, parts=2)
        found.append(norm_noise.measure(config, IMAGES, CPU, tmp_path / str(noise), ignore_progress))
    same_arrays({"training": found[0]["training"]}, {"training": found[1]["training"]})
    noise = found[1]["noise"]
    assert noise["step"][0] == 0 and noise["step"][-1] == 7
    assert all((noise[f"noise {kind}"] > 0).all() for kind in norm_noise.KINDS)


def test_both_networks_are_trained_alike() -> None:
    for scale in SCALES:
        batch, affine = spec("norm_noise").at(scale)
        assert affine == batch.but(label="affine", norm="affine")
        assert batch.seeds >= 3 or scale == "smoke"
