"""Moments of the output of any module."""

import numpy as np
import torch
from torch import Tensor, nn

import bnkern

from .base import Arrays, Quantity, RecorderProtocol


class OutputMoments(Quantity):
    """``output_moments``: ``mean`` and biased ``var`` of each channel of a module's output [N, C, ...], and ``count``.

    It is for outputs that no norm layer follows, such as those of a classifier. Where one follows,
    ``activation_moments`` records more without an additional read. Outputs that are not such a tensor are ignored. The
    output is read once more (``bnkern.channel_moments``). Unit: that of the output. Ranks are merged as in Chan et al.
    1979.
    """

    name = "output_moments"
    rows = ("count", "mean", "m2")

    def concerns(self, module: nn.Module) -> bool:
        return True

    def attach(self, recorder: RecorderProtocol, layer: str, module: nn.Module) -> list:
        def callback(args: tuple, kwargs: dict, y: object) -> None:
            if not recorder.is_recording(module) or not isinstance(y, Tensor) or y.dim() < 2:
                return
            count, mean, var = bnkern.channel_moments(y)
            call = recorder.call_of(layer, self)
            out = recorder.slot(self, layer, call, (y.shape[1],), y.device)
            out[0].fill_(count)
            out[1].copy_(mean)
            out[2].copy_(var.double() * count)

        return [recorder.on_forward(module, callback)]

    @staticmethod
    def oracle(y: Tensor) -> dict[str, Tensor]:
        """Returns the derived arrays [C] for y [N, C, ...]."""
        y = y.detach().double().movedim(1, 0).flatten(1)
        mean = y.mean(1)
        return {"count": torch.full_like(mean, y.shape[1]), "mean": mean, "var": y.var(1, correction=0)}

    def merge(self, ranks: np.ndarray) -> np.ndarray:
        total = ranks[0]
        for part in ranks[1:]:
            (na, ma, a2), (nb, mb, b2) = (np.moveaxis(t, 1, 0) for t in (total, part))
            n = np.maximum(na + nb, 1)
            total = np.stack([na + nb, ma + (mb - ma) * nb / n, a2 + b2 + (mb - ma) ** 2 * na * nb / n], 1)
        return total

    def derive(self, values: np.ndarray) -> Arrays:
        count, mean, m2 = np.moveaxis(values, 1, 0)
        return {"count": count, "mean": mean, "var": m2 / np.maximum(count, 1)}
