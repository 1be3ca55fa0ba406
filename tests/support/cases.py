"""The cases that every backend is tested on, and the bounds of the errors.

A :class:`Case` is a shape, a memory layout and a way to fill it, with the reason for the case. ``case.problem`` makes
its tensors, which are the same on every machine and in every run. The truth is float64 arithmetic on the same rounded
inputs. The bounds at the end of this file state how large an error may be, and why.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from bnkern import backends
from bnkern.backends import reference
from bnkern.backends.reference import accumulator

EPS = 1e-5

# ------------------------------------------------------------------------------------------ where a test runs


class Target(NamedTuple):
    """A backend on a device."""

    backend: str
    device: str

    def __str__(self) -> str:
        return f"{self.backend}-{self.device}" if self.device != "cpu" else self.backend


# The backends of the table that work here, for each available device. test_backends.py asserts that "cpu" is one of
# them, because a missing native module must not remove its tests silently.
TARGETS = [
    Target(name, device)
    for device in ("cpu", "cuda")
    if device == "cpu" or torch.cuda.is_available()
    for name in backends.PREFERENCE[device]
    if backends.unavailable(name, device) is None
]


class Precision(NamedTuple):
    """The dtype of the activations and of the vectors of size C."""

    name: str
    dtype: torch.dtype
    params: torch.dtype


MIXED = [
    Precision("fp32", torch.float32, torch.float32),
    Precision("fp64", torch.float64, torch.float64),
    Precision("bf16", torch.bfloat16, torch.float32),
    Precision("fp16", torch.float16, torch.float32),
]
# A module that is cast as a whole: weight, bias, running statistics and their gradients have the half precision too.
PURE = [
    Precision("pure_bf16", torch.bfloat16, torch.bfloat16),
    Precision("pure_fp16", torch.float16, torch.float16),
]
PRECISIONS = MIXED + PURE
FP32, FP64, BF16, FP16 = MIXED


# -------------------------------------------------------------------------------------------------- layouts


def _channels_last(v: Tensor) -> Tensor:
    """Dense with the channel innermost, for any number of dimensions."""
    return v.movedim(1, -1).contiguous().movedim(-1, 1)


def _window(v: Tensor, axis: int, before: int, after: int, dense: Callable[[Tensor], Tensor]) -> Tensor:
    """``v`` as a view into a larger tensor that is NaN elsewhere, so that a read outside of the view is detected."""
    shape = list(v.shape)
    shape[axis] += before + after
    base = dense(torch.full(shape, torch.nan, dtype=v.dtype, device=v.device))
    return base.narrow(axis, before, v.shape[axis]).copy_(v)


def _every_second_sample(v: Tensor) -> Tensor:
    base = torch.full((2 * v.shape[0], *v.shape[1:]), torch.nan, dtype=v.dtype, device=v.device)
    return base[::2].copy_(v)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": Tensor.contiguous,
    "channels_last": _channels_last,
    # These are read in place: only the strides of samples, channels or rows are unusual.
    "sliced_batch": _every_second_sample,
    "sliced_channels": lambda v: _window(v, 1, 1, 2, Tensor.contiguous),
    "sliced_channels_last": lambda v: _window(v, 1, 1, 2, _channels_last),
    "misaligned": lambda v: _window(v.flatten(), 0, 1, 0, Tensor.contiguous).view(v.shape),
    "expanded_batch": lambda v: v[:1].contiguous().expand(v.shape),
    "expanded_channels": lambda v: v[:, :1].contiguous().expand(v.shape),
    # These are copied once, because two strides cannot describe them.
    "sliced_space": lambda v: _window(v, -1, 1, 2, Tensor.contiguous),
    "sliced_space_channels_last": lambda v: _window(v, -1, 1, 2, _channels_last),
    "expanded_space": lambda v: v[..., :1].contiguous().expand(v.shape),
    "reversed_axes": lambda v: v.permute(*reversed(range(v.dim()))).contiguous().permute(*reversed(range(v.dim()))),
}


# ---------------------------------------------------------------------------------------------------- cases


class Problem(NamedTuple):
    """The tensors of one call. ``mean`` and ``invstd`` are arguments of the phases that take statistics."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    residual: Tensor
    dy: Tensor
    mean: Tensor
    invstd: Tensor


@dataclass(frozen=True)
class Case:
    """A shape [N, C, ...] in a layout, its ratio of mean to sigma, and the special values of channel 0."""

    name: str
    shape: tuple[int, ...]
    reason: str
    layout: str = "contiguous"
    ratio: float = 1.0
    odd: str = ""  # "constant" | "inf" | "nan" | "outlier"

    def __str__(self) -> str:
        return self.name

    def suits(self, dtype: torch.dtype) -> bool:
        """Whether the dtype can hold such values.

        If sigma is far below the spacing of the values, few of them are distinct.
        """
        return self.ratio * torch.finfo(dtype).eps <= 1

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(zlib.crc32(self.name.encode()))

    def problem(self, precision: Precision = FP32, device: str = "cpu") -> Problem:
        generator, c = self.generator(), self.shape[1]

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        def uniform(low: float, high: float) -> Tensor:
            return low + (high - low) * torch.rand(c, generator=generator, dtype=torch.float64)

        def placed(values: Tensor) -> Tensor:
            return LAYOUTS[self.layout](values.to(precision.dtype).to(device))

        def vector(values: Tensor, dtype: torch.dtype = precision.params) -> Tensor:
            return values.to(dtype).to(device)

        by_channel = (1, c, *[1] * (len(self.shape) - 2))
        sigma = uniform(0.5, 2.0)
        mean = self.ratio * sigma * torch.where(torch.arange(c) % 3 == 2, -1.0, 1.0)
        values = normal(*self.shape) * sigma.view(by_channel) + mean.view(by_channel)
        channel = values[:, 0]
        if self.odd == "constant":
            channel.fill_(3.3)  # no dtype represents it exactly, so its sum rounds
        elif self.odd:
            channel[(0,) * channel.dim()] = {"inf": torch.inf, "nan": torch.nan, "outlier": 1e4 * sigma[0]}[self.odd]
        x = placed(values)
        count, given_mean, m2 = reference.moments(x.double())
        given_invstd = torch.rsqrt(m2 / count + EPS)
        healthy = given_mean.isfinite()
        sign = torch.where(torch.arange(c) % 4 == 1, -1.0, 1.0)
        return Problem(
            x,
            vector(uniform(0.5, 1.5) * sign),
            vector(uniform(0.2, 0.8) * -sign),
            placed(normal(*self.shape)),
            placed(normal(*self.shape)),
            vector(given_mean.where(healthy, 0.0), accumulator(precision.dtype)),
            vector(given_invstd.where(healthy, 1.0), accumulator(precision.dtype)),
        )


CASES = [
    # Shapes: every number of dimensions, tails of every vector width, the extremes of C and of the values per channel.
    Case("nchw", (4, 16, 8, 8), "the ordinary layout, whole vectors"),
    Case("nchw_tail", (4, 6, 9, 7), "S = 63: a vector loop with a tail in every plane"),
    Case("nchw_s49", (3, 5, 7, 7), "the last stage of ImageNet networks, odd C: planes must not share mask bytes"),
    Case("ncl_s7", (5, 17, 7), "N x C x L: planes shorter than a vector, odd C"),
    Case("nc", (64, 17), "N x C: S = 1, rows of odd length"),
    Case("nc_small", (6, 3), "N x C: the tensor is smaller than one vector"),
    Case("s1_4d", (12, 17, 1, 1), "4-D with S = 1, where the two layouts coincide"),
    Case("ndhw", (2, 3, 3, 4, 5), "5-D, odd C"),
    Case("c1", (4, 1, 6, 6), "C = 1: the stride of the channel is arbitrary"),
    Case("c1_channels_last", (4, 1, 6, 6), "C = 1 in channels_last strides", "channels_last"),
    Case("c2048", (3, 2048, 2, 2), "C = 2048: more channels than values"),
    Case("c2048_rows", (6, 2048), "C = 2048 in rows"),
    Case("two_values", (2, 5), "M = 2: the minimum for training; dx cancels almost completely"),
    Case("two_values_planes", (1, 3, 2), "M = 2: both values in one plane"),
    Case("long_planes", (1, 3, 150, 270), "large planes: one sample, channels of many tiles"),
    Case("long_planes_few", (2, 2, 200, 201), "large odd planes: fewer channels than threads"),
    Case("many_samples", (700, 4, 5), "many short planes per channel: the reduction runs over samples"),
    Case("tall_rows", (3, 3, 130, 140), "many rows of three channels: a vector holds several rows", "channels_last"),
    Case("wide_rows", (40, 300, 3, 3), "rows of many vectors and a tail", "channels_last"),
    # Layouts.
    Case("nhwc", (4, 16, 8, 8), "channels_last: whole vectors", "channels_last"),
    Case("nhwc_c3", (4, 3, 9, 7), "channels_last: a row shorter than any vector", "channels_last"),
    Case("nhwc_c5_s49", (3, 5, 7, 7), "channels_last: odd C and S, mask bytes span rows", "channels_last"),
    Case("nhwc_c17", (2, 17, 5, 4), "channels_last: one vector and a tail of one", "channels_last"),
    Case("ndhwc", (2, 6, 3, 4, 5), "channels_last_3d", "channels_last"),
    Case("nlc", (5, 17, 7), "N x L x C viewed as N x C x L: rows in three dimensions", "channels_last"),
    Case("sliced_batch", (3, 5, 6, 7), "every second sample", "sliced_batch"),
    Case("sliced_batch_rows", (9, 17), "every second row of N x C", "sliced_batch"),
    Case("sliced_channels", (3, 5, 6, 7), "channels of a wider tensor: planes at odd offsets", "sliced_channels"),
    Case("sliced_columns", (9, 17), "columns of a wider N x C", "sliced_channels"),
    Case("sliced_channels_last", (3, 5, 6, 7), "channels of a wider channels_last tensor", "sliced_channels_last"),
    Case("sliced_space", (3, 5, 6, 7), "a crop: two strides cannot address it", "sliced_space"),
    Case("sliced_space_channels_last", (3, 5, 6, 7), "a crop in channels_last", "sliced_space_channels_last"),
    Case("misaligned", (3, 8, 4, 4), "storage offset of one element: no vector is aligned", "misaligned"),
    Case("expanded_batch", (4, 5, 6, 7), "samples of stride 0", "expanded_batch"),
    Case("expanded_batch_rows", (6, 17), "rows of stride 0", "expanded_batch"),
    Case("expanded_channels", (4, 5, 6, 7), "channels of stride 0", "expanded_channels"),
    Case("expanded_space", (4, 5, 6, 7), "positions of stride 0, like the gradient of a mean", "expanded_space"),
    Case("reversed_axes", (4, 5, 6, 7), "a dense tensor in neither layout", "reversed_axes"),
    # Values. A raw sum of squares loses digits of the variance at ratio 100, and all of them at 1e4.
    Case("ratio_100", (8, 5, 16, 15), "mean = 100 sigma", ratio=1e2),
    Case("ratio_1e3", (8, 5, 16, 15), "mean = 1e3 sigma", ratio=1e3),
    Case("ratio_1e4", (8, 5, 16, 15), "mean = 1e4 sigma", ratio=1e4),
    Case("ratio_100_rows", (8, 5, 16, 15), "mean = 100 sigma in rows", "channels_last", 1e2),
    Case("ratio_1e3_rows", (8, 5, 16, 15), "mean = 1e3 sigma in rows", "channels_last", 1e3),
    Case("ratio_1e4_rows", (16, 4, 32, 32), "mean = 1e4 sigma in rows, many of them", "channels_last", 1e4),
    Case("ratio_1e4_nc", (1000, 17), "mean = 1e4 sigma, N x C", ratio=1e4),
    Case(
        "constant", (4, 5, 9, 7), "a constant channel: variance 0, and a mean that is not representable", odd="constant"
    ),
    Case("constant_rows", (4, 5, 9, 7), "a constant channel, in rows", "channels_last", odd="constant"),
    Case("inf", (4, 5, 9, 7), "one Inf: only the statistics of its channel are affected", odd="inf"),
    Case("inf_rows", (4, 5, 9, 7), "one Inf, in rows", "channels_last", odd="inf"),
    Case("nan", (4, 5, 9, 7), "one NaN: only the statistics of its channel are affected", odd="nan"),
    Case("nan_rows", (4, 5, 9, 7), "one NaN, in rows", "channels_last", odd="nan"),
    Case("outlier", (8, 5, 16, 15), "the first element is 1e4 sigma away: a shift by it loses digits", odd="outlier"),
    Case(
        "outlier_rows", (8, 5, 16, 15), "the first element is 1e4 sigma away, in rows", "channels_last", odd="outlier"
    ),
]
CASE = {case.name: case for case in CASES}
assert len(CASE) == len(CASES), "two cases share a name"

# All cases, in each dtype that can hold their values.
SWEEP = pytest.mark.parametrize(
    ("precision", "case"),
    [pytest.param(p, c, id=f"{p.name}-{c.name}") for p in MIXED for c in CASES if c.suits(p.dtype)],
)

# One case of each way to address memory, for tests whose subject is not the shape.
FEW = [CASE[name] for name in ("nchw_tail", "nc", "nhwc_c5_s49", "ncl_s7", "sliced_channels", "sliced_space")]


# ---------------------------------------------------------------------------------------------------- truth


def exact(*tensors: Tensor | None) -> list[Tensor | None]:
    """Detached copies in float64 on the CPU, from which the truth is computed."""
    return [None if t is None else t.detach().to("cpu", torch.float64, copy=True) for t in tensors]


def by_channel(v: Tensor, x: Tensor) -> Tensor:
    """A [C] vector shaped to broadcast against x [N, C, ...]."""
    return v.view(1, -1, *[1] * (x.dim() - 2))


def per_channel(reduce: Callable, t: Tensor) -> Tensor:
    """``reduce`` (torch.sum, torch.amax) of t [N, C, ...] over all axes but the channel, shaped to broadcast."""
    return reduce(t, dim=[0, *range(2, t.dim())], keepdim=True)


def passed(y: Tensor) -> Tensor:
    """Where the ReLU with the output y passed its input. NaN passes, as in torch's threshold_backward."""
    return ~(y <= 0)


# --------------------------------------------------------------------------------------------------- bounds
# All bounds are absolute errors against float64, for float32 arithmetic. _unit scales them for float64.

EPS32 = torch.finfo(torch.float32).eps


def _unit(dtype: torch.dtype) -> float:
    """1 for float32 arithmetic. For float64 twice the ratio of the two epsilons, because the truth is rounded too."""
    return 1.0 if accumulator(dtype) is torch.float32 else 2 * torch.finfo(torch.float64).eps / EPS32


def ulp(value: Tensor, dtype: torch.dtype) -> Tensor:
    """The spacing of ``dtype`` at ``value``. For NaN and Inf it is an arbitrary number."""
    info = torch.finfo(dtype)
    return torch.exp2(value.abs().clamp(min=info.tiny, max=info.max).log2().floor()) * info.eps


def stored(bound: Tensor, truth: Tensor, dtype: torch.dtype) -> Tensor:
    """The bound after one rounding to nearest in ``dtype``, from the bound on the exact value."""
    return bound + 0.5 * ulp(truth.abs() + bound, dtype)


def mean_bound(mean: Tensor, var: Tensor, dtype: torch.dtype) -> Tensor:
    """4 eps32 |mean| for the rounding of the mean and of a few merges, and 1e-6 sigma for the sums of deviations."""
    return _unit(dtype) * (4 * EPS32 * mean.abs() + 1e-6 * var.sqrt())


def var_bound(mean: Tensor, var: Tensor, dtype: torch.dtype) -> Tensor:
    """Relative 1e-6 for r = |mean|/sigma <= 100, 1e-5 up to 1e3, and 1e-4 above: centred sums lose digits slowly with
    r.

    In addition the square of the mean's error, which is the whole error of a constant channel.
    """
    r = mean.abs() / var.sqrt()
    relative = torch.where(r <= 100, 1e-6, torch.where(r <= 1e3, 1e-5, 1e-4))
    return _unit(dtype) * relative * var + mean_bound(mean, torch.zeros_like(var), dtype).square()


def invstd_bound(mean: Tensor, var: Tensor, dtype: torch.dtype, eps: float = EPS) -> Tensor:
    """Half the relative error of var + eps, and the rounding of the sum, the root and the quotient."""
    invstd = torch.rsqrt(var + eps)
    return invstd * (0.5 * var_bound(mean, var, dtype) / (var + eps) + _unit(dtype) * 2 * EPS32)


def running_bound(batch_bound: Tensor, old: Tensor, batch: Tensor, momentum: float, new: torch.dtype) -> Tensor:
    """The error of the batch times momentum, a few roundings of the update, and the rounding to the stored dtype."""
    roundings = _unit(new) * 4 * EPS32 * (old.abs() + batch.abs())
    return stored(momentum * batch_bound + roundings, (1 - momentum) * old + momentum * batch, new)


def shift_bound(mean: Tensor, invstd: Tensor, dtype: torch.dtype) -> Tensor:
    """4 eps32 r: the shift of xhat that results from a mean in float32."""
    return _unit(dtype) * 4 * EPS32 * mean.abs() * invstd


def y_bound(z: Tensor, dtype: torch.dtype, weight: Tensor | float = 1.0, shift: Tensor | float = 0.0) -> Tensor:
    """1e-5 of the largest |z| in the channel, with z before the activation, and one rounding to ``dtype``.

    For r over 100 |weight| * 4 eps32 r is added for the shift. ``weight`` and ``shift`` (:func:`shift_bound`) broadcast
    against z. A shift of 0 means that the statistics are arguments.
    """
    shift = torch.as_tensor(shift, dtype=torch.float64)
    large = shift.where(shift > _unit(dtype) * 4 * EPS32 * 100, torch.zeros_like(shift))
    bound = _unit(dtype) * 1e-5 * _largest(z) + large * abs(weight)
    return stored(bound, z, dtype)


def sums_bound(g: Tensor, xhat: Tensor, dtype: torch.dtype, shift: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
    """The bounds of sum g and sum g * xhat: 2e-6 of the sum of absolute terms, because the sums themselves cancel.

    A shift of xhat in the whole channel changes sum g * xhat by shift * sum g.
    """
    terms = _unit(dtype) * 2e-6
    of_dy = terms * per_channel(torch.sum, g.abs())
    of_xhat = terms * per_channel(torch.sum, (g * xhat).abs()) + shift * per_channel(torch.sum, g).abs()
    return of_dy.flatten(), of_xhat.flatten()


def dx_bound(
    dx: Tensor,
    g: Tensor,
    xhat: Tensor,
    scale: Tensor,
    dtype: torch.dtype,
    training: bool,
    shift: Tensor | float = 0.0,
) -> Tensor:
    """1e-5 of the largest |dx| in the channel, and one rounding to ``dtype``. ``scale`` is weight * invstd.

    For few values per channel dx = scale * (g - sum g / M - xhat * sum g xhat / M) cancels. Then the bound is 16 eps32
    of the largest term, because xhat has the errors of mean and invstd (1e-6 + 5e-7) and occurs twice. For large r the
    shift of xhat counts in both places.
    """
    terms, moved = _largest(g), 0.0
    if training:
        sum_dy, sum_dy_xhat = per_channel(torch.mean, g).abs(), per_channel(torch.mean, g * xhat).abs()
        terms = terms + sum_dy + _largest(xhat) * sum_dy_xhat
        moved = shift * (sum_dy_xhat + _largest(xhat) * sum_dy)
    bound = _unit(dtype) * (1e-5 * _largest(dx) + 16 * EPS32 * abs(scale) * terms) + abs(scale) * moved
    return stored(bound, dx, dtype)


def _largest(t: Tensor) -> Tensor:
    """The largest finite |t| of each channel."""
    return per_channel(torch.amax, t.abs().where(t.isfinite(), 0.0))


def assert_close(actual: Tensor, truth: Tensor, bound: Tensor | float, label: str) -> None:
    """Every element is within its bound. NaN must be NaN, and Inf the same Inf."""
    actual = actual.detach().cpu().double()
    assert actual.shape == truth.shape, f"{label}: shape {list(actual.shape)}, expected {list(truth.shape)}"
    error = (actual - truth).abs()
    same = (actual == truth) | (actual.isnan() & truth.isnan())
    good = same | (truth.isfinite() & (error <= bound))
    if not good.all():
        bound = torch.as_tensor(bound, dtype=torch.float64).expand(truth.shape)
        index = tuple((~good).nonzero()[0].tolist())
        raise AssertionError(
            f"{label}: {int((~good).sum())} of {good.numel()} off; first at {index}: got {actual[index].item()!r}, "
            f"truth {truth[index].item()!r}, error {error[index].item():.3g}, allowed {bound[index].item():.3g}"
        )


def assert_mask_agrees(y: Tensor, z: Tensor, bound: Tensor) -> None:
    """The mask of y agrees with the sign of z in float64, except near zero, where rounding may decide.

    "Near zero" means within ``bound``, and must be rare: 0.1 % of the elements, or 1 % if the bound there is above 1e-3
    (large r). Two elements are allowed in a tiny case.
    """
    unsure = z.abs() <= bound
    assert torch.equal(passed(y.cpu())[~unsure], passed(z)[~unsure])
    rare = 1e-2 if (unsure & (bound > 1e-3)).any() else 1e-3
    assert unsure.sum() <= max(2, rare * z.numel()), f"{int(unsure.sum())} of {z.numel()} elements too near zero"


# ------------------------------------------------------------------------------------------- ways to call

MOMENTUM = 0.3
FUSED = pytest.mark.parametrize(
    ("act", "with_residual"),
    [(None, False), ("relu", False), (None, True), ("relu", True)],
    ids=["plain", "relu", "add", "add_relu"],
)
MODES = pytest.mark.parametrize("mode", ["training", "untracked", "eval"])


def leaf(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.detach().requires_grad_()


def running_of(p: Problem) -> tuple[Tensor, Tensor]:
    """Initial running statistics: close to those of the batch, in the dtype of the parameters."""
    return p.mean.to(p.weight.dtype), (p.invstd**-2).to(p.weight.dtype)


def bits(t: Tensor) -> Tensor:
    """The bytes of t: NaN equals itself, and -0 differs from 0."""
    return t.detach().contiguous().view(torch.uint8)
