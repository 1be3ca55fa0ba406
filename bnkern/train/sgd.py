"""SGD with momentum for all parameters of a network in one kernel, and their bfloat16 copies for autocast."""

import torch
from torch import Tensor, nn

from bnkern import backends

ALIGN = 64  # each parameter begins at a multiple of so many values, which are 128 bytes in bfloat16


class Sgd:
    """The update v = momentum v + (gradient + weight_decay p), p = p - lr v. Without momentum there is no v.

    The parameters become views of one flat tensor and keep their strides. One kernel then updates all of them. It reads
    the gradients where autograd left them. Flat tensors have the same order: first the parameters with a shadow, then
    the others, each from a multiple of :data:`ALIGN` values on.

    Under autocast every call of a convolution casts its weight to bfloat16, and its backward casts the gradient to
    float32. With a shadow there are no such casts: the update also writes the weights in bfloat16, the network is
    called with these (:meth:`shadows`), and the kernel reads gradients in bfloat16. All values have the same bits as
    with casts.

    Args:
        network: Its parameters are floating point tensors of one dtype, contiguous or channels_last.
        momentum: Of the velocity.
        weight_decay: Of all parameters.
        shadowed: Whether parameters of convolutions and linear layers have a shadow. ``grad`` of these parameters is
            then bfloat16. DistributedDataParallel does not accept such gradients.

    Attributes:
        values: All parameters, flat.
        before: The same, before the last update.
        velocity: The velocities, or None.
        shadow: The first values in bfloat16, or None. Call :meth:`refresh` after a change of the parameters.
    """

    def __init__(self, network: nn.Module, momentum: float, weight_decay: float, shadowed: bool = False) -> None:
        self._settings = momentum, weight_decay
        self._named = dict(network.named_parameters())
        cast = _cast_by_autocast(network) if shadowed else []
        self._parameters = cast + [p for p in self._named.values() if not any(p is other for other in cast)]
        ends = [0]
        for name, p in self._named.items():
            if not (p.is_contiguous() or p.is_contiguous(memory_format=torch.channels_last)):
                raise ValueError(f"parameter {name} must be contiguous or channels_last, got strides {p.stride()}")
        for p in self._parameters:
            ends.append(ends[-1] + -(-p.numel() // ALIGN) * ALIGN)
        self.values = self._parameters[0].new_zeros(ends[-1], requires_grad=False)
        for p, start in zip(self._parameters, ends, strict=False):
            place = self.values.as_strided(p.shape, p.stride(), start)
            p.data = place.copy_(p.detach())
        self.before = self.values.clone()
        self.velocity = torch.zeros_like(self.values) if momentum else None
        self.shadow = self.values[: ends[len(cast)]].to(torch.bfloat16) if cast else None
        for p in cast:
            p.grad_dtype = None  # autograd accepts a gradient of any dtype

    def zero_grad(self) -> None:
        for p in self._parameters:
            p.grad = None

    def __call__(self, lr: Tensor, stop: Tensor) -> None:
        """Updates all parameters, unless ``stop`` is not 0. Both are float32 scalars on the device."""
        gradients = [p.grad for p in self._parameters]
        assert all(gradient is not None for gradient in gradients), "the loss must depend on every parameter"
        backend = backends.choose(backends.forced(), self.values.device, self.values.dtype)
        flat = (self.values, self.before, self.velocity, self.shadow)
        backend.update(self._parameters, gradients, *flat, lr, stop, *self._settings)  # type: ignore[arg-type]
        # The kernels write through addresses, which does not change autograd's version counters.
        torch.autograd.graph.increment_version(self._parameters)

    def by_name(self, flat: Tensor) -> dict[str, Tensor]:
        """Returns the parts of a flat tensor by the names of the parameters, in the order of the network."""
        return {name: self._part(flat, p) for name, p in self._named.items()}

    def shadows(self, model: nn.Module) -> list[tuple[str, Tensor, Tensor]]:
        """Returns, for each parameter that has a shadow: its name in ``model``, the parameter, and the shadow."""
        if self.shadow is None:
            return []
        named = model.named_parameters()
        return [(name, p, self._part(self.shadow, p)) for name, p in named if p.storage_offset() < len(self.shadow)]

    @torch.no_grad()
    def refresh(self) -> None:
        """Computes the shadow from the parameters."""
        if self.shadow is not None:
            self.shadow.copy_(self.values[: len(self.shadow)])

    def _part(self, flat: Tensor, p: Tensor) -> Tensor:
        return flat.as_strided(p.shape, p.stride(), p.storage_offset())


class Shadow(torch.autograd.Function):
    """The shadow of a parameter as a function of the parameter. Its gradient goes to the parameter in bfloat16."""

    @staticmethod
    def forward(ctx, parameter, shadow):
        return shadow.view_as(shadow)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def _cast_by_autocast(network: nn.Module) -> list[nn.Parameter]:
    layers = [module for module in network.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    return [p for layer in layers for p in layer.parameters(recurse=False)]
