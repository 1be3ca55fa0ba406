"""Theorem 1, condition numbers and the noise of gradients against values that are known independently."""

import math
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bnkern.train.cifar10 import synthetic
from experiments.procedures import build, noise
from experiments.procedures.layer_products import transfer
from experiments.procedures.theory import distance, edge, exponent, log_norm, lyapunov_slope, products, theorem

FACTORS = (1, 2, 3, 5, 10)


def ignore_progress(share: float, what: str) -> None:
    pass


# ------------------------------------------------------------------------------------------------ Theorem 1


@pytest.mark.parametrize("m", FACTORS)
def test_moments_are_fuss_and_catalans(m: int) -> None:
    """m_k = binom((M + 1) k, k) / (M k + 1): the mass, 1, M + 1, ..."""
    x, _, share = theorem(m)
    middle = (x[1:] + x[:-1]) / 2
    assert share[0] == x[0] == 0
    for k in range(4):
        # 8192 steps of the trapezoid: an error of their squared width, some 1e-8, which M magnifies
        expected = math.comb((m + 1) * k, k) / (m * k + 1)
        assert middle**k @ np.diff(share) == pytest.approx(expected, rel=1e-6)


def test_one_factor_is_the_quarter_circle() -> None:
    x, density, share = theorem(1)
    s = np.sqrt(x)
    quarter = (s * np.sqrt(4 - x) / 2 + 2 * np.arcsin(s / 2)) / np.pi
    np.testing.assert_allclose(share, quarter, atol=1e-7)  # the trapezoid's
    np.testing.assert_allclose(density[1:], np.sqrt(4 / x[1:] - 1) / (2 * np.pi), rtol=1e-6)


@pytest.mark.parametrize("m", FACTORS)
def test_the_density_is_the_slope_of_the_share(m: int) -> None:
    x, density, share = theorem(m)
    inner = slice(len(x) // 10, -10)  # at the ends differences of neighbours are inaccurate
    np.testing.assert_allclose(np.gradient(share, x)[inner], density[inner], rtol=1e-4)


@pytest.mark.parametrize("m", FACTORS)
def test_the_largest_value_is_the_edge_and_the_density_diverges_at_zero(m: int) -> None:
    x, density, _ = theorem(m)
    assert x[-1] == pytest.approx(edge(m), rel=1e-6) and x[-1] < edge(m)
    assert np.all(np.diff(x) > 0)
    constant = density[1] * x[1] ** (m / (m + 1))
    assert constant == pytest.approx(math.sin(math.pi / (m + 1)) / math.pi, rel=1e-3)  # at a small x, not at 0


def test_edges_of_singular_values() -> None:
    assert [round(edge(m) ** 0.5, 3) for m in FACTORS] == [2, 2.598, 3.079, 3.864, 5.341]


def test_distance_of_exact_quantiles_and_of_shifted_ones() -> None:
    x, _, share = theorem(3)
    values = np.interp((np.arange(500) + 0.5) / 500, share, x)
    assert distance(values, 3) == pytest.approx(0.001, abs=1e-4)  # half a step
    lower = np.interp((np.arange(500) + 0.5) / 500 * 0.9, share, x)
    assert distance(lower, 3) == pytest.approx(0.1, abs=0.002)  # none of the largest tenth
    assert distance(values, 2) > 0.05


def test_the_theorems_x_is_the_square_of_a_singular_value() -> None:
    draw = np.random.default_rng(0).standard_normal((2, 300, 300)) / 300**0.5
    s = np.linalg.svd(draw[1] @ draw[0], compute_uv=False)
    assert distance(s**2, 2) < 0.02 < 0.15 < distance(s, 2)


def test_the_exponent_of_a_power_law() -> None:
    x = ((np.arange(10_000) + 0.5) / 10_000) ** 4  # shares x^(1/4), so a density of x^(-3/4)
    assert exponent(x) == pytest.approx(-0.75, abs=1e-6)


# ------------------------------------------------------------------------------------------------ condition numbers


def inverse(matrix: np.ndarray) -> np.ndarray:
    """Exactly, in fractions, by Gauss and Jordan."""
    n = len(matrix)
    rows = [[Fraction(int(v)) for v in row] + [Fraction(i == j) for j in range(n)] for i, row in enumerate(matrix)]
    for k in range(n):
        pivot = next(i for i in range(k, n) if rows[i][k])
        rows[k], rows[pivot] = rows[pivot], rows[k]
        rows[k] = [v / rows[k][k] for v in rows[k]]
        for i in range(n):
            if i != k:
                rows[i] = [a - rows[i][k] * b for a, b in zip(rows[i], rows[k], strict=True)]
    return np.array([[float(v) for v in row[n:]] for row in rows])


def test_condition_numbers_far_beyond_float64s_digits() -> None:
    """Against exact arithmetic: integer factors, their product and its inverse in whole numbers and fractions."""
    factors = np.random.default_rng(1).integers(-1000, 1001, (40, 6, 6))
    exact = np.eye(6, dtype=object)
    for (_, product, inverted), factor in zip(products(factors.astype(float)), factors, strict=True):
        exact = factor.astype(object) @ exact
        expected = log_norm(exact.astype(float)) + log_norm(inverse(exact))
        assert log_norm(product) + log_norm(inverted) == pytest.approx(expected, abs=1e-9)  # rounding times kappa(F)
    s = np.linalg.svd(product, compute_uv=False)
    assert expected > 20 and math.log10(s[0] / s[-1]) < expected - 2, "here the product's own singular values are noise"


def test_condition_numbers_of_a_constructed_product() -> None:
    """F_k = Q_k D Q_(k-1)^T with orthogonal Q: the product's singular values are the powers of those in D."""
    draw = np.random.default_rng(2)
    turns = [np.linalg.qr(draw.standard_normal((20, 20)))[0] for _ in range(13)]
    values = np.geomspace(1, 1e-3, 20)
    factors = np.array([(after * values) @ before.T for before, after in pairwise(turns)])
    for m, product, inverted in products(factors):
        # each factor is rounded, by 1e-16 of its norm: 1e-13 of its smallest singular value
        assert log_norm(product) + log_norm(inverted) == pytest.approx(3 * m, abs=1e-11)


def test_condition_numbers_rise_at_the_rate_of_the_limit() -> None:
    kappas = []
    for seed in range(6):
        factors = np.random.default_rng(seed).standard_normal((12, 60, 60)) / 60**0.5
        kappas.append([log_norm(x) + log_norm(y) for _, x, y in products(factors)])
    slope = np.polyfit(range(4, 13), np.mean(kappas, 0)[3:], 1)[0]
    assert slope == pytest.approx(lyapunov_slope(60), abs=0.2)  # six draws: the slopes' own spread is near 0.3


def test_the_limit_of_the_gain_per_factor() -> None:
    digamma = {0.5: -1.9635100260214235, 1.5: 0.03648997397857652, 100: 4.600161852738087}
    for size in (3, 200):
        expected = (digamma[size / 2] - digamma[0.5]) / (2 * math.log(10))
        assert lyapunov_slope(size) == pytest.approx(expected, rel=1e-12)


# ------------------------------------------------------------------------------------------------ layers as matrices


def test_a_convolution_as_matrices_by_frequency() -> None:
    """Against the whole matrix of the convolution with circular padding, column by column."""
    torch.manual_seed(0)
    weight = torch.randn(3, 4, 3, 3, dtype=torch.float64)
    basis = torch.eye(4 * 25, dtype=torch.float64).view(100, 4, 5, 5)
    matrix = F.conv2d(F.pad(basis, (1, 1, 1, 1), mode="circular"), weight).flatten(1).T
    whole = np.linalg.svd(matrix.numpy(), compute_uv=False)
    blocks = np.sort(np.linalg.svd(transfer(weight, 5), compute_uv=False).ravel())[::-1]
    scale = np.sqrt((whole**2).sum() / 25 / 4)
    np.testing.assert_allclose(blocks, whole[: len(blocks)] / scale, rtol=1e-10)
    assert (np.abs(transfer(weight, 5)) ** 2).sum((1, 2)).mean() == pytest.approx(4)


# ------------------------------------------------------------------------------------------------ gradient noise


def run_noise(norm: str, **changes: object) -> dict[str, np.ndarray]:
    options = {"images": 12, "sizes": [2, 12], "budget": 24, "most": 6, "mode": "frozen", "replace": True} | changes
    return noise.measure(configuration(norm, options), IMAGES, torch.device("cpu"), None, ignore_progress)["noise"]


def configuration(norm: str, options: dict) -> dict:
    common = {"seed": 0, "depth": 8, "shortcut": "projection", "kernels": "bnkern", "init": "xavier_normal"}
    return common | {"norm": norm, "options": options}


IMAGES = synthetic(64, 10)


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_noise_of_single_images(norm: str) -> None:
    """C against gradients taken one by one, and their sum of squares."""
    found = run_noise(norm)
    model = build(configuration(norm, {}))
    chosen = np.random.default_rng(0).permutation(64)[:12]
    images, labels = IMAGES.normalise(IMAGES.train.images[chosen]), IMAGES.train.labels[chosen]
    noise._freeze(model, images)
    each = []
    for k in range(12):
        loss = F.cross_entropy(model(images[k : k + 1]), labels[k : k + 1])
        each.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]).double())
    each = torch.stack(each)
    expected = (each - each.mean(0)).square().sum(1).mean()
    assert found["C"] == pytest.approx(expected.item(), rel=1e-4)  # gradients in float32, batch by batch


def test_batches_of_all_images_have_no_noise_without_repetition() -> None:
    found = run_noise("batch", replace=False)
    assert abs(found["noise/12"]) < 1e-9 * found["C"] < found["noise/2"]
    assert run_noise("batch", replace=True)["noise/12"] > 0.02 * found["C"]


def test_noise_is_inverse_to_the_batch_size() -> None:
    found = run_noise("none", images=32, sizes=[1, 4, 16], budget=1024, most=128)
    for size in (1, 4, 16):
        assert found[f"ratio/{size}"] == pytest.approx(1, abs=0.35)  # 64 to 128 draws, heavy-tailed
    assert found["slope"] == pytest.approx(-1, abs=0.15)


def test_in_training_mode_no_single_image_has_a_gradient() -> None:
    found = run_noise("batch", mode="training", sizes=[4, 8])
    assert "C" not in found and found["noise/4"] > 0
