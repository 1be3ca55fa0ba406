"""The sums over the summands of a convolution's weight gradient in plain torch, as a specification of the kernels."""

from torch import Tensor
from torch.nn.grad import conv2d_weight

from .dtypes import accumulator


def conv_grad_signs(
    x: Tensor,
    dy: Tensor,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    wanted: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Sum, absolute sum, sign sum and number of nonzero summands of a convolution's weight gradient, where ``wanted``.

    The gradient of weight K[o, i, p, q] sums, over images n and output positions (h, w) ::

        d = dy[n, o, h, w] * x[n, i, h * stride + p - padding, w * stride + q - padding]

    with zeros in the padding. Each d is one product, so |d| = |dy| |x| and sign d = sign dy * sign x. So each result is
    the weight gradient for other operands. sum and abs_sum have the accumulator's dtype. sign_sum and nonzero are exact
    and int32. A NaN has sign 0 and is not zero. Signs and zeros are those of the factors (0 * inf counts as zero).

    x [N, I, H, W], dy [N, O, H', W'] of one dtype, any strides; each result [O, I, *kernel_size].
    Source: Bjorck et al., "Understanding Batch Normalization", 2018, equation 4 and Table 1.
    """
    shape = (dy.shape[1], x.shape[1], *kernel_size)

    def total(x: Tensor, dy: Tensor) -> Tensor:
        if dy.numel() == 0 or x.numel() == 0:
            return x.new_zeros(shape)
        return conv2d_weight(x, shape, dy, stride, padding)

    def signs(t: Tensor) -> Tensor:
        return (t > 0).double() - (t < 0).double()

    acc = accumulator(x.dtype)
    pairs = (
        lambda: total(x.to(acc), dy.to(acc)),
        lambda: total(x.to(acc).abs(), dy.to(acc).abs()),
        lambda: total(signs(x), signs(dy)).round().int(),
        lambda: total((x != 0).double(), (dy != 0).double()).round().int(),
    )
    sum, abs_sum, sign_sum, nonzero = (pair() if want else None for pair, want in zip(pairs, wanted, strict=True))
    return sum, abs_sum, sign_sum, nonzero
