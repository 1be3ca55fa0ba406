"""The noise of a batch's gradient."""

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor, nn

from .base import Arrays, Quantity, RecorderProtocol


class GradientNoiseScale(Quantity):
    """``gradient_noise_scale``: the noise of a batch's gradient, estimated from the parts of an accumulated gradient.

    For a step of k >= 2 backward passes over parts of equal size b, with the gradients g_1 .. g_k of the parts and
    their mean G (batch k b):

        |G|^2 unbiased   square = (k |G|^2 - mean |g_j|^2) / (k - 1)
        tr Sigma         noise  = (mean |g_j|^2 - |G|^2) * b k / (k - 1)
        B_simple         scale  = noise / square

    ``noise`` is tr Sigma of the gradient of a single example if ``part`` is the number of examples b in a part. With
    the default it is in units of b examples. ``parts`` is k. A step with one backward pass records nothing. One
    estimate is very noisy. Average ``noise`` and ``square`` over steps before you divide them.

    Args:
        layers: Patterns of the names of parameters whose gradients count, by default all.
        part: The number of examples in a part.
        divided: Whether the loss of each part was divided by k before backward, as is usual for accumulation.

    The gradients of each part are read once more. Call ``rec.step`` before ``zero_grad`` and before clipping. Records
    keep an axis of ranks. Source: McCandlish et al., "An Empirical Model of Large-Batch Training", 2018, appendix A.
    """

    name = "gradient_noise_scale"
    rows = ("parts", "part_square", "total_square")

    def __init__(self, layers: str | Iterable[str] | None = None, part: int = 1, divided: bool = True) -> None:
        super().__init__(layers)
        self.part, self.divided = part, divided

    def options(self) -> dict[str, object]:
        return super().options() | {"part": self.part, "divided": self.divided}

    def wants(self, layer: str) -> bool:
        return layer == ""  # the patterns are those of parameters, and the layer is the whole model

    def concerns(self, module: nn.Module) -> bool:
        return True

    def attach(self, recorder: RecorderProtocol, layer: str, module: nn.Module) -> list:
        parameters = [p for name, p in module.named_parameters() if p.requires_grad and Quantity.wants(self, name)]
        if not parameters:
            raise ValueError(f"gradient_noise_scale: no parameter that needs a gradient matches {list(self.layers)}")
        squares: list[Tensor] = []
        passes = [0] * len(parameters)

        def observe(k: int) -> Callable[[Tensor], None]:
            def hook(gradient: Tensor) -> None:
                if recorder.active:
                    squares.append(gradient.detach().double().square().sum())
                    passes[k] += 1

            return hook

        def closed() -> None:
            parts = max(passes)
            if parts > 1:
                # Neither sum is empty, because at least one gradient was observed.
                squared = [p.grad.detach().double().square().sum() for p in parameters if p.grad is not None]
                total: Tensor = sum(squared)  # type: ignore[assignment]
                mean: Tensor = sum(squares) / parts  # type: ignore[assignment]
                out = recorder.slot(self, layer, 0, (), parameters[0].device)
                torch.stack([total.new_tensor(float(parts)), mean, total], out=out)
            squares.clear()
            passes[:] = [0] * len(passes)

        hooks = [parameter.register_hook(observe(k)) for k, parameter in enumerate(parameters)]
        return [*hooks, recorder.at_step(closed)]

    @staticmethod
    def oracle(parts: list[Tensor], part: int = 1) -> dict[str, float]:
        """Computes the arrays from the flat gradients g_j of the mean losses of the parts."""
        k = len(parts)
        small = sum(float(g.double().square().sum()) for g in parts) / k
        mean: Tensor = sum(g.double() for g in parts) / k  # type: ignore[assignment]
        big = float(mean.square().sum())
        square, noise = (k * big - small) / (k - 1), (small - big) * part * k / (k - 1)
        return {"parts": k, "square": square, "noise": noise, "scale": noise / square}

    def merge(self, ranks: np.ndarray) -> np.ndarray:
        return np.moveaxis(ranks, 0, -1)

    def derive(self, values: np.ndarray) -> Arrays:
        k, small, big = values[:, 0], values[:, 1], values[:, 2]
        # The formulas need g_j and G. A divided loss gives g_j / k and G, and otherwise they are g_j and k G.
        small, big = (small * k**2, big) if self.divided else (small, big / k**2)
        square, noise = (k * big - small) / (k - 1), (small - big) * self.part * k / (k - 1)
        return {"parts": k, "square": square, "noise": noise, "scale": noise / square}
