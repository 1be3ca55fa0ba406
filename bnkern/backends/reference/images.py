"""Batches of CIFAR images for training and their random numbers in plain torch, as a specification of the kernels."""

import torch
from torch import Tensor

PAD = 4  # the number of zeros added on every side of an image before a window of the image's size is cropped
WORD = 2**32 - 1
# The streams of random words: the third word of Philox's counter.
ORDER, CROP, VALIDATION = 0, 1, 2


def words(seed: int | Tensor) -> tuple[int | Tensor, int | Tensor]:
    """The low and the high word of a 64-bit seed, which are Philox's key."""
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
    """The high and the low word of a * b. It uses the halves of b, because int64 cannot hold the product."""
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
    """One batch of an epoch, gathered, cropped, flipped and normalised, and its labels.

    With i = order[position * size + first + k], for k below the B of ``out``, and (w0, w1, w2, _) =
    philox(words(seed), (epoch, i, CROP, 0)):

        down  = w0 * 9 >> 32     right = w1 * 9 >> 32     flip = w2 >> 31
        pixel = images[i] within PAD zeros on every side, at (c, y + down, x' + right), x' = 31 - x if flip else x
        out[k, c, y, x] = table[c, pixel]                  labels_out[k] = labels[i]

    Each of the 9 offsets has the probability 1/9 to within 2^-32. Without ``random`` down = right = PAD, and no image
    is flipped. If the order has no whole batch at the position, images are NaN and labels are -1. No error is raised,
    because the position is read on the device.

    Args:
        images: uint8 [n, 3, 32, 32], contiguous. labels: int64 [n].
        order: int64 [n], a permutation. state: int64 [2], the bits of the seed, and the epoch below 2^32.
        position: int64 scalar, the number of the batch of ``size`` images. ``first``: the index in the batch at which
            this part begins.
        table: [3, 256], the normalised value of each byte for each channel, floating point.
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
