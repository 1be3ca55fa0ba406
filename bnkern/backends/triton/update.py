"""``update``: one step of SGD for all parameters, in one launch after the gradients are copied to one tensor."""

import torch
import triton
import triton.language as tl

from ..calls import UpdateCall
from .common import kernel, launch

BLOCK = 1024


@triton.jit
def vectors(ptr, i):
    """Pointers to the values of a flat tensor, which begins at a multiple of 16 bytes."""
    return tl.multiple_of(ptr + i, 16)


@kernel
def update_kernel(
    values_ptr, gradient_ptr, before_ptr, velocity_ptr, shadow_ptr, lr_ptr, stop_ptr,
    size, shadow_size, momentum: tl.float64, weight_decay: tl.float64,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The sizes are in units of 64 values, from which the compiler infers that masks hold for whole vectors."""
    if tl.load(stop_ptr) != 0:
        return
    ACC: tl.constexpr = values_ptr.dtype.element_ty
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size * 64
    value = tl.load(vectors(values_ptr, i), mask=inside)
    v = tl.fma(tl.full((BLOCK,), weight_decay, ACC), value, tl.load(vectors(gradient_ptr, i), mask=inside))
    if velocity_ptr is not None:
        v = tl.full((BLOCK,), momentum, ACC) * tl.load(vectors(velocity_ptr, i), mask=inside) + v
        tl.store(vectors(velocity_ptr, i), v, mask=inside)
    after = tl.fma(tl.full((BLOCK,), -tl.load(lr_ptr), ACC), v, value)
    tl.store(vectors(before_ptr, i), value, mask=inside)
    tl.store(vectors(values_ptr, i), after, mask=inside)
    if shadow_ptr is not None:
        tl.store(vectors(shadow_ptr, i), after.to(tl.bfloat16), mask=i < shadow_size * 64)


def update(call: UpdateCall) -> None:
    """One step of SGD. Torch copies the gradients in a few launches, each with a list of addresses."""
    values, shadow = call.values, call.shadow
    gradient = torch.zeros_like(values)
    views = [
        gradient.as_strided(p.shape, p.stride(), p.storage_offset() - values.storage_offset()) for p in call.parameters
    ]
    torch._foreach_copy_(views, call.gradients)
    launch(
        update_kernel, (-(-len(values) // BLOCK),), values.device,
        values, gradient, call.before, call.velocity, shadow, call.lr, call.stop,
        len(values) // 64, 0 if shadow is None else len(shadow) // 64, call.momentum, call.weight_decay, BLOCK=BLOCK,
    )  # fmt: skip
