"""The norms of parameters, of their gradients and of their updates."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from .base import Quantity, RecorderProtocol


class ParameterNorms(Quantity):
    """``parameter_norms``: Euclidean norms of each parameter p, of its gradient and of its update.

    ``weight`` = |p| and ``update`` = |p - p'| are measured before the step's first forward of the model, where p' is
    the parameter in the forward of the recorded step before (0 in the first step). ``relative_update`` = |p - p'| /
    |p'|, and NaN if p' = 0. ``gradient`` = |dL/dp| is measured at ``rec.step`` (NaN for a parameter without a
    gradient). A norm that is not finite, or too large for float32, is recorded as inf.

    The arrays are [step, parameter], in the layer "". ``names`` of the options in ``recording.index`` has the names.

    Args:
        layers: Patterns of the names of parameters, by default all.
        names: The names of the parameters, set when the quantity is attached to a model.

    Parameters and gradients are read once more, and a copy of the parameters is kept. Records keep an axis of ranks.
    """

    name = "parameter_norms"
    rows = ("weight", "gradient", "update", "relative_update")

    def __init__(self, layers: str | Iterable[str] | None = None, names: Sequence[str] = ()) -> None:
        super().__init__(layers)
        self.names = list(names)

    def options(self) -> dict[str, object]:
        return super().options() | {"names": self.names}

    def wants(self, layer: str) -> bool:
        return layer == ""  # the patterns are those of parameters, and the layer is the whole model

    def concerns(self, module: nn.Module) -> bool:
        return True

    def attach(self, recorder: RecorderProtocol, layer: str, module: nn.Module) -> list:
        named = {name: p for name, p in module.named_parameters() if Quantity.wants(self, name)}
        if not named:
            raise ValueError(f"parameter_norms: no parameter matches {list(self.layers)}")
        self.names, previous = list(named), [p.detach().clone() for p in named.values()]
        device, previous_norms = previous[0].device, _norms(previous)
        recorder.reserve(self, layer, (len(named),), device)

        def before() -> None:
            if recorder.call_of(layer, self) > 0:
                return  # the parameters do not change within a step
            out = recorder.slot(self, layer, 0, (len(named),), device)
            parameters = [p.detach() for p in named.values()]  # their memory may have been replaced
            with torch.no_grad():
                out[0].copy_(_norms(parameters))
                out[2].copy_(_norms(list(torch._foreach_sub(parameters, previous))))
                out[3].copy_(torch.where(previous_norms > 0, out[2] / previous_norms, torch.nan))
                previous_norms.copy_(out[0])
                torch._foreach_copy_(previous, parameters)

        def closed() -> None:
            gradients = {k: p.grad.detach() for k, p in enumerate(named.values()) if p.grad is not None}
            out = recorder.slot(self, layer, 0, (len(named),), device)[1]
            if len(gradients) == len(named):
                out.copy_(_norms(list(gradients.values())))
            else:
                for k, gradient in gradients.items():
                    out[k].copy_(_norms([gradient])[0])

        return [recorder.before_forward(module, before), recorder.at_step(closed)]

    @staticmethod
    def oracle(p: Tensor, gradient: Tensor, previous: Tensor) -> dict[str, Tensor]:
        """Returns the derived numbers of one parameter."""
        p, previous = p.double(), previous.double()
        return {
            "weight": p.norm(),
            "gradient": gradient.double().norm(),
            "update": (p - previous).norm(),
            "relative_update": (p - previous).norm() / previous.norm(),
        }

    def merge(self, ranks: np.ndarray) -> np.ndarray:
        return np.moveaxis(ranks, 0, -1)


def _norms(tensors: list[Tensor]) -> Tensor:
    """The norms [len(tensors)] in float64, inf where a norm is not finite. Few launches for many tensors."""
    dtype = torch.float64 if any(t.dtype is torch.float64 for t in tensors) else torch.float32
    norms = torch.stack(torch._foreach_norm(tensors, 2, dtype)).double()
    return torch.where(norms.isfinite(), norms, torch.inf)
