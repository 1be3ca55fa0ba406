"""The five phases of batch norm in plain torch: the specification that every other backend is held against.

Accurate rather than fast. Arithmetic is float64 for float64 input and float32 otherwise; called with float64
input it is the truth of the tests. Symbols: x [N, C, ...] input, M = N * S values per channel, and per channel

    mean   = sum x / M                        M2      = sum (x - mean)^2
    invstd = 1 / sqrt(M2 / M + eps)           xhat    = (x - mean) * invstd
    z      = weight * xhat + bias + residual  y       = act(round(z))
    g      = dy where the ReLU mask is set    dbias   = sum g,  dweight = sum g * xhat
    dx     = weight * invstd * (g - dbias / M - xhat * dweight / M)

round() is the rounding to the dtype of x. The mask is set where not (round(z) <= 0), so that NaN passes, as in
torch's threshold_backward. ``mean`` and ``invstd`` None mean identity normalisation, xhat = x.

Source: Ioffe and Szegedy 2015, algorithm 1 and section 3; merging by Chan, Golub and LeVeque 1979.
"""

import torch
from torch import Tensor

from .layout import Layout, empty_like, layout


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and saved statistics: float64 for float64, else float32."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def refuses(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this backend cannot serve such an input, or None: plain torch serves them all."""
    return None


def _axes(x: Tensor) -> list[int]:
    return [0, *range(2, x.dim())]


def _per_channel(v: Tensor, x: Tensor) -> Tensor:
    """A [C] vector shaped to broadcast against x, in x's accumulator dtype."""
    return v.to(accumulator(x.dtype)).view(1, -1, *[1] * (x.dim() - 2))


# ---------------------------------------------------------------------------------------------- the five phases


def moments(x: Tensor) -> tuple[int, Tensor, Tensor]:
    """Count, mean [C] and M2 [C] of x, by two passes."""
    acc, count = x.to(accumulator(x.dtype)), layout(x).count
    if count == 0:
        zero = acc.new_zeros(x.shape[1])
        return 0, zero, zero.clone()
    mean = acc.mean(_axes(x))
    m2 = (acc - _per_channel(mean, x)).square().sum(_axes(x))
    return count, mean, m2


def merge(counts: Tensor, means: Tensor, m2s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One (count, mean [C], M2 [C]) from K of them: counts [K], means and m2s [K, C], in the order given.

    Chan: n = na + nb, d = mb - ma, mean = ma + d * nb / n, M2 = M2a + M2b + d^2 * na * nb / n.
    A part of zero count changes nothing.
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


def normalize(
    x: Tensor,
    mean: Tensor | None,
    invstd: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    act: str | None,
    *,
    record: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """y = act(round(weight * ((x - mean) * invstd) + bias + residual)) and, with residual and ReLU, its mask.

    ``record`` [8, C] float64 is filled with :func:`activation` of x and y.
    """
    z = _pre_activation(x, mean, invstd, weight, bias)
    if residual is not None:
        z = z + residual.to(z.dtype)
    z = z.to(x.dtype)
    mask = pack_mask(~(z <= 0), layout(x)) if act == "relu" and residual is not None else None
    y = z.relu() if act == "relu" else z
    like = empty_like(x, layout(x).rows)
    y = like.copy_(y) if y is x or y.stride() != like.stride() else y
    if record is not None:
        record.copy_(activation(x, y))
    return y, mask


def grad_sums(
    dy: Tensor,
    x: Tensor,
    mean: Tensor | None,
    invstd: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    act: str | None,
    *,
    record: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """sum g [C] and sum g * xhat [C]: the gradients of bias and weight. ``record`` [8, C] is filled with
    :func:`affine`."""
    if record is not None:
        record.copy_(affine(dy, x, mean, invstd, weight, bias, mask, act))
    g = _masked(dy, x, mean, invstd, weight, bias, mask, act)
    return g.sum(_axes(x)), (g * _xhat(x, mean, invstd)).sum(_axes(x))


def grad_input(
    dy: Tensor,
    x: Tensor,
    mean: Tensor | None,
    invstd: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    act: str | None,
    sums: tuple[Tensor, Tensor, int] | None,
    need_dx: bool = True,
    need_dresidual: bool = True,
    *,
    record: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """dx and the residual's gradient g, where needed. ``sums`` is (sum g, sum g * xhat, M), or None in eval mode.

    ``record`` [7, C] float64 is filled with :func:`gradient` of dx, where dx is needed.
    """
    g = _masked(dy, x, mean, invstd, weight, bias, mask, act)
    dx = g
    if sums is not None:
        sum_dy, sum_dy_xhat, count = sums
        dx = dx - (_per_channel(sum_dy / count, x) + _xhat(x, mean, invstd) * _per_channel(sum_dy_xhat / count, x))
    if weight is not None:
        dx = dx * _per_channel(weight, x)
    if invstd is not None:
        dx = dx * _per_channel(invstd, x)
    dx = dx.to(x.dtype) if need_dx else None
    if record is not None and need_dx:
        record.copy_(gradient(dx))
    return dx, g.to(x.dtype) if need_dresidual else None


# ----------------------------------------------------------------------------------- the two calls of a backend


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    act: str | None,
    save_mask: bool,
    *,
    record: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """y, mean, invstd and the mask. In training the running statistics and the counter are updated in place.

    Not training: normalises by the running statistics, or by nothing at all (identity) where they are None.
    An empty batch leaves the running statistics alone and returns mean 0 and invstd 0.
    ``record`` [8, C] float64 is filled with :func:`activation` of x and y, whatever normalises.
    """
    acc = accumulator(x.dtype)
    if training:
        count, mean, m2 = moments(x)
        invstd = torch.rsqrt(m2 / count + eps) if count else torch.zeros_like(mean)
        update_running(running_mean, running_var, num_batches_tracked, momentum, count, mean, m2)
    elif running_mean is not None:
        mean, invstd = running_mean.to(acc, copy=True), torch.rsqrt(running_var.to(acc) + eps)
    else:
        mean = invstd = None
    y, mask = normalize(x, mean, invstd, weight, bias, residual, act, record=record)
    return y, mean, invstd, mask if save_mask else None


def update_running(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    count: int,
    mean: Tensor,
    m2: Tensor,
) -> None:
    """running = (1 - momentum) * running + momentum * batch, with the unbiased variance M2 / (M - 1), in place.

    The counter, where given, goes up by one first; ``momentum`` None stands for 1 / counter, the cumulative mean.
    """
    if num_batches_tracked is not None:
        num_batches_tracked += 1
    if running_mean is None or count == 0:
        return
    share = momentum if momentum is not None else 1.0 / num_batches_tracked.to(mean.dtype)
    for running, batch in ((running_mean, mean), (running_var, m2 / (count - 1))):
        running.copy_(running.to(mean.dtype) * (1 - share) + batch * share)


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    invstd: Tensor | None,
    mask: Tensor | None,
    act: str | None,
    training: bool,
    needs: tuple[bool, bool, bool, bool],
    *,
    record_gradient: Tensor | None = None,
    record_affine: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dweight, dbias, dresidual), each only where ``needs`` (x, weight, bias, residual) says so.

    ``record_gradient`` [7, C] float64 is filled with :func:`gradient` of dx, where dx is needed; ``record_affine``
    [8, C] float64 with :func:`affine`, unless the normalisation is the identity.
    """
    need_x, need_weight, need_bias, need_residual = needs
    common = (dy, x, mean, invstd, weight, bias, mask, act)
    if record_affine is not None and mean is not None:
        record_affine.copy_(affine(*common))
    dx = dweight = dbias = dresidual = sums = None
    if need_weight or need_bias or (need_x and training):
        sum_dy, sum_dy_xhat = grad_sums(*common)
        dweight = sum_dy_xhat.to(weight.dtype) if need_weight else None
        dbias = sum_dy.to(bias.dtype) if need_bias else None
        sums = (sum_dy, sum_dy_xhat, max(layout(x).count, 1)) if training else None
    if need_x or need_residual:
        dx, dresidual = grad_input(*common, sums, record=record_gradient if need_x else None)
        rows = layout(x).rows
        dx = empty_like(x, rows).copy_(dx) if need_x else None
        dresidual = empty_like(x, rows).copy_(dresidual) if need_residual else None
    return dx, dweight, dbias, dresidual


def differentiable_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    invstd: Tensor | None,
    mask: Tensor | None,
    act: str | None,
    training: bool,
    eps: float,
    needs: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """``backward`` as a differentiable function of dy, x and weight: what double backward differentiates.

    In training the statistics are recomputed from x, since the second derivative runs through them. The ReLU mask
    is constant almost everywhere and is taken as such.
    """
    if mask is None and act == "relu":
        with torch.no_grad():
            passed = ~(_pre_activation(x, mean, invstd, weight, bias).to(x.dtype) <= 0)
            mask = pack_mask(passed, layout(x))
    if training:
        count, mean, m2 = moments(x)
        invstd = torch.rsqrt(m2 / count + eps)
    need_x, need_weight, need_bias, need_residual = needs
    common = (dy, x, mean, invstd, weight, bias, mask, act)
    sum_dy, sum_dy_xhat = grad_sums(*common)
    dx, dresidual = grad_input(*common, (sum_dy, sum_dy_xhat, layout(x).count) if training else None)
    return (
        dx if need_x else None,
        sum_dy_xhat.to(weight.dtype) if need_weight else None,
        sum_dy.to(bias.dtype) if need_bias else None,
        dresidual if need_residual else None,
    )


# ------------------------------------------------------------------------------------- what the kernels record


def activation(x: Tensor, y: Tensor) -> Tensor:
    """The rows ``records.ACTIVATION`` [8, C] of an input x and the output y computed from it.

    Per channel count M, mean = sum x / M, m_k = sum (x - mean)^k for k = 2, 3, 4, the least and largest x that is not
    NaN (inf and -inf where there is none), and the number of y > 0. An empty batch has mean and m_k 0.
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
    rows = [torch.full_like(mean, count), mean, *powers, least.amin(1), largest.amax(1), (y > 0).sum(axes)]
    return torch.stack([row.double() for row in rows])


def gradient(dx: Tensor) -> Tensor:
    """The rows ``records.GRADIENT`` [7, C] of dx: per channel count, sum, sum of absolute values, of squares, and how
    many values are above, below and equal to zero (a NaN is none of these)."""
    wide, axes = dx.double(), _axes(dx)
    sums = [wide.sum(axes), wide.abs().sum(axes), wide.square().sum(axes)]
    signs = [(dx > 0).sum(axes), (dx < 0).sum(axes), (dx == 0).sum(axes)]
    return torch.stack([torch.full_like(sums[0], layout(dx).count), *sums, *(sign.double() for sign in signs)])


def affine(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    act: str | None,
) -> Tensor:
    """The rows ``records.AFFINE`` [8, C]: of the summands d = g (bias) and d = g * xhat (weight), in the accumulator's
    dtype, per channel sum d, sum |d|, sum sign d and the number of d != 0. A NaN has sign 0 and counts as nonzero."""
    g = _masked(dy, x, mean, invstd, weight, bias, mask, act)
    rows = []
    for d in (g, g * _xhat(x, mean, invstd)):
        signs = (d > 0).double() - (d < 0).double()
        rows += [total.sum(_axes(x)) for total in (d.double(), d.double().abs(), signs, (d != 0).double())]
    return torch.stack(rows)


# -------------------------------------------------------------------------------- beside the phases: convolutions


def conv_grad_signs(
    x: Tensor,
    dy: Tensor,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    wanted: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Of a convolution's weight gradient: sum, absolute sum, sign sum and number of its summands d, where ``wanted``.

    The gradient of weight K[o, i, p, q] sums, over images n and output places (h, w) ::

        d = dy[n, o, h, w] * x[n, i, h * stride + p - padding, w * stride + q - padding]

    with zeros on the padding. Each d is one product, so |d| = |dy| |x| and sign d = sign dy * sign x: each result is
    the weight gradient of other operands. sum and abs_sum have the accumulator's dtype; sign_sum and nonzero are exact,
    int32. A NaN has sign 0 and is not zero; signs and zeros are those of the factors (0 * inf counts as zero).

    x [N, I, H, W], dy [N, O, H', W'] of one dtype, any strides; each result [O, I, *kernel_size].
    Source: Bjorck et al., "Understanding Batch Normalization", 2018, equation 4 and Table 1.
    """
    shape = (dy.shape[1], x.shape[1], *kernel_size)

    def total(x: Tensor, dy: Tensor) -> Tensor:
        if dy.numel() == 0 or x.numel() == 0:
            return x.new_zeros(shape)
        return torch.nn.grad.conv2d_weight(x, shape, dy, stride, padding)

    def signs(t: Tensor) -> Tensor:
        return (t > 0).double() - (t < 0).double()

    acc = accumulator(x.dtype)
    pairs = (
        lambda: total(x.to(acc), dy.to(acc)),
        lambda: total(x.to(acc).abs(), dy.to(acc).abs()),
        lambda: total(signs(x), signs(dy)).round().int(),
        lambda: total((x != 0).double(), (dy != 0).double()).round().int(),
    )
    return tuple(pair() if want else None for pair, want in zip(pairs, wanted, strict=True))


# ------------------------------------------------------------------------------------------------- shared terms


def _xhat(x: Tensor, mean: Tensor | None, invstd: Tensor | None) -> Tensor:
    acc = x.to(accumulator(x.dtype))
    return acc if mean is None else (acc - _per_channel(mean, x)) * _per_channel(invstd, x)


def _pre_activation(
    x: Tensor, mean: Tensor | None, invstd: Tensor | None, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    z = _xhat(x, mean, invstd)
    if weight is not None:
        z = z * _per_channel(weight, x)
    if bias is not None:
        z = z + _per_channel(bias, x)
    return z


def _masked(
    dy: Tensor,
    x: Tensor,
    mean: Tensor | None,
    invstd: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    act: str | None,
) -> Tensor:
    """g: dy where the ReLU let the value through. Without a saved mask it is recomputed as the forward rounded."""
    g = dy.to(accumulator(x.dtype))
    if act != "relu":
        return g
    if mask is not None:
        passed = unpack_mask(mask, x)
    else:
        passed = ~(_pre_activation(x, mean, invstd, weight, bias).to(x.dtype) <= 0)
    return torch.where(passed, g, torch.zeros_like(g))


def pack_mask(passed: Tensor, like: Layout) -> Tensor:
    """Boolean [N, C, ...] to the mask's bytes (``Layout.mask_shape``), least significant bit first."""
    bits = passed.movedim(1, -1).reshape(1, -1) if like.rows else passed.reshape(like.n * like.c, like.s)
    bits = torch.nn.functional.pad(bits.to(torch.uint8), (0, -bits.shape[1] % 8))
    bits = bits.view(bits.shape[0], bits.shape[1] // 8, 8)
    shifts = torch.arange(8, dtype=torch.uint8, device=passed.device)
    return (bits << shifts).sum(-1, dtype=torch.uint8).view(like.mask_shape)


def unpack_mask(mask: Tensor, x: Tensor) -> Tensor:
    """The mask's bytes back to boolean [N, C, ...], for the layout of x."""
    rows, n, c, s = layout(x)
    shifts = torch.arange(8, dtype=torch.uint8, device=mask.device)
    bits = (mask.unsqueeze(-1) >> shifts) & 1
    if rows:
        return bits.flatten()[: n * c * s].view(n, *x.shape[2:], c).movedim(-1, 1).bool()
    return bits.flatten(-2)[..., :s].reshape(x.shape).bool()


# ------------------------------------------------------------------------ images for training: beside the phases

PAD = 4  # zeros on every side of an image before a window of its own size is cut out
WORD = 2**32 - 1
# What random words are drawn for: the third word of Philox's counter.
ORDER, CROP, VALIDATION = 0, 1, 2


def words(seed: int | Tensor) -> tuple[int | Tensor, int | Tensor]:
    """The low and the high word of 64 bits: a seed as Philox's key."""
    return seed & WORD, seed >> 32 & WORD


def philox(key: tuple, counter: tuple) -> tuple:
    """Philox4x32-10: four random words for a key of two words and a counter of four.

    A word is 32 bits, as an int or in an int64 tensor; tensors broadcast. Source: Salmon, Moraes, Dror and Shaw,
    "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    (k0, k1), (c0, c1, c2, c3) = key, counter
    for _ in range(10):
        (high0, low0), (high2, low2) = _product(0xD2511F53, c0), _product(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, low2, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + 0x9E3779B9 & WORD, k1 + 0xBB67AE85 & WORD
    return c0, c1, c2, c3


def _product(a: int, b: int | Tensor) -> tuple:
    """The high and the low word of a * b, by halves of b, since int64 does not hold the product."""
    upper, lower = a * (b >> 16), a * (b & 0xFFFF)
    return upper + (lower >> 16) >> 16, ((upper & 0xFFFF) << 16) + lower & WORD


def augment(
    images: Tensor,
    labels: Tensor,
    order: Tensor,
    state: Tensor,
    position: Tensor,
    table: Tensor,
    out: Tensor,
    labels_out: Tensor,
    size: int,
    first: int,
    random: bool,
) -> None:
    """One batch of an epoch: gathered, cropped, flipped, normalised; its labels beside it.

    With i = order[position * size + first + k], for k below the B of ``out``, and (w0, w1, w2, _) =
    philox(words(seed), (epoch, i, CROP, 0)):

        down  = w0 * 9 >> 32     right = w1 * 9 >> 32     flip = w2 >> 31
        pixel = images[i] within PAD zeros on every side, at (c, y + down, x' + right), x' = 31 - x if flip else x
        out[k, c, y, x] = table[c, pixel]                  labels_out[k] = labels[i]

    Each of the 9 offsets has the probability 1/9 to within 2^-32. Without ``random`` down = right = PAD and nothing
    is flipped. A position that is no whole batch of the order gives NaN and labels of -1: it is read on the device,
    where nothing can be raised without waiting for it.

    Args:
        images: uint8 [n, 3, 32, 32], contiguous. labels: int64 [n].
        order: int64 [n], a permutation. state: int64 [2], the bits of the seed, and the epoch below 2^32.
        position: int64 scalar: which batch of ``size`` images; ``first`` is where in it this part begins.
        table: [3, 256], what becomes of each value of each channel, floating point.
        out: [B, 3, 32, 32] of the table's dtype, dense or channels_last, written. labels_out: int64 [B], written.
    """
    seed, epoch = state
    exists = (position >= 0) & (position < len(order) // size)
    k, c, side = (torch.arange(n, device=out.device) for n in (len(out), 3, 32))
    index = order[torch.where(exists, position, 0) * size + first + k]
    down = right = torch.full_like(index, PAD)
    flip = torch.zeros_like(index)
    if random:
        w0, w1, w2, _ = philox(words(seed), (epoch, index, CROP, 0))
        down, right, flip = w0 * (2 * PAD + 1) >> 32, w1 * (2 * PAD + 1) >> 32, w2 >> 31
    y = side + down[:, None]
    x = torch.where(flip[:, None] == 1, 31 - side, side) + right[:, None]
    padded = torch.nn.functional.pad(images[index], (PAD,) * 4)
    channel = c.view(3, 1, 1)
    pixel = padded[k.view(-1, 1, 1, 1), channel, y[:, None, :, None], x[:, None, None, :]].int()
    out.copy_(torch.where(exists, table[channel, pixel], torch.nan))
    labels_out.copy_(torch.where(exists, labels[index], -1))
