"""Quantities per channel that the kernels of a norm layer record. They need no additional read of a tensor."""

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

import bnkern.nn
from bnkern.backends import records

from .base import Arrays, Quantity, RecorderProtocol, ratio


class _ChannelQuantity(Quantity):
    """One record of the kernels of a norm layer, with the rows of ``bnkern.backends.records``: [rows, C]."""

    record: ClassVar[str]  # the name of the field of Records

    def concerns(self, module: nn.Module) -> bool:
        return isinstance(module, (nn.modules.batchnorm._NormBase, bnkern.nn.Activation))

    def refuses(self, module: nn.Module) -> str | None:
        if not hasattr(module, "taps"):
            return f"{type(module).__name__} is not one of bnkern.nn's norm layers"
        return None

    def attach(self, recorder: RecorderProtocol, layer: str, module: nn.Module) -> list:
        if isinstance(module, nn.modules.batchnorm._NormBase):  # an Activation's channels are not known yet
            device = next((t.device for t in (*module.parameters(), *module.buffers())), torch.device("cpu"))
            recorder.reserve(self, layer, (module.num_features,), device)
        return [recorder.tap(layer, module, self)]


class ActivationMoments(_ChannelQuantity):
    """``activation_moments``: moments of a norm layer's input x (the convolution's output), and the active share of y.

    Per channel over the M = N * S values: ``count`` M, ``mean``, ``var`` = sum (x - mean)^2 / M, ``third`` and
    ``fourth`` central moments sum (x - mean)^k / M, ``min``, ``max``, ``abs_max`` (NaN ignored), ``nonfinite``, the
    number of x that are infinite or NaN, and ``active_fraction``, the share of y > 0 after residual and activation.
    Unit: that of x.

    Recorded by ``moments`` and ``normalize``. Ranks are merged by the pairwise formulas of Chan et al. 1979 and Pebay
    2008.
    Source: the paper, Figures 4 and 5.
    """

    name = "activation_moments"
    record = "activation"
    rows = records.ACTIVATION

    @staticmethod
    def oracle(x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Returns the derived arrays [C] for x and y [N, C, ...]."""
        x, y = (t.detach().double().movedim(1, 0).flatten(1) for t in (x, y))
        mean = x.mean(1)
        delta = x - mean[:, None]
        return {
            "count": torch.full_like(mean, x.shape[1]),
            "mean": mean,
            "var": delta.pow(2).mean(1),
            "third": delta.pow(3).mean(1),
            "fourth": delta.pow(4).mean(1),
            "min": x.amin(1),
            "max": x.amax(1),
            "abs_max": x.abs().amax(1),
            "nonfinite": (~x.isfinite()).double().sum(1),
            "active_fraction": (y > 0).double().mean(1),
        }

    def merge(self, ranks: np.ndarray) -> np.ndarray:
        total = ranks[0]
        for part in ranks[1:]:
            total = _merged_moments(total, part)
        return total

    def derive(self, values: np.ndarray) -> Arrays:
        raw = super().derive(values)
        count = np.maximum(raw["count"], 1)
        return {
            "count": raw["count"],
            "mean": raw["mean"],
            "var": raw["m2"] / count,
            "third": raw["m3"] / count,
            "fourth": raw["m4"] / count,
            "min": raw["min"],
            "max": raw["max"],
            "abs_max": np.maximum(-raw["min"], raw["max"]),
            "nonfinite": raw["nonfinite"],
            "active_fraction": raw["active"] / count,
        }


class GradientChannelSigns(_ChannelQuantity):
    """``gradient_channel_signs``: the gradient dL/dx at the input of a norm layer (the convolution's output).

    Per channel: ``count``, ``sum``, ``abs_sum``, ``square_sum``, the numbers of values that are ``positive``,
    ``negative``, ``zero`` (NaN is none of them) and ``nonfinite`` (infinite or NaN), and ``ratio`` = |sum| / abs_sum
    (NaN where abs_sum is 0). In training a batch norm makes the sum zero except for rounding. Unit: loss per unit of x.

    Recorded by ``grad_input``. Nothing is recorded if x needs no gradient. Ranks are added.
    Source: the paper, section 3.2 and equation 4, here for the summands over batch and pixels of one channel.
    """

    name = "gradient_channel_signs"
    record = "gradient"
    rows = records.GRADIENT

    @staticmethod
    def oracle(dx: Tensor) -> dict[str, Tensor]:
        """Returns the derived arrays [C] for dx [N, C, ...]."""
        dx = dx.detach().double().movedim(1, 0).flatten(1)
        total, absolute = dx.sum(1), dx.abs().sum(1)
        return {
            "count": torch.full_like(total, dx.shape[1]),
            "sum": total,
            "abs_sum": absolute,
            "square_sum": dx.pow(2).sum(1),
            "positive": (dx > 0).sum(1).double(),
            "negative": (dx < 0).sum(1).double(),
            "zero": (dx == 0).sum(1).double(),
            "nonfinite": (~dx.isfinite()).sum(1).double(),
            "ratio": total.abs() / absolute,
        }

    def derive(self, values: np.ndarray) -> Arrays:
        raw = super().derive(values)
        return raw | {"ratio": ratio(np.abs(raw["sum"]), raw["abs_sum"])}


class AffineGradientSigns(_ChannelQuantity):
    """``affine_gradient_signs``: whether the summands of the gradients of a norm layer's bias and weight agree in sign.

    The gradient of the bias is the sum of g over batch and pixels, and that of the weight is the sum of g * xhat, where
    g is the gradient after the mask of the activation. For each: ``sum`` (the gradient), ``abs_sum``, ``sign_sum`` and
    ``nonzero``, with the prefix ``bias_`` or ``weight_``, and the ``ratio`` |sum| / abs_sum. Unit: that of the loss.

    Recorded by ``grad_sums``. Ranks are added. Source: equation 4 of the paper, for the affine parameters.
    """

    name = "affine_gradient_signs"
    record = "affine"
    rows = records.AFFINE

    def concerns(self, module: nn.Module) -> bool:
        return isinstance(module, nn.modules.batchnorm._NormBase)

    @staticmethod
    def oracle(g: Tensor, xhat: Tensor) -> dict[str, Tensor]:
        """Returns the derived arrays [C] for the masked gradient and the normalised input [N, C, ...]."""
        arrays: dict[str, Tensor] = {}
        for name, d in (("bias", g), ("weight", g * xhat)):
            d = d.detach().double().movedim(1, 0).flatten(1)
            arrays |= {
                f"{name}_sum": d.sum(1),
                f"{name}_abs_sum": d.abs().sum(1),
                f"{name}_sign_sum": d.sign().sum(1),
                f"{name}_nonzero": (d != 0).sum(1).double(),
                f"{name}_ratio": d.sum(1).abs() / d.abs().sum(1),
            }
        return arrays

    def derive(self, values: np.ndarray) -> Arrays:
        raw = super().derive(values)
        ratios = {
            f"{parameter}_ratio": ratio(np.abs(raw[f"{parameter}_sum"]), raw[f"{parameter}_abs_sum"])
            for parameter in ("bias", "weight")
        }
        return raw | ratios


class NormGradientNoise(_ChannelQuantity):
    """``norm_gradient_noise``: the noise over the samples in the gradients of a norm layer's bias and weight.

    For a loss that is the mean over the N samples of a batch, let c_n be the contribution of sample n to the gradient
    of a parameter: the sum of g (bias) or of g * xhat (weight) over the positions of the sample. The gradient is
    G = sum c_n, the mean of h_n = N c_n. For each parameter, with the prefix ``bias_`` or ``weight_``, per channel:

        noise   = sum (h_n - G)^2 / (N - 1)     the variance of one sample's contribution, scaled to the whole gradient
        square  = G^2 - noise / N               the square of the expected gradient, without bias
        sum     = G

    and ``samples`` = N, and for the layer, over both parameters and all channels, ``noise``, ``square`` and the simple
    noise scale ``scale`` = noise / square. For several layers add up their ``noise`` and ``square``, and average both
    over steps before you divide them. ``square`` may be negative. A batch of one sample has noise NaN.

    Batch norm couples the samples, so h_n is a sample's contribution to the gradient of this batch. It is not the
    gradient of an independent loss: the statistics in xhat, and g by all later norm layers, depend on the whole batch.
    The contributions to one gradient cancel in part. With batch norm noise was 2 to 9 times the variance that separate
    batches show, and square was negative, so the scale is not the noise scale of the gradient. Without normalisation
    the two agree (experiment ``norm_noise``).
    A loss that is a sum over the samples multiplies noise and square by N^2 and leaves the scale.

    Recorded by ``grad_sums``. On a GPU it takes one more pass over the gradient and the input. Ranks are merged as the
    samples of one batch, and G is the sum of their gradients, as for the other quantities. If each rank's loss is the
    mean over its own samples, noise and square are multiplied by the square of the number of ranks.
    Source: McCandlish et al. 2018, appendix A; for layer norm, Gray et al. 2024 (arXiv 2411.00999); equation 2 of the
    paper.
    """

    name = "norm_gradient_noise"
    record = "samples"
    rows = records.SAMPLES

    def concerns(self, module: nn.Module) -> bool:
        return isinstance(module, nn.modules.batchnorm._NormBase)

    @staticmethod
    def oracle(g: Tensor, xhat: Tensor) -> dict[str, Tensor]:
        """Returns the derived arrays for the masked gradient and the normalised input [N, C, ...]."""
        count = len(g)
        arrays: dict[str, Tensor] = {"samples": g.new_full((g.shape[1],), count, dtype=torch.float64)}
        for name, d in (("bias", g), ("weight", g * xhat)):
            h = count * d.detach().double().flatten(2).sum(2) if d.dim() > 2 else count * d.detach().double()
            arrays[f"{name}_sum"] = h.mean(0)
            arrays[f"{name}_noise"] = h.var(0)
            arrays[f"{name}_square"] = h.mean(0).square() - h.var(0) / count
        for name in ("noise", "square"):
            arrays[name] = (arrays[f"bias_{name}"] + arrays[f"weight_{name}"]).sum()
        return arrays | {"scale": arrays["noise"] / arrays["square"]}

    def merge(self, ranks: np.ndarray) -> np.ndarray:
        samples = ranks[:, :, :1]  # [ranks, steps, 1, C]
        total = samples.sum(0)
        merged = ranks.sum(0)
        distance = ranks[:, :, 1::2] / np.maximum(samples, 1) - merged[:, 1::2] / np.maximum(total, 1)
        merged[:, 2::2] += (samples * distance**2).sum(0)
        return merged

    def derive(self, values: np.ndarray) -> Arrays:
        raw = super().derive(values)
        samples = raw["samples"]
        arrays: Arrays = {"samples": samples}
        for name in ("bias", "weight"):
            noise = ratio(samples**2 * raw[f"{name}_m2"], samples - 1)
            arrays[f"{name}_sum"], arrays[f"{name}_noise"] = raw[f"{name}_sum"], noise
            arrays[f"{name}_square"] = raw[f"{name}_sum"] ** 2 - ratio(noise, samples)
        for name in ("noise", "square"):
            arrays[name] = (arrays[f"bias_{name}"] + arrays[f"weight_{name}"]).sum(-1)
        return arrays | {"scale": ratio(arrays["noise"], arrays["square"])}


def _merged_moments(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Merges two records.ACTIVATION [steps, 9, C] (Chan et al. 1979; Pebay 2008, equations 2.1, 3.1)."""
    (na, ma, a2, a3, a4, amin, amax, anon, aact), (nb, mb, b2, b3, b4, bmin, bmax, bnon, bact) = (
        np.moveaxis(t, 1, 0) for t in (a, b)
    )
    n = na + nb
    whole = np.maximum(n, 1)
    delta = mb - ma
    share = delta / whole
    mean = ma + nb * share
    m2 = a2 + b2 + na * nb * share * delta
    m3 = a3 + b3 + na * nb * (na - nb) * delta * share**2 + 3 * share * (na * b2 - nb * a2)
    m4 = (
        a4
        + b4
        + na * nb * (na**2 - na * nb + nb**2) * delta * share**3
        + 6 * share**2 * (na**2 * b2 + nb**2 * a2)
        + 4 * share * (na * b3 - nb * a3)
    )
    rows = [n, mean, m2, m3, m4, np.minimum(amin, bmin), np.maximum(amax, bmax), anon + bnon, aact + bact]
    return np.stack(rows, 1)
