"""``augment``: a batch of images, gathered, cropped, flipped and normalised in one launch."""

import triton.language as tl
from torch import Tensor

from ..layout import layout
from .common import kernel, launch

# A program makes a third of an image, in memory order. With one program per image, 128 images would leave a GPU idle.
BLOCK = 1024


@kernel
def augment_kernel(
    images_ptr, labels_ptr, order_ptr, state_ptr, position_ptr, table_ptr, out_ptr, labels_out_ptr,
    batches, size, first, random, rows,
    BLOCK: tl.constexpr,
):  # fmt: skip
    k = tl.program_id(0).to(tl.int64)
    position = tl.load(position_ptr)
    exists = (position >= 0) & (position < batches)
    index = tl.load(order_ptr + position * size + first + k, mask=exists, other=0)

    seed, epoch = tl.load(state_ptr), tl.load(state_ptr + 1)
    # The counter's third word, 1, is the stream of crops.
    w0, w1, w2, _ = tl.philox(seed, epoch.to(tl.uint32), index.to(tl.uint32), 1, 0)
    down = tl.where(random != 0, ((w0.to(tl.uint64) * 9) >> 32).to(tl.int32), 4)
    right = tl.where(random != 0, ((w1.to(tl.uint64) * 9) >> 32).to(tl.int32), 4)
    flip = (random != 0) & ((w2 >> 31) != 0)

    element = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    channel = tl.where(rows != 0, element % 3, element // 1024)
    pixel_index = tl.where(rows != 0, element // 3, element % 1024)
    x = pixel_index % 32
    y = pixel_index // 32 + down - 4
    x = tl.where(flip, 31 - x, x) + right - 4
    inside = exists & (y >= 0) & (y < 32) & (x >= 0) & (x < 32)
    pixel = tl.load(images_ptr + index * 3072 + (channel * 1024 + y * 32 + x), mask=inside, other=0)
    value = tl.load(table_ptr + (channel * 256 + pixel.to(tl.int32)))
    nan = tl.full((BLOCK,), float("nan"), tl.float32).to(value.dtype)  # the interpreter has no bfloat16 constants
    tl.store(out_ptr + k * 3072 + element, tl.where(exists, value, nan))
    label = tl.load(labels_ptr + index, mask=exists, other=-1)
    tl.store(labels_out_ptr + k, label, mask=tl.program_id(1) == 0)


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
    """Writes one batch of an epoch to ``out`` and ``labels_out``. ``position`` is read on the device."""
    launch(
        augment_kernel, (len(out), 3 * 1024 // BLOCK), out.device,
        images, labels, order, state, position, table, out, labels_out,
        len(order) // size, size, first, int(random), int(layout(out).rows), BLOCK=BLOCK,
    )  # fmt: skip
