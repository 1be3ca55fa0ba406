"""Checks of records, for any backend. A check takes a backend module and the tensors of one call.

A check makes each call without records and with them, and requires the same bits of every result. Then it compares the
records with the reference's, which are computed in float64 from what the call read and wrote.
"""

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from bnkern import backends
from bnkern.backends import records, reference
from bnkern.backends.calls import BackwardCall, ForwardCall
from tests.support.cases import (
    CASE,
    EPS,
    FP32,
    LAYOUTS,
    Precision,
    Problem,
    Target,
    assert_close,
    by_channel,
    exact,
    mean_bound,
    passed,
    sums_bound,
    var_bound,
)

MODES = ("training", "eval", "identity")
ACTS = (None, "relu", "saved mask")


class Call(NamedTuple):
    """A forward call: its normalisation, and its activation ("saved mask" is a residual before the ReLU)."""

    mode: str
    act: str | None

    @property
    def training(self) -> bool:
        return self.mode == "training"

    def residual(self, p: Problem) -> Tensor | None:
        return p.residual if self.act == "saved mask" else None

    def relu(self) -> str | None:
        return self.act and "relu"

    def forward(self, kernels: ModuleType, p: Problem, record: Tensor | None = None) -> list[Tensor | None]:
        """y, mean, invstd, mask and the running statistics after the call."""
        running = [None, None]
        if self.training:
            running = [torch.zeros_like(p.weight), torch.ones_like(p.weight)]
        elif self.mode == "eval":
            running = [p.mean.clone(), p.invstd.square().reciprocal()]
        weight, bias = (None, None) if self.mode == "identity" else (p.weight, p.bias)
        tail = (None, self.training, 0.1, EPS, self.relu(), True)
        return [
            *kernels.forward(ForwardCall(p.x, weight, bias, self.residual(p), *running, *tail, record)),
            *running,
        ]

    def needs(self, p: Problem) -> tuple[bool, bool, bool, bool]:
        parameters = self.mode != "identity"
        return (True, parameters, parameters, self.residual(p) is not None)

    def backward(
        self,
        kernels: ModuleType,
        p: Problem,
        saved: list[Tensor | None],
        needs: tuple[bool, bool, bool, bool],
        **wanted: Tensor,
    ) -> list[Tensor | None]:
        mean, invstd, mask = saved
        weight, bias = (None, None) if self.mode == "identity" else (p.weight, p.bias)
        arguments = (p.dy, p.x, weight, bias, mean, invstd, mask, self.relu(), self.training, needs)
        return list(kernels.backward(BackwardCall(*arguments, **wanted)))


def empty_record(rows: tuple[str, ...], x: Tensor) -> Tensor:
    """A record filled with a number that no result has, so that entries that were not written are detected."""
    return torch.full((len(rows), x.shape[1]), -12345.678, dtype=torch.float64, device=x.device)


def assert_same_bits(first: list[Tensor | None], second: list[Tensor | None], what: str) -> None:
    for k, (a, b) in enumerate(zip(first, second, strict=True)):
        assert (a is None) == (b is None), f"{what}: result {k}"
        if a is not None:
            assert a.stride() == b.stride(), f"{what}: strides of result {k}"
            # The sign and payload of a NaN are not specified.
            a, b = (t.where(~t.isnan(), torch.nan).contiguous().view(torch.uint8) for t in (a, b))
            assert torch.equal(a, b), f"{what}: result {k} has other bits"


def check_forward(kernels: ModuleType, p: Problem, call: Call, shift: float = 0.0) -> None:
    """Checks the activation record, and that it changes no result. ``shift``: see ``power_bound``."""
    record = empty_record(records.ACTIVATION, p.x)
    recorded = call.forward(kernels, p, record)
    assert_same_bits(call.forward(kernels, p), recorded, "forward")
    x, y = exact(p.x, recorded[0])
    assert_activation(record, x, y, p.x.dtype, shift)


def check_backward(kernels: ModuleType, p: Problem, call: Call, samples: bool = True) -> None:
    """Checks the records of the backward, each alone and all, and that they change no result.

    ``samples``: whether the kernels compute the record of the samples.
    """
    y, *saved = call.forward(kernels, p)[:4]
    needs = call.needs(p)
    plain = call.backward(kernels, p, saved, needs)
    rows = {"record_gradient": records.GRADIENT, "record_affine": records.AFFINE, "record_samples": records.SAMPLES}
    if not samples:
        del rows["record_samples"]
    for names in (*([name] for name in rows), list(rows)):
        wanted = {name: empty_record(rows[name], p.x) for name in names}
        recorded = call.backward(kernels, p, saved, needs, **wanted)
        assert_same_bits(plain, recorded, " and ".join(names))
        if "record_gradient" in wanted:
            assert_gradient(wanted["record_gradient"], recorded[0])
        if "record_affine" in wanted and saved[0] is None:
            untouched = empty_record(records.AFFINE, p.x)
            assert torch.equal(wanted["record_affine"], untouched), (
                "without normalisation there are no affine parameters to record"
            )
        elif "record_affine" in wanted:
            assert_affine(wanted["record_affine"], p, saved[0], saved[1], y, call.relu())
        if "record_samples" in wanted and saved[0] is None:
            assert torch.equal(wanted["record_samples"], empty_record(records.SAMPLES, p.x))
        elif "record_samples" in wanted:
            assert_samples(wanted["record_samples"], p, saved[0], saved[1], y, call.relu())


# ------------------------------------------------------------------------------------------------ the records


def _rows(names: tuple[str, ...], record: Tensor) -> dict[str, Tensor]:
    return dict(zip(names, record.cpu(), strict=True))


def _assert_exact(got: dict[str, Tensor], truth: dict[str, Tensor], names: tuple[str, ...]) -> None:
    for name in names:
        assert torch.equal(got[name], truth[name]), f"{name}: got {got[name].tolist()}, truth {truth[name].tolist()}"


def power_bound(k: int, deltas: Tensor, mean: Tensor, var: Tensor, dtype: torch.dtype, shift: float = 0.0) -> Tensor:
    """The bound of sum delta^k, for deltas [C, M] = |x - mean|.

    It is the sum of k/2 times the relative error of a variance of centred values, because each factor has that error;
    the k-th power of the mean's error, which is the whole error of a constant channel; and k |delta|^(k-1) times the
    float64 rounding of our mean and of the truth's.
    """
    centred = torch.zeros_like(mean)
    relative = (var_bound(centred, var, dtype) / var).nan_to_num()
    constant = deltas.shape[1] * mean_bound(mean, centred, dtype) ** k
    rounding = k * 2 * torch.finfo(torch.float64).eps * mean.abs() * (deltas ** (k - 1)).sum(1)
    bound = k / 2 * relative * (deltas**k).sum(1) + constant + rounding
    if shift:
        farther = deltas + shift * var.sqrt()[:, None]
        bound += k * shift * var.sqrt() * (k - 1) / 2 * relative * (farther ** (k - 1)).sum(1)
    return bound


def assert_activation(record: Tensor, x: Tensor, y: Tensor, dtype: torch.dtype, shift: float = 0.0) -> None:
    """Compares with x and y in float64, which were rounded to ``dtype`` before. ``shift``: see ``power_bound``."""
    got = _rows(records.ACTIVATION, record)
    truth = _rows(records.ACTIVATION, reference.activation(x, y))
    _assert_exact(got, truth, ("count", "min", "max", "nonfinite", "active"))
    count = max(truth["count"].max().item(), 1.0)
    lost = ~truth["m2"].isfinite()
    for name in ("mean", "m2", "m3", "m4"):
        assert not got[name][lost].isfinite().any(), f"{name}: finite in a channel with Inf or NaN"
    mean, var = truth["mean"][~lost], truth["m2"][~lost] / count
    assert_close(got["mean"][~lost], mean, mean_bound(mean, var, dtype), "mean")
    assert_close(got["m2"][~lost] / count, var, var_bound(mean, var, dtype), "m2 / count")
    deltas = (x - by_channel(truth["mean"], x)).abs().transpose(0, 1).flatten(1)[~lost]
    for k in (3, 4):
        bound = power_bound(k, deltas, mean, var, dtype, shift)
        assert_close(got[f"m{k}"][~lost], truth[f"m{k}"][~lost], bound, f"m{k}")


def assert_gradient(record: Tensor, dx: Tensor) -> None:
    """Compares the record with the stored dx."""
    (wide,) = exact(dx)
    got, truth = _rows(records.GRADIENT, record), _rows(records.GRADIENT, reference.gradient(wide))
    _assert_exact(got, truth, ("count", "positive", "negative", "zero", "nonfinite"))
    of_sum, of_square = sums_bound(wide, wide, dx.dtype)  # the same bounds as for the phase grad_sums
    for name, bound in (("sum", of_sum), ("abs_sum", of_sum), ("square_sum", of_square)):
        assert_close(got[name], truth[name], bound, name)


def assert_affine(record: Tensor, p: Problem, mean: Tensor, invstd: Tensor, y: Tensor, relu: str | None) -> None:
    """Compares with the summands in the accumulator's dtype, computed with the mean and invstd of the call.

    The mask of the ReLU is taken from its output, because float64 could differ near zero.
    """
    dy, x, mean, invstd = (t.detach().cpu() for t in (p.dy, p.x, mean, invstd))
    g = dy.where(passed(y).cpu(), 0.0) if relu else dy
    got = _rows(records.AFFINE, record)
    truth = _rows(records.AFFINE, reference.affine(BackwardCall(g, x, mean=mean, invstd=invstd)))
    _assert_exact(got, truth, tuple(f"{d}_{what}" for d in ("bias", "weight") for what in ("sign_sum", "nonzero")))
    xhat = (x.to(mean.dtype) - by_channel(mean, x)) * by_channel(invstd, x)
    for d, bound in zip(("bias", "weight"), sums_bound(*exact(g, xhat), x.dtype), strict=True):
        for what in ("sum", "abs_sum"):
            assert_close(got[f"{d}_{what}"], truth[f"{d}_{what}"], bound, f"{d}_{what}")


def assert_samples(record: Tensor, p: Problem, mean: Tensor, invstd: Tensor, y: Tensor, relu: str | None) -> None:
    """Compares with float64 sums of each sample. The sums of a sample have the errors of the phase grad_sums.

    The largest error of the sum of squared distances is that of each sample's sum, twice its distance, plus its square.
    """
    dy, x, mean, invstd = (t.detach().cpu() for t in (p.dy, p.x, mean, invstd))
    g = dy.where(passed(y).cpu(), 0.0) if relu else dy
    got = _rows(records.SAMPLES, record)
    truth = _rows(records.SAMPLES, reference.samples(BackwardCall(g, x, mean=mean, invstd=invstd)))
    _assert_exact(got, truth, ("samples",))
    xhat = (x.to(mean.dtype) - by_channel(mean, x)) * by_channel(invstd, x)
    wide, wide_xhat = exact(g, xhat)
    for k, d in enumerate((wide, wide * wide_xhat)):
        lost = ~truth[f"{('bias', 'weight')[k]}_sum"].isfinite()
        name = ("bias", "weight")[k]
        assert not got[f"{name}_sum"][lost].isfinite().any() and not got[f"{name}_m2"][lost].isfinite().any()
        samples = d.flatten(2).sum(2) if d.dim() > 2 else d  # [N, C]
        bounds = [
            sums_bound(wide[n : n + 1], wide_xhat[n : n + 1], x.dtype)[k] for n in range(len(x))
        ]  # of each sample's sum
        bound = torch.stack(bounds) if bounds else samples
        distance = (samples - samples.mean(0)).abs() if len(samples) else samples
        of_sum, of_m2 = bound.sum(0), (2 * distance * bound + bound**2).sum(0) + 1e-12 * distance.square().sum(0)
        assert_close(got[f"{name}_sum"][~lost], truth[f"{name}_sum"][~lost], of_sum[~lost], f"{name}_sum")
        assert_close(got[f"{name}_m2"][~lost], truth[f"{name}_m2"][~lost], of_m2[~lost], f"{name}_m2")


# ------------------------------------------------------------------------------------- checks of a backend


def _kernels(target: Target, dtype: torch.dtype) -> ModuleType:
    return backends.choose(target.backend, target.device, dtype)


def check_special_values(target: Target, precision: Precision, layout: str, samples: bool = True) -> None:
    """Each sign, both zeros, infinities and NaN, in vectors and in tails. Eval mode and identity keep them distinct."""
    for c in (7, 8):  # rows are read one element at a time, and by octets
        _check_special_values(target, precision, layout, c, samples)


def _check_special_values(target: Target, precision: Precision, layout: str, c: int, samples: bool) -> None:
    values = torch.tensor([0.0, -0.0, 1.5, -2.5, torch.inf, -torch.inf, torch.nan], dtype=precision.dtype)
    generator = torch.Generator().manual_seed(7)
    place = LAYOUTS[layout]

    def mixture() -> torch.Tensor:
        chosen = values[torch.randint(len(values), (3, c, 7, 9), generator=generator)]
        chosen[:, 1] = torch.nan  # a channel in which every value is NaN
        chosen[:, 2] = 0.0
        chosen[:, 3] = torch.where(chosen[:, 3] > 0, torch.inf, -torch.inf)
        chosen[:, 4] = 1.5
        chosen[-1, 4, -1, -1] = torch.inf
        return place(chosen).to(target.device)

    ones = torch.ones(c, dtype=precision.params, device=target.device)
    statistics = ones.to(reference.accumulator(precision.dtype))
    p = Problem(mixture(), ones, 0 * ones, mixture(), mixture(), 0 * statistics, statistics)
    for mode in ("eval", "identity"):
        for act in ACTS:
            check_forward(_kernels(target, p.x.dtype), p, Call(mode, act))
            check_backward(_kernels(target, p.x.dtype), p, Call(mode, act), samples)


def check_values_as_stored(target: Target, precision: Precision) -> None:
    """Entries of dx and y that round to zero count as zero in the record."""
    tiny = torch.finfo(precision.dtype).smallest_normal * torch.finfo(precision.dtype).eps
    x = torch.ones(4, 3, 5, 5, dtype=precision.dtype, device=target.device)
    weight = torch.full((3,), 0.25, device=target.device)
    record, record_gradient = empty_record(records.ACTIVATION, x), empty_record(records.GRADIENT, x)
    module = _kernels(target, x.dtype)
    settings = (None, None, None, None, None, False, 0.1, EPS, None, False)
    y = module.forward(ForwardCall(x * tiny, weight, *settings, record=record))[0]
    needs = (True, False, False, False)
    dx, *_ = module.backward(
        BackwardCall(x * tiny, x, weight, None, None, None, None, None, False, needs, record_gradient=record_gradient)
    )
    assert (y == 0).all() and (dx == 0).all(), "the stored values should be zero"
    assert record[records.ACTIVATION.index("active")].tolist() == [0.0] * 3
    assert record_gradient[records.GRADIENT.index("zero")].tolist() == [100.0] * 3


def check_empty(target: Target, shape: tuple[int, ...], mode: str) -> None:
    x = torch.empty(shape, device=target.device)
    vector = torch.ones(3, device=target.device)
    p, call = Problem(x, vector, vector, x, x, vector, vector), Call(mode, "relu")
    record, gradient, affine = (empty_record(r, x) for r in (records.ACTIVATION, records.GRADIENT, records.AFFINE))
    _, *saved = call.forward(_kernels(target, x.dtype), p, record)[:4]
    expected = torch.zeros(len(records.ACTIVATION), 3, dtype=torch.float64)
    expected[5], expected[6] = torch.inf, -torch.inf
    assert torch.equal(record.cpu(), expected)
    samples = empty_record(records.SAMPLES, x)
    wanted = {"record_gradient": gradient, "record_affine": affine, "record_samples": samples}
    call.backward(_kernels(target, x.dtype), p, saved, call.needs(p), **wanted)
    assert not gradient.any()
    assert mode == "identity" or ((samples[0] == shape[0]).all() and not samples[1:].any())
    assert not affine.any() or mode == "identity"


def check_frozen_parameters(target: Target, mode: str) -> None:
    """The affine record does not depend on which gradients are required, even if none is."""
    p, call = CASE["nhwc_c5_s49"].problem(FP32, target.device), Call(mode, "relu")
    module = _kernels(target, p.x.dtype)
    _, *saved = call.forward(module, p)[:4]
    recorded = []
    for needs in (call.needs(p), (True, False, False, False), (False,) * 4):
        affine, gradient = empty_record(records.AFFINE, p.x), empty_record(records.GRADIENT, p.x)
        dx, *_ = call.backward(module, p, saved, needs, record_affine=affine, record_gradient=gradient)
        untouched = torch.equal(gradient, empty_record(records.GRADIENT, p.x))
        assert untouched == (dx is None), "the gradient record is written only if dx is computed"
        recorded.append(affine)
    assert torch.equal(recorded[0], recorded[1]) and torch.equal(recorded[0], recorded[2])
