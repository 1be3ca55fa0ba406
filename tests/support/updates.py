"""Checks of ``update``, one step of SGD for all parameters of a network, for any backend."""

from typing import NamedTuple

import torch
from torch import Tensor

from bnkern import backends
from bnkern.backends.calls import UpdateCall
from tests.support.cases import Target

CHANNELS_LAST, CONTIGUOUS = torch.channels_last, torch.contiguous_format
ALIGN = 64
SCALAR, BIAS, VECTOR = ((1,), CONTIGUOUS), ((10,), CONTIGUOUS), ((16,), CONTIGUOUS)
STEM, CONV, NCHW = ((16, 3, 3, 3), CHANNELS_LAST), ((32, 16, 3, 3), CHANNELS_LAST), ((8, 4, 3, 3), CONTIGUOUS)
PROJECTION, LINEAR = ((32, 16, 1, 1), CHANNELS_LAST), ((10, 64), CONTIGUOUS)
LARGE = ((128, 64, 3, 3), CHANNELS_LAST)


class Case(NamedTuple):
    """Shapes and memory formats of the parameters, of which the first ``shadowed`` have a shadow, and settings."""

    name: str
    shapes: tuple
    shadowed: int = 0
    momentum: float = 0.9
    weight_decay: float = 5e-4
    misaligned: bool = False  # gradients begin one value behind a multiple of 16 bytes
    stop: float = 0.0

    def __str__(self) -> str:
        return self.name


FEW = (STEM, VECTOR, VECTOR, CONV, SCALAR, PROJECTION, NCHW, BIAS)
CASES = [
    Case("network", FEW),
    Case("with_shadow", (STEM, CONV, PROJECTION, LINEAR, BIAS, VECTOR, SCALAR, VECTOR), shadowed=5),
    Case("all_have_a_shadow", (CONV, BIAS), shadowed=2),
    Case("without_momentum", FEW, momentum=0.0),
    Case("without_weight_decay", FEW, weight_decay=0.0),
    Case("misaligned", FEW, misaligned=True),
    Case("misaligned_with_shadow", (CONV, BIAS, VECTOR), shadowed=2, misaligned=True),
    Case("one_value", (SCALAR,)),
    Case("several_threads", (LARGE, VECTOR, LARGE, BIAS), shadowed=1),
    Case("more_than_one_launch", (VECTOR, BIAS) * 300, shadowed=2),  # the CUDA kernel takes 512 parameters at a time
    Case("stopped", FEW, stop=1.0),
    Case("stopped_with_shadow", (CONV, BIAS, VECTOR), shadowed=2, stop=1.0),
]
FP64 = [case for case in CASES if not case.shadowed]  # a shadow is of float32 parameters


class Call(UpdateCall):
    """A call whose values between the parameters are NaN, which must not reach any parameter."""

    def parts(self, flat: Tensor | None) -> list[Tensor]:
        if flat is None:
            return []
        inside = [p for p in self.parameters if p.storage_offset() < len(flat)]
        return [flat.as_strided(p.shape, p.stride(), p.storage_offset()) for p in inside]

    def results(self) -> list[Tensor]:
        return [t for flat in (self.values, self.before, self.velocity, self.shadow) for t in self.parts(flat)]


def call_of(case: Case, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Call:
    generator = torch.Generator().manual_seed(len(case.shapes))
    starts = [0]
    for shape, _ in case.shapes:
        starts.append(starts[-1] + -(-torch.Size(shape).numel() // ALIGN) * ALIGN)
    values, before, velocity = (torch.full((starts[-1],), torch.nan, dtype=dtype, device=device) for _ in range(3))
    shadow = torch.full((starts[case.shadowed],), torch.nan, dtype=torch.bfloat16, device=device)

    def noise(t: Tensor) -> Tensor:
        return torch.randn(t.shape, dtype=torch.float64, generator=generator).to(t.device, t.dtype)

    parameters, gradients = [], []
    for i, ((shape, memory_format), start) in enumerate(zip(case.shapes, starts, strict=False)):
        strides = torch.empty(shape).contiguous(memory_format=memory_format).stride()
        p = values.as_strided(shape, strides, start)
        p.copy_(noise(p))
        for flat in (before, velocity):
            flat.as_strided(shape, strides, start).copy_(noise(p))
        storage = torch.empty(p.numel() + 1, dtype=torch.bfloat16 if i < case.shadowed else dtype, device=device)
        gradient = storage.as_strided(shape, strides, int(case.misaligned))
        parameters.append(p)
        gradients.append(gradient.copy_(noise(gradient)))
    return Call(
        parameters,
        gradients,
        values,
        before,
        velocity if case.momentum else None,
        shadow if case.shadowed else None,
        torch.tensor(0.1, device=device),
        torch.tensor(case.stop, device=device),
        case.momentum,
        case.weight_decay,
    )


def update(target: Target, call: Call) -> Call:
    backends.choose(target.backend, call.values.device, call.values.dtype).update(call)
    return call


def check_update(target: Target, case: Case, dtype: torch.dtype = torch.float32) -> None:
    """Compares with the formula in float64.

    There are at most five roundings: of the two products and the two sums of v, and of the sum of p. Each has an error
    of at most half an ulp of the largest number involved. ``before`` and ``shadow`` have no error of their own.
    """
    call, old = update(target, call_of(case, dtype, target.device)), call_of(case, dtype, target.device)
    if case.stop:
        for t, old_value in zip(call.results(), old.results(), strict=True):
            torch.testing.assert_close(t, old_value, rtol=0, atol=0, equal_nan=True)
        return
    eps, velocities = torch.finfo(dtype).eps, old.parts(old.velocity) or [None] * len(old.parameters)
    for i, (p, gradient, v) in enumerate(zip(old.parameters, old.gradients, velocities, strict=True)):
        p, g = p.double(), gradient.double()
        momentum = torch.zeros_like(p) if v is None else case.momentum * v.double()
        expected = momentum + g + case.weight_decay * p
        size = momentum.abs() + g.abs() + (case.weight_decay * p).abs()
        lr = call.lr.double()
        if v is not None:
            assert ((call.parts(call.velocity)[i].double() - expected).abs() <= 2 * eps * size).all()
        assert ((call.parameters[i].double() - (p - lr * expected)).abs() <= 2 * eps * (p.abs() + lr * size)).all()
    for t, old_value in zip(call.parts(call.before), old.parameters, strict=True):
        assert torch.equal(t, old_value)
    for t, p in zip(call.parts(call.shadow), call.parameters, strict=False):
        assert torch.equal(t, p.to(torch.bfloat16))
