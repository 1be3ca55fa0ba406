"""Products of random matrices: Theorem 1, singular values of samples, and condition numbers above 10^16.

X is a product of M square factors with independent N(0, 1/N) entries. x is the square of a singular value of X, that
is, an eigenvalue of X^T X. For N to infinity its distribution is the Fuss-Catalan distribution (the paper's equation
5).
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import Arrays, Tick

NODES = 8192  # nodes of the curves of Theorem 1
NEAR_ZERO = (0.02, 0.2)  # the exponent near 0 is fitted to the values between these shares of a sample
SHOWN = 400  # number of points of a density in the results


def measure(config: dict, data: None, device: torch.device, folder: Path, tick: Tick) -> dict[str, Arrays]:
    """One of the quantities ``density``, ``products`` and ``conditions``, for the options' ``factors``."""
    [quantity] = config["quantities"]
    results = {"density": _density, "products": _products, "conditions": _conditions}[quantity](config, tick)
    return {quantity: {name: np.asarray(value) for name, value in results.items()}}


# ------------------------------------------------------------------------------------------------ Theorem 1


def edge(factors: int) -> float:
    """The largest x: (M + 1)^(M + 1) / M^M."""
    return (factors + 1) ** (factors + 1) / factors**factors


def theorem(factors: int, nodes: int = NODES) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x from 0 to the edge in increasing order, the density at x, and the share of values below x: [nodes - 1] each.

    With phi in (0, pi / (M + 1)) and s_k = sin(k phi), the paper's equation 5 is x = s_(M+1)^(M+1) / (s_1 s_M^M) and
    density = s_1^2 s_M^(M-1) / (pi s_(M+1)^M). The share is integrated over phi, because the integrand density dx/dphi
    is smooth in phi. As a function of x the integrand is not smooth.
    """
    m = factors
    phi = np.linspace(np.pi / (m + 1), 0, nodes, endpoint=False)  # x rises as phi falls
    s_1, s_m, s_next = np.sin(phi), np.sin(m * phi), np.sin((m + 1) * phi)
    s_next[0] = 0.0  # sin(pi), exactly
    with np.errstate(divide="ignore"):
        x, density = s_next ** (m + 1) / (s_1 * s_m**m), s_1**2 * s_m ** (m - 1) / (np.pi * s_next**m)
    # density |dx/dphi| = density x (cot phi + M^2 cot(M phi) - (M + 1)^2 cot((M + 1) phi))
    slope = s_next * (np.cos(phi) + m**2 * np.cos(m * phi) * s_1 / s_m) - (m + 1) ** 2 * np.cos((m + 1) * phi) * s_1
    slope /= np.pi * s_m
    steps = np.diff(phi) * (slope[1:] + slope[:-1]) / -2
    share = np.concatenate([[0.0], np.cumsum(steps)])
    return x, density, share


def distance(values: np.ndarray, factors: int) -> float:
    """Kolmogorov's distance between a sample of x and Theorem 1: the largest difference of the shares below a value."""
    x, _, share = theorem(factors)
    ordered, power = np.sort(values), 1 / (factors + 1)  # near 0 the share is about linear in x^power
    expected = np.interp(ordered**power, x**power, share, right=1.0)
    count = len(ordered)
    steps = np.arange(count + 1) / count
    return float(max((steps[1:] - expected).max(), (expected - steps[:-1]).max()))


def exponent(values: np.ndarray) -> float:
    """The exponent e of a density c x^e near 0, fitted to the small values of a sample of x.

    Such a density has the share c / (e + 1) x^(e + 1) below x, so e + 1 is the slope of ln share over ln x.
    """
    ordered = np.sort(values)
    share = (np.arange(len(ordered)) + 0.5) / len(ordered)
    near = (share > NEAR_ZERO[0]) & (share < NEAR_ZERO[1])
    return float(np.polyfit(np.log(ordered[near]), np.log(share[near]), 1)[0] - 1)


def _density(config: dict, tick: Tick) -> Arrays:
    results: dict[str, Any] = {}
    for m in config["options"]["factors"]:
        x, density, share = theorem(m)
        indices = np.unique(np.linspace(1, len(x) - 1, SHOWN).astype(int))
        middle = (x[1:] + x[:-1]) / 2  # the middle of each step, for the moments
        results |= {
            f"x/{m}": x[indices],
            f"density/{m}": density[indices],
            f"share/{m}": share[indices],
            f"mass/{m}": share[-1],
            f"m1/{m}": middle @ np.diff(share),
            f"m2/{m}": middle**2 @ np.diff(share),
            f"edge of s/{m}": math.sqrt(edge(m)),
            f"edge over e (M + 1/2)/{m}": edge(m) / (math.e * (m + 0.5)),
            f"exponent/{m}": math.log(density[2] / density[1]) / math.log(x[2] / x[1]),  # at the smallest x
        }
    return results


# ------------------------------------------------------------------------------------------------ sampled products


def _factors(config: dict) -> np.ndarray:
    """The factors of one sample: [M, N, N], with entries N(0, 1/N)."""
    n, most = config["options"]["size"], max(config["options"]["factors"])
    return np.random.default_rng(config["seed"]).standard_normal((most, n, n)) / math.sqrt(n)


def _products(config: dict, tick: Tick) -> Arrays:
    counts = config["options"]["factors"]
    results: dict[str, Any] = {}
    for m, product, inverse in products(_factors(config)):
        if m in counts:
            tick((m - 1) / max(counts), f"{m} factors")
            s = np.linalg.svd(product, compute_uv=False)
            results |= {
                f"s/{m}": s,
                f"largest/{m}": s[0],
                f"first bin/{m}": (s < math.sqrt(edge(m)) / 50).mean() * 10_000,
                f"distance of s^2/{m}": distance(s**2, m),
                f"distance of s/{m}": distance(s, m),
                f"exponent/{m}": exponent(s**2),
                f"log10 kappa/{m}": math.log10(s[0]) + log_norm(inverse),
            }
    return results


# ------------------------------------------------------------------------------------------------ condition numbers


def products(factors: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """m, X = F_m .. F_1 and X^-1 for m = 1, 2, ..., from square factors [M, N, N]. X and X^-1 are accumulated apart.

    This gives kappa(X) = |X| |X^-1| in the spectral norm, also above 10^16. Rounding spoils the smallest singular value
    of a product X if kappa is near 10^16, but never the largest. 1 / smallest is the largest singular value of X^-1.
    X^-1 is accumulated by solves with single factors, X_m^-1 = X_(m-1)^-1 F_m^-1, and the condition of a single factor
    is moderate. The relative error is a few units of rounding, times the largest kappa(F_k), times
    |A^-1| |B^-1| / |A^-1 B^-1| for a product that is split in two. The last term is moderate unless factors are
    constructed to cancel.
    """
    product = inverse = np.eye(factors.shape[1])
    for m, factor in enumerate(factors, start=1):
        product = factor @ product
        inverse = np.linalg.solve(factor.T, inverse.T).T
        yield m, product, inverse


def log_norm(matrix: np.ndarray) -> float:
    """log10 of the spectral norm."""
    return math.log10(np.linalg.norm(matrix, 2))


def lyapunov_slope(size: int) -> float:
    """The increase of log10 kappa per factor, in the limit of many factors with N(0, 1/N) entries.

    It is (psi(N/2) - psi(1/2)) / (2 ln 10). The exponents of products of Gaussian matrices are
    (ln(2/N) + psi(k/2)) / 2, k = 1 .. N (Newman, "The distribution of Lyapunov exponents: exact results for random
    matrices", 1986). psi is the digamma function.
    """
    half = -np.euler_gamma - 2 * math.log(2)  # psi(1/2); the rest by psi(x + 1) = psi(x) + 1/x from psi(1/2) or psi(1)
    if size % 2:
        top = half + sum(2 / k for k in range(1, size - 1, 2))
    else:
        top = -np.euler_gamma + sum(1 / k for k in range(1, size // 2))
    return (top - half) / (2 * math.log(10))


def _conditions(config: dict, tick: Tick) -> Arrays:
    counts = config["options"]["factors"]
    results: dict[str, Any] = {}
    kappas: list[float] = []
    for m, product, inverse in products(_factors(config)):
        if m in counts:
            tick((m - 1) / max(counts), f"{m} factors")
            s = np.linalg.svd(product, compute_uv=False)
            kappas.append(math.log10(s[0]) + log_norm(inverse))
            plain = math.log10(s[0] / s[-1]) if s[-1] else math.inf  # from the singular values of the product alone
            results |= {f"log10 kappa/{m}": kappas[-1], f"plain log10 kappa/{m}": plain}
    slope, start = np.polyfit(counts, kappas, 1)
    residual = np.array(kappas) - slope * np.array(counts) - start
    limit = lyapunov_slope(config["options"]["size"])
    return results | {"slope": slope, "straightness": 1 - residual.var() / np.var(kappas), "limit": limit}
