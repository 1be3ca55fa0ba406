"""What can be measured inside a network, each quantity with its formula, unit and source.

"The paper" is Bjorck, Gomes, Selman and Weinberger, "Understanding Batch Normalization", 2018.
"""

from typing import NamedTuple

from torch import Tensor
from torch.nn.grad import conv2d_weight

import bnkern


class GradSigns(NamedTuple):
    """Sums over the summands d of each weight's gradient; every field has the shape of the weight."""

    sum: Tensor
    abs_sum: Tensor
    sign_sum: Tensor
    nonzero: Tensor


def weight_gradient_signs(
    x: Tensor,
    dy: Tensor,
    kernel_size: tuple[int, int],
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
) -> GradSigns:
    """Do the summands of a convolution's weight gradient agree in sign?

    The gradient of weight K[o, i, p, q] is the sum over images b and output places (h, w) of the summands ::

        d = dy[b, o, h, w] * x[b, i, h * stride + p - padding, w * stride + q - padding]

    Returned are sum d (the gradient itself), sum |d|, sum sign(d) and the number of d != 0. Each d is one product,
    so |d| and sign(d) factor, and each sum is the weight-gradient operator W of the convolution on other operands:
    sum |d| = W(|x|, |dy|), sum sign(d) = W(sign x, sign dy), the count = W([x != 0], [dy != 0]). Summands on the
    padding are zero.

    Args:
        x: the convolution's input [N, I, H, W].
        dy: gradient at the convolution's own output [N, O, H', W'], before any normalisation; dtype of x.
        kernel_size, stride, padding: the convolution's.

    Returns:
        GradSigns of [O, I, *kernel_size] in the dtype of x. ``sum`` can be hundreds of times smaller than
        ``abs_sum``: give float64 operands where its digits matter. Unit: that of the loss.

    Source: the paper, Table 1 and Appendix J.
    """
    shape = (dy.shape[1], x.shape[1], *kernel_size)

    def total(x: Tensor, dy: Tensor) -> Tensor:
        return conv2d_weight(x, shape, dy, stride, padding)

    return GradSigns(
        sum=total(x, dy),
        abs_sum=total(x.abs(), dy.abs()),
        sign_sum=total(x.sign(), dy.sign()),
        nonzero=total((x != 0).to(x.dtype), (dy != 0).to(dy.dtype)),
    )


class LogMoments(NamedTuple):
    """Natural logarithms of each channel's |mean| and standard deviation, [C] each."""

    ln_abs_mean: Tensor
    ln_std: Tensor


def log_moments(x: Tensor) -> LogMoments:
    """Scale of each channel's activations: ln |mean| and ln std over the batch and all places.

    Args:
        x: [N, C, ...], a layer's output as stored.

    Returns:
        LogMoments of [C], float32 (float64 for float64 x), from the biased variance; -inf for a mean or standard
        deviation of exactly zero (dead or constant channels). Unit: ln of x's.

    Source: the paper, Figure 5, which averages these logarithms over channels.
    """
    _, mean, var = bnkern.channel_moments(x)
    return LogMoments(mean.abs().log(), var.log() / 2)
