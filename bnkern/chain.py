"""Chains of 3 x 3 convolutions and batch norms in which the batch norms make no pass over memory of their own.

A convolution's kernel normalises its input when it loads it, and computes the moments of its output when it stores it.
Between two convolutions only the raw output of the first one is in memory. In the backward the kernel that computes the
gradients of a convolution also computes ``grad_input`` of the batch norm behind it and ``grad_sums`` of the one before
it. The CPU's backend has such kernels for both directions. On CUDA devices the forward has one, which must be switched
on (:func:`bnkern.use_cuda_chains`), and the backward calls the kernels of batch norm and torch's convolution.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backends
from .backends.calls import BackwardCall, ForwardCall
from .backends.protocol import ChainBackend
from .backends.records import Records
from .norm import context


class Link(NamedTuple):
    """One step of a chain: ``act(batch_norm(conv2d(value, weight, bias, padding=1)) + residual)``.

    Value 0 is the chain's input, and value k the output of its k-th link.
    """

    weight: Tensor  # [O, I, 3, 3]
    bias: Tensor | None  # [O], of the convolution
    norm: ForwardCall  # of the batch norm, without x and residual
    residual: Tensor | int | None = None  # a tensor of the output's shape, or the number of an earlier value
    records: Records | None = None  # what the kernels record of the norm


def kernels_for(x: Tensor) -> ChainBackend | None:
    """The backend whose kernels compute chains of this input, or None."""
    return backends.chain_kernels(x.device, x.dtype)


def chain(x: Tensor, links: Sequence[Link], kernels: ChainBackend) -> Tensor:
    """The last value of a chain, differentiable.

    For link k, with value y_0 = x:

        r_k = conv2d(y_{k-1}, weight_k, bias_k, padding=1),   y_k = act(batch_norm(r_k) + residual_k)

    A batch norm in training uses the statistics of the batch and updates the running ones. One in eval mode uses the
    running statistics, as do those whose statistics are frozen.

    On the CPU, for images of at most 16,384 values whose width is a multiple of 8, results and gradients have the bits
    of :func:`bnkern.batch_norm` and :class:`bnkern.nn.Conv2d`, called one after the other. Saved for backward are x,
    the raw r_k, the values that are used as a residual or have one, and one bit per element of the latter. Without
    gradients no value is kept longer than a later link needs it. Double backward uses torch's formulas.

    Args:
        x: [N, I, H, W] in channels_last: float32 on the CPU, bfloat16 or float16 on a CUDA device.
        links: weights are of the dtype of x, and every norm has act None or "relu". The channels are multiples of 16 on
            the CPU, and 16, 32 or 64 everywhere in the chain on a CUDA device. There no convolution has
            a bias, every norm is in training, and a link has no records.
        kernels: the backend of :func:`kernels_for`.

    Returns:
        [N, O, H, W] in channels_last, for O outputs of the last link.
    """
    specs, tensors, residuals = [], [], []
    for link in links:
        residual = link.residual
        if isinstance(residual, Tensor):
            residuals.append(residual)
            residual = -len(residuals)
        specs.append(_Spec(link.norm._replace(weight=None, bias=None), residual, link.records or _NO_RECORDS))
        tensors += [link.weight, link.bias, link.norm.weight, link.norm.bias]
    tensors += residuals
    if context.grad_needed(x, *tensors):
        y = _Chain.apply(kernels, tuple(specs), x, *tensors)
    else:
        y = _forward(kernels, specs, x, tensors, save=False)[0]
    updated = [t for k in links if k.norm.training for t in (*k.norm[4:7], k.norm.num_batches_skipped) if t is not None]
    torch.autograd.graph.increment_version(updated)  # the kernels write through addresses
    return y


_NO_RECORDS = Records()


class _Spec(NamedTuple):
    """A link without its tensors. A residual >= 0 is the number of a value, and -k the k-th of the other residuals."""

    norm: ForwardCall
    residual: int | None
    records: Records

    def residual_in(self, values: Sequence, residuals: Sequence) -> Tensor | None:
        if self.residual is None:
            return None
        return values[self.residual] if self.residual >= 0 else residuals[-self.residual - 1]


def _split(specs: Sequence[_Spec], tensors: Sequence[Tensor | None]) -> tuple[list, Sequence]:
    """The tensors of each link (weight and bias of the convolution and of the norm), and the residuals."""
    end = 4 * len(specs)
    return [tuple(tensors[k : k + 4]) for k in range(0, end, 4)], tensors[end:]


def _forward(
    kernels: ChainBackend, specs: Sequence[_Spec], x: Tensor, tensors: Sequence[Tensor | None], save: bool
) -> tuple[Tensor, list[Tensor | None]]:
    """The last value, and what the backward needs: y and mask of each value but the last, each r, mean, invstd."""
    parameters, residuals = _split(specs, tensors)
    last_use = {spec.residual: k for k, spec in enumerate(specs)}
    kept = set(last_use)
    if save:  # A value with a residual is stored, because its recomputation in the backward would need the residual.
        kept |= {k for k, spec in enumerate(specs, 1) if spec.residual is not None}
    values: list[Tensor | None] = [x]
    saved: list[Tensor | None] = []
    source: Any = x  # then the call of each norm
    mean = invstd = None
    last = len(specs) - 1
    for k, (spec, (weight, shift, scale, bias)) in enumerate(zip(specs, parameters, strict=True)):
        record = spec.records.activation
        # normalize computes the whole record of the last norm
        norm = spec.norm if k == last else spec.norm._replace(record=record)
        y, mask, r, next_mean, next_invstd = kernels.conv_norm_forward(
            source, mean, invstd, k in kept, weight, shift, norm
        )
        if k:
            values.append(y)
        if save:
            saved += [y, mask] if k else []
            saved += [r, next_mean, next_invstd]
        residual = spec.residual_in(values, residuals)
        if spec.residual is not None and spec.residual >= 0 and last_use[spec.residual] == k:
            values[spec.residual] = None
        source = ForwardCall(r, scale, bias, residual, act=spec.norm.act, save_mask=save, record=record)
        mean, invstd = next_mean, next_invstd
    y, mask = kernels.normalize(source, mean, invstd)
    for spec in specs:
        spec.records.forward_written()
    return y, [*saved, mask]


class _Chain(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kernels, specs, x, *tensors):
        y, saved = _forward(kernels, specs, x, tensors, save=True)
        ctx.save_for_backward(x, *tensors, *saved)
        ctx.kernels, ctx.specs, ctx.size = kernels, specs, len(tensors)
        return y

    @staticmethod
    def backward(ctx, dy):
        kernels, specs = ctx.kernels, ctx.specs
        x, *rest = ctx.saved_tensors
        tensors, saved = rest[: ctx.size], rest[ctx.size :]
        if torch.is_grad_enabled() or context.is_batched(dy):
            return None, None, *_differentiable_backward(specs, x, tensors, saved, dy, ctx.needs_input_grad[2:])
        parameters = _split(specs, tensors)[0]
        need_x, *needs = ctx.needs_input_grad[2:]
        grads: list[Tensor | None] = [None] * ctx.size
        # The values before and behind each convolution: value 0 has no norm, and the last value is not stored.
        stored = [x, *saved[3:-1:5], None]
        masks = [None, *saved[4:-1:5], saved[-1]]
        statistics = [saved[k : k + 3] for k in range(0, len(saved) - 1, 5)]  # r, mean, invstd

        def norm_call(k: int, g: Tensor | None, mask: Tensor | None = None, act: str | None = None) -> BackwardCall:
            r, mean, invstd = statistics[k]
            _, _, scale, bias = parameters[k]
            _, gradient, affine, samples, _ = specs[k].records
            options = {"record_gradient": gradient, "record_affine": affine, "record_samples": samples}
            training = specs[k].norm.training
            return BackwardCall(g, r, scale, bias, mean, invstd, mask, act, training, **options)  # type: ignore[arg-type]

        last = len(specs) - 1
        call = norm_call(last, dy.contiguous(memory_format=torch.channels_last), masks[-1], specs[last].norm.act)
        g, sums, *affine = kernels.grad_before_act(call)
        shortcuts: dict[int, Tensor] = {}  # gradients of values from the links that use them as a residual
        for k in range(last, -1, -1):
            grads[4 * k + 2 : 4 * k + 4] = affine
            if needs[4 * k + 1]:
                grads[4 * k + 1] = _bias_gradient(specs[k], parameters[k], statistics[k][2], sums)
            residual = specs[k].residual
            if residual is not None and residual < 0:
                grads[4 * len(specs) - residual - 1] = g
            elif residual is not None:
                shortcuts[residual] = shortcuts[residual] + g if residual in shortcuts else g
            behind = norm_call(k, g)  # g is the gradient before the act, so the call has none
            before = None if k == 0 else norm_call(k - 1, None, masks[k], specs[k - 1].norm.act)
            g, sums, *affine, grads[4 * k] = kernels.conv_norm_backward(
                behind,
                sums,
                parameters[k][0],
                before,
                stored[k],
                shortcuts.pop(k, None),
                (k > 0 or need_x, needs[4 * k]),
            )
        for spec in specs:
            spec.records.backward_written()
        return None, None, g, *(grad if need else None for grad, need in zip(grads, needs, strict=True))


def _bias_gradient(spec: _Spec, parameters: tuple, invstd: Tensor, sums: Tensor) -> Tensor:
    """The gradient of a convolution's bias, which is the sum of that of r: 0 in training, where the mean removes it."""
    bias, scale = parameters[1:3]
    if spec.norm.training:
        return torch.zeros_like(bias)
    return (sums[0] * (invstd if scale is None else scale * invstd)).to(bias.dtype)


def _differentiable_backward(
    specs: Sequence[_Spec],
    x: Tensor,
    tensors: Sequence[Tensor | None],
    saved: Sequence[Tensor],
    dy: Tensor,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of x and ``tensors`` by torch's operators, which can be differentiated again."""
    inputs = [x, *tensors]
    with torch.enable_grad():
        parameters, residuals = _split(specs, tensors)
        values: list[Tensor] = [x]
        for k, (spec, (weight, shift, scale, bias)) in enumerate(zip(specs, parameters, strict=True)):
            r = F.conv2d(values[-1], weight, shift, padding=1)
            if spec.norm.training:
                z = F.batch_norm(r, None, None, scale, bias, training=True, eps=spec.norm.eps)
            else:
                mean, invstd = saved[5 * k + 1 : 5 * k + 3]
                mean = mean if shift is None else mean + shift.detach()
                z = (r - mean.view(-1, 1, 1)) * invstd.view(-1, 1, 1)
                z = z if scale is None else z * scale.view(-1, 1, 1)
                z = z if bias is None else z + bias.view(-1, 1, 1)
            residual = spec.residual_in(values, residuals)
            z = z if residual is None else z + residual
            values.append(z if spec.norm.act is None else F.relu(z))
        wanted = [t for t, need in zip(inputs, needs, strict=True) if need and t is not None]
        found = iter(torch.autograd.grad(values[-1], wanted, dy, create_graph=torch.is_grad_enabled()))
    return [next(found) if need else None for need in needs]
