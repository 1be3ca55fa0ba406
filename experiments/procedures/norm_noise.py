"""The noise of the gradient during training: of the whole network, and as the norm layers see it."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import nn

from bnkern.probes import load, record
from bnkern.probes.quantities.noise import GradientNoiseScale
from bnkern.train.cifar10 import Cifar10

from . import Arrays, Tick, training

KINDS = ("network", "norms", "samples")


def measure(config: dict, data: Cifar10, device: torch.device, folder: Path, tick: Tick) -> dict[str, Arrays]:
    """The results of a training run, as of the procedure training, with :class:`NormNoise` as its noise."""
    return training.measure(config, data, device, folder, tick, NormNoise)


class NormNoise(training.Noise):
    """Measures tr Sigma of a single image and the squared gradient |G|^2, on the same parts, in three ways (KINDS).

    "network" and "norms" compare the gradients of the parts, of all parameters and of those of the norm layers, by the
    formulas of ``gradient_noise_scale``. "samples" adds up ``norm_gradient_noise`` over the norm layers and averages it
    over the parts: it compares the contributions of the samples within a part. With batch norm these are no gradients
    of independent samples.
    """

    def record(self, network: nn.Module, step: int) -> dict[str, np.ndarray]:
        norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
        chosen = {"network": list(network.parameters()), "norms": [p for norm in norms for p in norm.parameters()]}
        parts: dict[str, list[torch.Tensor]] = {kind: [] for kind in chosen}
        with TemporaryDirectory() as out:
            with record(network, ["norm_gradient_noise"], out=out) as recording:
                for loss in self.losses(network, step):
                    loss.backward()
                    recording.step()
                    for kind, parameters in chosen.items():
                        parts[kind].append(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]))
                    network.zero_grad()
            layers = load(out)["norm_gradient_noise"].values()
        found: dict[str, Any] = {}
        for kind, gradients in parts.items():
            estimate = GradientNoiseScale.oracle(gradients, part=self.config.batch)
            found |= {f"{name} {kind}": estimate[name] for name in ("noise", "square")}
        for name in ("noise", "square"):
            found[f"{name} samples"] = sum(layer[name].mean() for layer in layers)
        return {name: np.asarray(value, float) for name, value in found.items()}

    def arrays(self, steps: int) -> Arrays:
        """For each measurement ``step``, and ``noise``, ``square`` and ``scale`` of each kind; and numbers of the run.

        The scale is noise / square, or infinite where the estimate of the square is not positive. The numbers are

            rank correlation            of the scales "samples" and "network" over the measurements
            rank correlation of norms   the same of "norms" and "network"
            departure                   the largest factor between the ratio of "samples" to "network" and its median
            noise, samples / norms      the geometric mean of the ratio of the noises
            scale, samples / norms      the median of the ratio of the scales
        """
        rows = self.measured(steps)
        found: dict[str, Any] = {name: np.array([row[name].item() for row in rows]) for name in rows[0]}
        for kind in KINDS:
            found[f"scale {kind}"] = scale_of(found[f"noise {kind}"], found[f"square {kind}"])
        samples, norms, network = (found[f"scale {kind}"] for kind in ("samples", "norms", "network"))
        noises = found["noise samples"] / found["noise norms"]
        with np.errstate(invalid="ignore"):
            found |= {
                "rank correlation": rank_correlation(samples, network),
                "rank correlation of norms": rank_correlation(norms, network),
                "departure": departure(samples / network),
                "noise, samples / norms": np.exp(np.log(noises).mean()),
                "scale, samples / norms": np.median(samples / norms),
            }
        return {name: np.asarray(value, float) for name, value in found.items()}


def scale_of(noise: np.ndarray, square: np.ndarray) -> np.ndarray:
    """noise / square, or infinity where the square is not positive: the noise then hides the gradient."""
    return np.divide(noise, square, out=np.full_like(noise, np.inf), where=square > 0)


def rank_correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's: the correlation of the ranks, where equal numbers share the mean of theirs."""
    first, second = ((t[:, None] > t).sum(1) + (t[:, None] >= t).sum(1) for t in (x, y))
    with np.errstate(invalid="ignore"):  # nan if all numbers are equal
        return float(np.corrcoef(first, second)[0, 1])


def departure(ratios: np.ndarray) -> float:
    """The largest factor between a ratio and the median ratio. Infinite or nan if a ratio is."""
    middle = np.median(ratios)
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.max(np.maximum(ratios / middle, middle / ratios)))
