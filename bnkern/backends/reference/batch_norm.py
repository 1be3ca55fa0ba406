"""The five phases of batch norm in plain torch: the specification with which every other backend is compared.

The code is accurate rather than fast. Arithmetic is float64 for float64 input and float32 otherwise. The tests use its
results for float64 input as exact values. Symbols: x [N, C, ...] is the input with M = N * S values per channel, and
per channel

    mean   = sum x / M                        M2      = sum (x - mean)^2
    invstd = 1 / sqrt(M2 / M + eps)           xhat    = (x - mean) * invstd
    z      = weight * xhat + bias + residual  y       = act(round(z))
    g      = dy * act'(z), by the mask z > 0  dbias   = sum g,  dweight = sum g * xhat
    dx     = weight * invstd * (g - dbias / M - xhat * dweight / M)

With weights w of the values (``sample_weight``) and W = sum w

    mean   = sum w x / W                      M2      = sum w (x - mean)^2
    invstd = 1 / sqrt(M2 / W + eps)           dx      = weight * invstd * (g - w / W * (dbias + xhat * dweight))

and M is W elsewhere. A value of weight 0 is not in the statistics, even if it is infinite or NaN. The other formulas
are for all values.

round() is the rounding to the dtype of x. The mask is set where not (round(z) <= 0), so a NaN passes, as in torch's
threshold_backward. If ``mean`` and ``invstd`` are None, normalisation is the identity: xhat = x.

Source: Ioffe and Szegedy 2015, algorithm 1 and section 3; merging by Chan, Golub and LeVeque 1979.
"""

import torch
from torch import Tensor

from ..activations import ACTIVATIONS
from ..calls import BackwardCall, Forward, ForwardCall, Gradients, Sums
from ..layout import Layout, empty_like, layout
from .dtypes import accumulator


def _axes(x: Tensor) -> list[int]:
    return [0, *range(2, x.dim())]


def _per_value(sample_weight: Tensor, x: Tensor) -> Tensor:
    """The weights [N * S] in a shape that broadcasts against x."""
    return sample_weight.view(x.shape[0], 1, *x.shape[2:])


def _per_channel(v: Tensor, x: Tensor) -> Tensor:
    """The vector v [C] in a shape that broadcasts against x, in the accumulator dtype of x."""
    return v.to(accumulator(x.dtype)).view(1, -1, *[1] * (x.dim() - 2))


# ---------------------------------------------------------------------------------------------- the five phases


def moments(x: Tensor) -> tuple[int, Tensor, Tensor]:
    """Count, mean [C] and M2 [C] of x, in two passes."""
    acc, count = x.to(accumulator(x.dtype)), layout(x).count
    if count == 0:
        zero = acc.new_zeros(x.shape[1])
        return 0, zero, zero.clone()
    mean = acc.mean(_axes(x))
    m2 = (acc - _per_channel(mean, x)).square().sum(_axes(x))
    return count, mean, m2


def weighted_moments(x: Tensor, sample_weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """W (a scalar), mean [C] and M2 [C] of x with the weights of its values, in two passes.

    If W = 0, mean and M2 are NaN.
    """
    weight = _per_value(sample_weight, x)
    counted = ~(weight <= 0)
    acc, total = x.to(accumulator(x.dtype)).where(counted, 0.0), sample_weight.sum()
    mean = (weight * acc).sum(_axes(x)) / total
    m2 = (weight * (acc - _per_channel(mean, x)).square()).sum(_axes(x))
    return total, mean, m2


def merge(counts: Tensor, means: Tensor, m2s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Merges K parts, counts [K], means and m2s [K, C], in their order into one (count, mean [C], M2 [C]).

    Chan: n = na + nb, d = mb - ma, mean = ma + d * nb / n, M2 = M2a + M2b + d^2 * na * nb / n.
    A part with count 0 changes nothing.
    """
    count, mean, m2 = torch.zeros_like(counts[:1]), torch.zeros_like(means[0]), torch.zeros_like(m2s[0])
    for k in range(counts.shape[0]):
        total = count + counts[k]
        share = counts[k].to(means.dtype) / total.clamp(min=1)
        delta = means[k] - mean
        present = counts[k] > 0
        mean = torch.where(present, mean + delta * share, mean)
        m2 = torch.where(present, m2 + m2s[k] + delta * delta * count.to(means.dtype) * share, m2)
        count = total
    return count[0], mean, m2


def normalize(call: ForwardCall, mean: Tensor | None, invstd: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """y = act(round(weight * ((x - mean) * invstd) + bias + residual)), and its mask if the call requests one.

    ``call.record`` is filled with :func:`activation` of x and y.
    """
    x, residual = call.x, call.residual
    z = _pre_activation(x, mean, invstd, call.weight, call.bias)
    if residual is not None:
        z = z + residual.to(z.dtype)
    z = z.to(x.dtype)
    mask = pack_mask(~(z <= 0), layout(x)) if call.has_mask else None
    y = z if call.act is None else ACTIVATIONS[call.act].value(z)
    like = empty_like(x, layout(x).rows)
    y = like.copy_(y) if y is x or y.stride() != like.stride() else y
    if call.record is not None:
        call.record.copy_(activation(x, y))
    return y, mask


def grad_sums(call: BackwardCall) -> tuple[Tensor, Tensor]:
    """sum g [C] and sum g * xhat [C]: the gradients of bias and weight.

    ``call.record_affine`` and ``call.record_samples`` are filled with :func:`affine` and :func:`samples`, unless the
    normalisation is the identity.
    """
    if call.record_affine is not None and call.mean is not None:
        call.record_affine.copy_(affine(call))
    if call.record_samples is not None and call.mean is not None:
        call.record_samples.copy_(samples(call))
    g, axes = _masked(call), _axes(call.x)
    return g.sum(axes), (g * _xhat(call.x, call.mean, call.invstd)).sum(axes)


def grad_input(call: BackwardCall, sums: Sums | None) -> tuple[Tensor | None, Tensor | None]:
    """dx and the residual's gradient g, if needed. ``sums`` is (sum g, sum g * xhat, M), or None in eval mode.

    With ``call.sample_weight`` the sums are divided by W, and M is not read.

    ``call.record_gradient`` is filled with :func:`gradient` of dx if dx is needed.
    """
    x, mean, invstd = call.x, call.mean, call.invstd
    need_x, _, _, need_residual = call.needs
    g = _masked(call)
    wide = g
    if sums is not None:
        sum_dy, sum_dy_xhat, count = sums
        divisor = count if call.sample_weight is None else call.sample_weight.sum()
        common = _per_channel(sum_dy / divisor, x) + _xhat(x, mean, invstd) * _per_channel(sum_dy_xhat / divisor, x)
        if call.sample_weight is not None:
            weight = _per_value(call.sample_weight, x)
            common = (weight * common).where(~(weight <= 0), 0.0)
        wide = wide - common
    if call.weight is not None:
        wide = wide * _per_channel(call.weight, x)
    if invstd is not None:
        wide = wide * _per_channel(invstd, x)
    dx = wide.to(x.dtype) if need_x else None
    if call.record_gradient is not None and dx is not None:
        call.record_gradient.copy_(gradient(dx))
    return dx, g.to(x.dtype) if need_residual else None


# ----------------------------------------------------------------------------------- the two calls of a backend


def forward(call: ForwardCall) -> Forward:
    """y, mean, invstd and the mask. In training the running statistics and the counter are updated in place.

    In eval mode it normalises by the running statistics, or is the identity if they are None. An empty batch does not
    change the running statistics. Its mean and invstd are 0.
    """
    acc = accumulator(call.x.dtype)
    mean = invstd = None
    if call.training:
        count: int | Tensor
        if call.sample_weight is None or call.x.numel() == 0:
            count, mean, m2 = moments(call.x)
            invstd = torch.rsqrt(m2 / count + call.eps) if count else torch.zeros_like(mean)
        else:
            count, mean, m2 = weighted_moments(call.x, call.sample_weight)
            invstd = torch.rsqrt(m2 / count + call.eps)
        update_running(call, count, mean, m2)
    elif call.running_mean is not None and call.running_var is not None:
        mean, invstd = call.running_mean.to(acc, copy=True), torch.rsqrt(call.running_var.to(acc) + call.eps)
    y, mask = normalize(call, mean, invstd)
    return y, mean, invstd, mask


def update_running(call: ForwardCall, count: int | Tensor, mean: Tensor, m2: Tensor) -> None:
    """running = (1 - momentum) * running + momentum * batch, with the unbiased variance M2 / (M - 1), in place.

    The counter, if given, is first increased by one. Momentum None means 1 / counter, the cumulative mean. If the count
    is 0, the running statistics do not change. The host does not read a count that is a tensor. If such a count is at
    most 1, as a sum of weights may be, the variance is the biased one, M2 / M.

    With ``call.num_batches_skipped`` a batch whose mean or unbiased variance is not finite in some channel increments
    this number only. The host does not wait for the decision.
    """
    counter, skipped = call.num_batches_tracked, call.num_batches_skipped
    finite: Tensor | None = None
    if skipped is not None:
        variance = m2 / (_degrees(count) if isinstance(count, Tensor) else max(count - 1, 1))
        finite = (mean.isfinite() & variance.isfinite()).all()
        skipped += (~finite).view(skipped.shape)
    if counter is not None:
        counter += 1 if finite is None else finite.view(counter.shape)
    if call.running_mean is None or call.running_var is None:
        return
    share: float | Tensor
    if call.momentum is not None:
        share = call.momentum
    else:
        assert counter is not None, "momentum None requires num_batches_tracked"
        share = 1.0 / counter.to(mean.dtype)
    if isinstance(count, Tensor):
        share = (count > 0).to(mean.dtype) * share
        variance = m2 / _degrees(count)
    elif count == 0:
        return
    else:
        variance = m2 / (count - 1)
    for running, batch in ((call.running_mean, mean), (call.running_var, variance)):
        updated = running.to(mean.dtype) * (1 - share) + batch * share
        running.copy_(updated if finite is None else torch.where(finite, updated, running.to(mean.dtype)))


def _degrees(count: Tensor) -> Tensor:
    """The divisor of M2 in the running variance: M - 1 if M > 1, and M, or 1 if M is 0, otherwise."""
    return torch.where(count > 1, count - 1, torch.where(count > 0, count, torch.ones_like(count)))


def backward(call: BackwardCall) -> Gradients:
    """(dx, dweight, dbias, dresidual), with None for those that ``call.needs`` does not request."""
    need_x, need_weight, need_bias, need_residual = call.needs
    dx = dweight = dbias = dresidual = sums = None
    if call.needs_sums:
        sum_dy, sum_dy_xhat = grad_sums(call)
        dweight = sum_dy_xhat.to(call.weight.dtype) if need_weight and call.weight is not None else None
        dbias = sum_dy.to(call.bias.dtype) if need_bias and call.bias is not None else None
        sums = (sum_dy, sum_dy_xhat, max(layout(call.x).count, 1)) if call.training else None
    if need_x or need_residual:
        dx, dresidual = grad_input(call, sums)
        rows = layout(call.x).rows
        dx = empty_like(call.x, rows).copy_(dx) if dx is not None else None
        dresidual = empty_like(call.x, rows).copy_(dresidual) if dresidual is not None else None
    return dx, dweight, dbias, dresidual


def differentiable_backward(call: BackwardCall, eps: float) -> Gradients:
    """``backward`` as a differentiable function of dy, x and weight, for double backward.

    In training the statistics are recomputed from x, because the second derivative includes their derivatives. The sign
    of z is constant almost everywhere and is treated as a constant.
    """
    _, x, weight, bias, mean, invstd, mask, act, training, needs, *_ = call
    if mask is None and act is not None:
        with torch.no_grad():
            positive = ~(_pre_activation(x, mean, invstd, weight, bias).to(x.dtype) <= 0)
            mask = pack_mask(positive, layout(x))
    if training:
        count: int | Tensor
        count, mean, m2 = moments(x) if call.sample_weight is None else weighted_moments(x, call.sample_weight)
        invstd = torch.rsqrt(m2 / count + eps)
    call = call._replace(mean=mean, invstd=invstd, mask=mask)
    need_x, need_weight, need_bias, need_residual = needs
    sum_dy, sum_dy_xhat = grad_sums(call)
    dx, dresidual = grad_input(call, (sum_dy, sum_dy_xhat, layout(x).count) if training else None)
    return (
        dx if need_x else None,
        sum_dy_xhat.to(weight.dtype) if need_weight and weight is not None else None,
        sum_dy.to(bias.dtype) if need_bias and bias is not None else None,
        dresidual if need_residual else None,
    )


# ------------------------------------------------------------------------------------- what the kernels record


def activation(x: Tensor, y: Tensor) -> Tensor:
    """The rows ``records.ACTIVATION`` [9, C] of an input x and the output y computed from it.

    The rows are, per channel: count M, mean = sum x / M, m_k = sum (x - mean)^k for k = 2, 3, 4, the smallest and the
    largest x that is not NaN (inf and -inf if there is none), the number of x that are infinite or NaN, and the number
    of y > 0. An empty batch has mean and m_k 0.
    """
    wide, axes, count = x.double(), _axes(x), layout(x).count
    mean = wide.sum(axes) / max(count, 1)
    delta = wide - mean.view(1, -1, *[1] * (x.dim() - 2))
    powers = [(delta**k).sum(axes) for k in (2, 3, 4)]
    wide = wide.movedim(1, 0).flatten(1)
    least, largest = (
        torch.cat([wide.where(~wide.isnan(), none), wide.new_full((len(wide), 1), none)], 1)
        for none in (torch.inf, -torch.inf)
    )
    counts = [(~wide.isfinite()).sum(1), (y > 0).sum(axes)]
    rows = [torch.full_like(mean, count), mean, *powers, least.amin(1), largest.amax(1), *counts]
    return torch.stack([row.double() for row in rows])


def gradient(dx: Tensor) -> Tensor:
    """The rows ``records.GRADIENT`` [8, C] of dx.

    They are, per channel: count, sum, sum of absolute values, sum of squares, and the numbers of values that are above,
    below and equal to zero, and of those that are infinite or NaN. A NaN is only in the last of these numbers.
    """
    wide, axes = dx.double(), _axes(dx)
    sums = [wide.sum(axes), wide.abs().sum(axes), wide.square().sum(axes)]
    numbers = [(dx > 0).sum(axes), (dx < 0).sum(axes), (dx == 0).sum(axes), (~dx.isfinite()).sum(axes)]
    return torch.stack([torch.full_like(sums[0], layout(dx).count), *sums, *(number.double() for number in numbers)])


def affine(call: BackwardCall) -> Tensor:
    """The rows ``records.AFFINE`` [8, C] of the summands d = g (bias) and d = g * xhat (weight).

    For each of them and per channel: sum d, sum |d|, sum sign d and the number of d != 0. The summands have the
    accumulator's dtype. A NaN has sign 0 and counts as nonzero.
    """
    x, g = call.x, _masked(call)
    rows = []
    for d in (g, g * _xhat(x, call.mean, call.invstd)):
        signs = (d > 0).double() - (d < 0).double()
        rows += [total.sum(_axes(x)) for total in (d.double(), d.double().abs(), signs, (d != 0).double())]
    return torch.stack(rows)


def samples(call: BackwardCall) -> Tensor:
    """The rows ``records.SAMPLES`` [5, C] of the samples' contributions to the gradients of bias and weight.

    Per channel, the contribution of sample n is b_n = sum g to the bias and w_n = sum g * xhat to the weight, over the
    S positions of the sample. The rows are the number of samples N, sum b_n, sum (b_n - mean b)^2, and the same two of
    w_n. An empty batch has only zeros. Batch norm couples the samples: w_n depends on the other samples by the mean and
    invstd in xhat, and g by all later layers. So these are contributions to one gradient and not gradients of
    independent losses.
    """
    x, g = call.x, _masked(call).double()
    like = layout(x)
    rows = [torch.full((like.c,), like.n, dtype=torch.float64, device=x.device)]
    for d in (g, g * _xhat(x, call.mean, call.invstd)):
        contributions = d.flatten(2).sum(2) if d.dim() > 2 else d
        total = contributions.sum(0)
        rows += [total, (contributions - total / max(like.n, 1)).square().sum(0)]
    return torch.stack(rows)


# ------------------------------------------------------------------------------------------------- shared terms


def _xhat(x: Tensor, mean: Tensor | None, invstd: Tensor | None) -> Tensor:
    acc = x.to(accumulator(x.dtype))
    return acc if mean is None or invstd is None else (acc - _per_channel(mean, x)) * _per_channel(invstd, x)


def _pre_activation(
    x: Tensor, mean: Tensor | None, invstd: Tensor | None, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    z = _xhat(x, mean, invstd)
    if weight is not None:
        z = z * _per_channel(weight, x)
    if bias is not None:
        z = z + _per_channel(bias, x)
    return z


def _masked(call: BackwardCall) -> Tensor:
    """g, the gradient before the activation. If no mask was saved, z is recomputed and rounded as in the forward."""
    x = call.x
    g = call.dy.to(accumulator(x.dtype))
    if call.act is None:
        return g
    if call.mask is not None:
        positive = unpack_mask(call.mask, x)
    else:
        positive = ~(_pre_activation(x, call.mean, call.invstd, call.weight, call.bias).to(x.dtype) <= 0)
    return ACTIVATIONS[call.act].gradient(g, positive)


def pack_mask(positive: Tensor, like: Layout) -> Tensor:
    """Packs a boolean [N, C, ...] into the bytes of the mask (``Layout.mask_shape``), least significant bit first."""
    bits = positive.movedim(1, -1).reshape(1, -1) if like.rows else positive.reshape(like.n * like.c, like.s)
    bits = torch.nn.functional.pad(bits.to(torch.uint8), (0, -bits.shape[1] % 8))
    bits = bits.view(bits.shape[0], bits.shape[1] // 8, 8)
    shifts = torch.arange(8, dtype=torch.uint8, device=positive.device)
    return (bits << shifts).sum(-1, dtype=torch.uint8).view(like.mask_shape)


def unpack_mask(mask: Tensor, x: Tensor) -> Tensor:
    """Unpacks the bytes of the mask to a boolean [N, C, ...], in the layout of x."""
    rows, n, c, s = layout(x)
    shifts = torch.arange(8, dtype=torch.uint8, device=mask.device)
    bits = (mask.unsqueeze(-1) >> shifts) & 1
    if rows:
        return bits.flatten()[: n * c * s].view(n, *x.shape[2:], c).movedim(-1, 1).bool()
    return bits.flatten(-2)[..., :s].reshape(x.shape).bool()
