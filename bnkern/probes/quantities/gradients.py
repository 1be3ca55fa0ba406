"""Gradients of outputs and parameters as autograd computes them."""

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn

from .base import Arrays, Quantity, RecorderProtocol


class OutputGradient(Quantity):
    """``output_gradient``: the whole tensor dL/dO at the output O [B, K] of a module, for example the logits.

    The array is ``gradient`` [B, K]. The first step determines B, and a smaller later batch is filled up with NaN. The
    default is the output of the model (the layer named ""). Unit: loss per unit of O. Ranks are concatenated along B.
    The gradient is read once more for it. Source: the paper, Figure 6.
    """

    name = "output_gradient"
    rows = ("gradient",)
    by_default = ""

    def concerns(self, module: nn.Module) -> bool:
        return True

    def attach(self, recorder: RecorderProtocol, layer: str, module: nn.Module) -> list:
        def measure(x: Tensor, dy: Tensor, out: Tensor, *_) -> None:
            if len(dy) > out.shape[1]:
                raise ValueError(f"output_gradient: {layer!r} had {out.shape[1]} examples at first, now {len(dy)}")
            out[0, : len(dy)].copy_(dy)

        return [recorder.on_gradient(layer, module, self, None, measure)]

    @staticmethod
    def oracle(dy: Tensor) -> dict[str, Tensor]:
        return {"gradient": dy.detach().double()}

    def merge(self, ranks: np.ndarray) -> np.ndarray:
        return np.concatenate(list(ranks), 2)


class ParameterGradientHistogram(Quantity):
    """``parameter_gradient_histogram``: the distribution of the entries of a parameter's gradient.

    The arrays are ``count``, ``mean``, ``var``, ``third`` and ``fourth`` central moments, ``min``, ``max``, and a
    ``histogram``. Its bins are evenly spaced in the logarithm of |g| on both sides of zero, eight per factor of two, so
    that the range need not be known beforehand. ``edges`` (length bins + 1) runs from -2^24 to 2^24, with a bin of
    half-width 2^-60 around zero. Values beyond are in the outermost bins. Patterns are names of parameters
    ("blocks.*.weight").

    Each gradient is read when the step closes, so call ``rec.step`` before ``zero_grad``. Unit: loss per unit of the
    parameter. Gradients are equal on all ranks after DDP, so those of rank 0 are used. Source: the paper, Figure 2.
    """

    name = "parameter_gradient_histogram"
    PER_OCTAVE, LOWEST, HIGHEST = 8, -60, 24
    SIDE = PER_OCTAVE * (HIGHEST - LOWEST)
    rows = ("count", "mean", "m2", "m3", "m4", "min", "max", *(f"bin{k}" for k in range(2 * SIDE + 1)))

    def concerns(self, module: nn.Module) -> bool:
        return next(module.parameters(recurse=False), None) is not None

    def wants(self, layer: str) -> bool:
        return True  # the patterns are those of parameters, see attach

    def attach(self, recorder: RecorderProtocol, layer: str, module: nn.Module) -> list:
        handles = []
        for name, parameter in module.named_parameters(layer, recurse=False):
            if parameter.requires_grad and super().wants(name):
                handles.append(recorder.at_step(self._measure(recorder, name, parameter)))
        return handles

    def _measure(self, recorder: RecorderProtocol, name: str, parameter: Tensor) -> Callable[[], None]:
        def measure() -> None:
            if parameter.grad is not None:
                out = recorder.slot(self, name, 0, (), parameter.device)
                _histogram(parameter.grad.detach(), out)

        return measure

    @classmethod
    def edges(cls) -> np.ndarray:
        """Returns the edges of the bins, [bins + 1]."""
        positive = 2.0 ** (np.arange(cls.SIDE + 1) / cls.PER_OCTAVE + cls.LOWEST)
        return np.concatenate([-positive[::-1], positive])

    @classmethod
    def oracle(cls, gradient: Tensor) -> dict[str, Tensor]:
        g = gradient.detach().double().flatten()
        delta = g - g.mean()
        counts, _ = np.histogram(np.clip(g.numpy(), -(2.0**cls.HIGHEST), 2.0**cls.HIGHEST), cls.edges())
        moments = {name: delta.pow(k).mean() for k, name in ((2, "var"), (3, "third"), (4, "fourth"))}
        return {
            "count": torch.tensor(float(len(g))),
            "mean": g.mean(),
            **moments,
            "min": g.amin(),
            "max": g.amax(),
            "histogram": torch.from_numpy(counts).double(),
        }

    def merge(self, ranks: np.ndarray) -> np.ndarray:
        return ranks[0]

    def derive(self, values: np.ndarray) -> Arrays:
        count, mean, m2, m3, m4, least, largest = np.moveaxis(values[:, :7], 1, 0)
        moments = {name: m / count for name, m in (("var", m2), ("third", m3), ("fourth", m4))}
        arrays = {"count": count, "mean": mean, **moments, "min": least, "max": largest}
        edges = np.broadcast_to(self.edges(), (len(values), 2 * self.SIDE + 2))
        return arrays | {"histogram": values[:, 7:], "edges": edges}


@lru_cache(maxsize=8)
def _edges(device: torch.device) -> Tensor:
    return torch.from_numpy(ParameterGradientHistogram.edges()).to(device)


def _histogram(gradient: Tensor, out: Tensor) -> None:
    """Computes moments and histogram of all entries, without waiting for the device."""
    g = gradient.double().flatten()
    mean = g.mean()
    delta = g - mean
    moments = [delta.pow(k).sum() for k in (2, 3, 4)]
    out[:7].copy_(torch.stack([torch.full_like(mean, g.numel()), mean, *moments, g.amin(), g.amax()]))
    edges, bins = _edges(g.device), len(out) - 7
    index = (torch.bucketize(g.nan_to_num(0.0), edges, right=True) - 1).clamp(0, bins - 1)  # the moments keep a NaN
    out[7:].copy_(g.new_zeros(bins).index_add_(0, index, torch.ones_like(g)))
