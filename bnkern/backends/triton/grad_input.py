"""Phase ``grad_input``: the gradients of the input and of the residual."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..activations import code
from ..calls import BackwardCall, Sums
from ..layout import addressed, empty_like, layout
from .common import (
    addresses,
    affine,
    channel_of,
    channel_vectors,
    gated,
    inside,
    kernel,
    launch,
    load_weights,
    locate,
    per_channel,
    plan,
)
from .merge import divide
from .records import columns_sum, fold_gradient, owned, write_part


@triton.jit
def mean_gradients(sums, count, training, channel, valid, ROWS: tl.constexpr, ALIGN: tl.constexpr):
    """sum g / M and sum g * xhat / M at ``channel``, or 0 in eval mode."""
    total = per_channel(sums[0], training, 0.0, channel, valid, ROWS, ALIGN)
    dot = per_channel(sums[1], training, 0.0, channel, valid, ROWS, ALIGN)
    count = count.to(total.dtype)
    return divide(total, count), divide(dot, count)


@kernel
def grad_input_kernel(
    dy_ptr, x_ptr, dx_ptr, dresidual_ptr, mask_ptr, mean_ptr, invstd_ptr, weight_ptr, bias_ptr, sum_ptr, dot_ptr,
    parts_ptr, weights_ptr, dy_outer, dy_inner, x_outer, x_inner, dx_outer, dx_inner, dresidual_outer, dresidual_inner,
    lines, length, channels, tiles, share, spans, beside,
    has_statistics, has_weight, has_bias, count, act, training, need_dx, need_dresidual,
    ROWS: tl.constexpr, FLAT: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr,
    GROUP: tl.constexpr, OCTETS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """With ``weights_ptr`` the sums are divided by ``count`` and multiplied by the weight of each value.

    With ``parts_ptr`` it also writes parts of the record of dx, which is that of the stored (rounded) values."""
    STORED: tl.constexpr = x_ptr.dtype.element_ty
    ACC: tl.constexpr = mean_ptr.dtype.element_ty
    vectors = (mean_ptr, invstd_ptr, weight_ptr, bias_ptr)
    present = (has_statistics, has_weight, has_bias)
    sums = (sum_ptr, dot_ptr)
    first = tl.program_id(1) * share
    if ROWS or not FLAT:
        _, octet = locate(first, 0, spans, beside, ROWS, WIDE, GROUP, OCTETS, UNROLL)
        channel, exists = channel_of(octet, length, channels, ROWS, FLAT, ALIGN)
        mean, invstd, weight, bias = affine(vectors, present, channel, exists, ROWS, ALIGN)
        mean_g, mean_dot = mean_gradients(sums, count, training, channel, exists, ROWS, ALIGN)
    if parts_ptr is not None:
        total = tl.zeros((GROUP, 8), ACC)
        absolute = tl.zeros((GROUP, 8), ACC)
        squares = tl.zeros((GROUP, 8), ACC)
        positive = tl.zeros((GROUP, 8), tl.int32)
        negative = tl.zeros((GROUP, 8), tl.int32)
        zero = tl.zeros((GROUP, 8), tl.int32)
        nonfinite = tl.zeros((GROUP, 8), tl.float32)  # takes fewer registers than an integer
    for t in range(first, tl.minimum(first + share, tiles)):
        places, dys, xs = (), (), ()
        for u in tl.static_range(UNROLL):
            line, octet = locate(t, u, spans, beside, ROWS, WIDE, GROUP, OCTETS, UNROLL)
            valid = inside(line, octet, lines, length, channels, ROWS, FLAT, ALIGN)
            places += ((line, octet, valid),)
            pointers = addresses(dy_ptr, dy_outer, dy_inner, line, octet, channels, ROWS, FLAT, ALIGN)
            dys += (tl.load(pointers, mask=valid, other=0.0),)
            pointers = addresses(x_ptr, x_outer, x_inner, line, octet, channels, ROWS, FLAT, ALIGN)
            xs += (tl.load(pointers, mask=valid, other=0.0),)
        for u in tl.static_range(UNROLL):
            line, octet, valid = places[u]
            if FLAT and not ROWS:
                channel, _ = channel_of(octet, length, channels, ROWS, FLAT, ALIGN)
                mean, invstd, weight, bias = affine(vectors, present, channel, valid, ROWS, ALIGN)
                mean_g, mean_dot = mean_gradients(sums, count, training, channel, valid, ROWS, ALIGN)
            xhat = (xs[u].to(ACC) - mean) * invstd
            g = gated(
                dys[u].to(ACC), xhat, weight, bias, mask_ptr, act, line, octet, lines, length, channels, valid,
                STORED, ROWS, FLAT, ALIGN,
            )  # fmt: skip
            # In eval mode the sums are 0. Their product with an infinite xhat would be NaN.
            if weights_ptr is None:
                dx = tl.where(training != 0, g - tl.fma(xhat, mean_dot, mean_g), g) * (weight * invstd)
            else:
                weighted = line < lines if ROWS and not FLAT else valid
                w = load_weights(weights_ptr, line, octet, weighted, length, channels, ROWS, FLAT, ALIGN)
                common = tl.where(w == 0, 0.0, w * tl.fma(xhat, mean_dot, mean_g))
                dx = tl.where(training != 0, g - common, g) * (weight * invstd)
            pointers = addresses(dx_ptr, dx_outer, dx_inner, line, octet, channels, ROWS, FLAT, ALIGN)
            tl.store(pointers, dx, mask=valid & (need_dx != 0))
            pointers = addresses(
                dresidual_ptr, dresidual_outer, dresidual_inner, line, octet, channels, ROWS, FLAT, ALIGN
            )
            tl.store(pointers, g, mask=valid & (need_dresidual != 0))
            if parts_ptr is not None:
                value = tl.where(valid, dx.to(STORED).to(ACC), 0.0)
                total += value
                absolute += tl.abs(value)
                squares = tl.fma(value, value, squares)
                positive += (value > 0).to(tl.int32)
                negative += (value < 0).to(tl.int32)
                zero += (valid & (value == 0)).to(tl.int32)
                nonfinite += tl.where(tl.abs(value) < float("inf"), 0.0, 1.0)
    if parts_ptr is not None:
        WIDTH: tl.constexpr = OCTETS * 8 if ROWS else 1
        total = columns_sum(total, WIDTH)
        absolute = columns_sum(absolute, WIDTH)
        squares = columns_sum(squares, WIDTH)
        positive = columns_sum(positive, WIDTH)
        negative = columns_sum(negative, WIDTH)
        zero = columns_sum(zero, WIDTH)
        nonfinite = columns_sum(nonfinite.to(tl.int32), WIDTH)
        part, channel, in_bounds = owned(channels, WIDTH, FLAT)
        rows = (total, absolute, squares, positive, negative, zero, nonfinite)
        write_part(parts_ptr, rows, 0, 7, part, channel, channels, in_bounds)


def grad_input(call: BackwardCall, sums: Sums | None) -> tuple[Tensor | None, Tensor | None]:
    """dx and the residual's gradient g, if needed. ``sums`` is (sum g, sum g * xhat, M), or None in eval mode.

    A second launch fills ``call.record_gradient`` if dx is needed. With ``call.sample_weight`` the sums are divided by
    its sum W, for which there are three small launches of torch, and M is not read.
    """
    dy, x, mask = call.dy, call.x, call.mask
    need_dx, _, _, need_dresidual = call.needs
    like = layout(x)
    dx = empty_like(x, like.rows) if need_dx else None
    dresidual = empty_like(x, like.rows) if need_dresidual else None
    record = call.record_gradient if need_dx else None
    if x.numel() == 0 and record is not None:
        record.zero_()
    if x.numel() == 0 or not (need_dx or need_dresidual):
        return dx, dresidual
    dy, x = addressed(dy, like.rows), addressed(x, like.rows)
    written = [dresidual if dx is None else dx, dx if dresidual is None else dresidual]
    vectors, present = channel_vectors(x, call.mean, call.invstd, call.weight, call.bias)
    total, dot, count = (vectors[0], vectors[0], 1) if sums is None else sums
    weights = None if sums is None else call.sample_weight
    if weights is not None:  # W is only on the device
        whole = weights.sum()
        total, dot, count = total / whole, dot / whole, 1
    total, dot = total.contiguous(), dot.contiguous()
    walk = plan(like, [dy, x, *written], [*vectors, total, dot], pointwise=True, recording=record is not None)
    parts = None if record is None else torch.empty((walk.parts, 7, like.c), dtype=torch.float64, device=x.device)
    flags = (code(call.act), int(sums is not None), int(need_dx), int(need_dresidual))
    launch(
        grad_input_kernel, walk.grid, x.device, dy, x, *written, mask if call.act else None, *vectors, total, dot,
        parts, weights, *walk.strides, *walk.sizes, *present, count, *flags, **walk.constants,
    )  # fmt: skip
    if record is not None:
        fold_gradient(parts, record, like.count)
    return dx, dresidual
