"""Signal propagation through residual blocks."""

import numpy as np
import torch
from torch import Tensor, nn

import bnkern
import bnkern.nn

from .base import Quantity, RecorderProtocol


class SignalPropagation(Quantity):
    """``signal_propagation``: the growth of activations along the residual blocks.

    At each norm layer that adds a residual, with block output y and branch r before the addition:
    ``mean_square`` = mean over channels of (channel mean of y)^2, ``variance`` = mean over channels of the variance
    of y, ``branch_variance`` = mean over channels of the variance of r, which for a batch norm is
    weight^2 var(x) / (var(x) + eps), and ``skip_variance`` = the same of the residual. Unit: that of y, squared.

    x, y and the residual are read once more (``bnkern.channel_moments``). Records keep an axis of ranks.
    Source: Brock, De and Smith, "Characterizing signal propagation...", 2021; De and Smith 2020 for the branch.
    """

    name = "signal_propagation"
    rows = ("mean_square", "variance", "branch_variance", "skip_variance")

    def concerns(self, module: nn.Module) -> bool:
        return isinstance(module, (nn.modules.batchnorm._NormBase, bnkern.nn.Activation))

    def refuses(self, module: nn.Module) -> str | None:
        return None if hasattr(module, "taps") else f"{type(module).__name__} is not one of bnkern.nn's norm layers"

    def attach(self, recorder: RecorderProtocol, layer: str, module: nn.Module) -> list:
        def callback(args: tuple, kwargs: dict, y: Tensor) -> None:
            x = args[0] if args else kwargs["input"]
            residual = args[1] if len(args) > 1 else kwargs.get("residual")
            if residual is None or not recorder.is_recording(module):
                return
            output, branch, skip = (bnkern.channel_moments(t) for t in (y, x, residual))
            variance = branch.var
            if isinstance(module, nn.modules.batchnorm._NormBase):
                divisor = branch.var if module.training or module.running_var is None else module.running_var
                variance = variance / (divisor + module.eps)
                if module.weight is not None:
                    variance = variance * module.weight.detach().to(variance.dtype).square()
            call = recorder.call_of(layer, self)
            means = (output.mean.square(), output.var, variance, skip.var)
            torch.stack([t.double().mean() for t in means], out=recorder.slot(self, layer, call, (), y.device))

        return [recorder.on_forward(module, callback)]

    @staticmethod
    def oracle(y: Tensor, branch: Tensor, residual: Tensor) -> dict[str, Tensor]:
        """Computes the arrays from the output of a block, its branch before the addition, and the residual."""
        y, branch, residual = (t.detach().double().movedim(1, 0).flatten(1) for t in (y, branch, residual))
        return {
            "mean_square": y.mean(1).square().mean(),
            "variance": y.var(1, correction=0).mean(),
            "branch_variance": branch.var(1, correction=0).mean(),
            "skip_variance": residual.var(1, correction=0).mean(),
        }

    def merge(self, ranks: np.ndarray) -> np.ndarray:
        return np.moveaxis(ranks, 0, -1)
