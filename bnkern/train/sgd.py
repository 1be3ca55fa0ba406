"""SGD with momentum for all parameters of a network in one kernel, and their bfloat16 copies for autocast."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from bnkern import backends
from bnkern.backends.calls import UpdateCall

ALIGN = 64  # each parameter begins at a multiple of so many values, which are 128 bytes in bfloat16


class Sgd:
    """The update v = momentum v + (gradient + weight_decay p), p = p - lr v. Without momentum there is no v.

    The parameters become views of one flat tensor and keep their strides. One kernel then updates all of them. It reads
    the gradients where autograd left them. Flat tensors have the same order: first the parameters with a shadow, then
    the others, each from a multiple of :data:`ALIGN` values on.

    Under autocast every call of a convolution casts its weight to bfloat16, and its backward casts the gradient to
    float32. With a shadow there are no such casts: the update also writes the weights in bfloat16, the layers read
    these (:meth:`shadows`), and the kernel reads gradients in bfloat16. All values have the same bits as with casts.

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
        layers = [m for m in network.modules() if shadowed and isinstance(m, nn.Conv2d | nn.Linear)]
        cast = dict.fromkeys(p for layer in layers for p in layer.parameters(recurse=False))  # autocast casts these
        self._parameters = [*cast, *(p for p in self._named.values() if p not in cast)]
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
        self.shadow: Tensor | None = None
        self._places: list[tuple[dict, str, nn.Parameter, Tensor]] = []
        if cast:
            self.shadow = self.values[: ends[len(cast)]].to(torch.bfloat16)
            for layer in layers:
                for name, p in layer.named_parameters(recurse=False):
                    self._places.append((layer._parameters, name, p, self._part(self.shadow, p)))
                    p.grad_dtype = None  # autograd accepts a gradient of any dtype

    def zero_grad(self) -> None:
        for p in self._parameters:
            p.grad = None

    def __call__(self, lr: Tensor, stop: Tensor) -> None:
        """Updates all parameters, unless ``stop`` is not 0. Both are float32 scalars on the device."""
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        assert len(gradients) == len(self._parameters), "the loss must depend on every parameter"
        backend = backends.choose(backends.forced(), self.values.device, self.values.dtype)
        flat = (self.values, self.before, self.velocity, self.shadow)
        backend.update(UpdateCall(list(self._parameters), gradients, *flat, lr, stop, *self._settings))
        # The kernels write through addresses, which does not change autograd's version counters.
        torch.autograd.graph.increment_version(self._parameters)

    def by_name(self, flat: Tensor) -> dict[str, Tensor]:
        """Returns the parts of a flat tensor by the names of the parameters, in the order of the network."""
        return {name: self._part(flat, p) for name, p in self._named.items()}

    @contextmanager
    def shadows(self) -> Iterator[None]:
        """Within this context layers read the shadows of their parameters, if there are any.

        The functions are made anew for every step. An older one would belong to another stream, which a CUDA graph
        must not use.
        """
        try:
            for parameters, name, p, shadow in self._places:
                parameters[name] = _Shadow.apply(p, shadow)
            yield
        finally:
            for parameters, name, p, _ in self._places:
                parameters[name] = p

    @torch.no_grad()
    def refresh(self) -> None:
        """Computes the shadow from the parameters."""
        if self.shadow is not None:
            self.shadow.copy_(self.values[: len(self.shadow)])

    def _part(self, flat: Tensor, p: Tensor) -> Tensor:
        return flat.as_strided(p.shape, p.stride(), p.storage_offset())


class _Shadow(torch.autograd.Function):
    """The shadow of a parameter as a function of the parameter. Its gradient goes to the parameter in bfloat16."""

    @staticmethod
    def forward(ctx, parameter, shadow):
        return shadow.view_as(shadow)

    @staticmethod
    def backward(ctx, grad):
        return grad, None
