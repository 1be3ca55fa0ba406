"""Calls of ``conv_norm_forward``, and their results against the reference in float64.

r is compared with the convolution of the y that a kernel rounded, and the statistics with those of the r that it
rounded, so each bound contains one step only.
"""

import torch
from torch import Tensor

from bnkern.backends import reference
from bnkern.backends.calls import ForwardCall

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# The stages of a CIFAR ResNet, and images whose rows, pixels and tiles are not full. (images, channels, rows, columns)
STAGES = [(2, 16, 32, 32), (2, 32, 16, 16), (2, 64, 8, 8)]
ODD = [(3, 16, 7, 7), (2, 32, 5, 9), (5, 64, 5, 9), (1, 64, 16, 16), (1, 16, 1, 3), (9, 32, 2, 1)]
CALLS = [("none", None), ("plain", "relu"), ("residual", "relu"), ("residual", None)]  # Problem.norm and act
# Half a unit in the last place, relative to the value: 8 and 11 bits of significand. fp16 also has subnormal values.
ROUNDING = {torch.bfloat16: (2**-8, 0.0), torch.float16: (2**-11, 2**-25)}


def last(t: Tensor) -> Tensor:
    """The values of ``t`` in channels_last."""
    return t.contiguous(memory_format=torch.channels_last)


class Problem:
    """Operands of a call. ``norm`` "none": the source is y itself, "plain": a norm, "residual": one with a residual."""

    def __init__(
        self, size: tuple[int, ...], dtype: torch.dtype, norm: str, act: str | None, **options: object
    ) -> None:
        generator = torch.Generator().manual_seed(len(norm) + sum(size))
        n, c, h, w = size

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        def images() -> Tensor:
            return random(n, c, h, w).to(dtype).contiguous(memory_format=torch.channels_last)

        self.weight = (random(c, c, 3, 3) / (3 * c**0.5)).to(dtype)
        if options.get("weight", "channels_last") == "channels_last":
            self.weight = self.weight.contiguous(memory_format=torch.channels_last)
        vectors = options.get("vectors", torch.float32)
        self.keep = bool(options.get("keep", norm == "residual"))
        self.mean, self.invstd = (0.3 * random(c), random(c).abs() + 0.5) if norm != "none" else (None, None)
        self.source: ForwardCall | Tensor = images()
        if norm != "none":
            self.source = ForwardCall(
                self.source,
                random(c).to(vectors),
                random(c).to(vectors),
                images() if norm == "residual" else None,
                act=act,
                save_mask=True,
            )
        momentum = options.get("momentum", 0.1)
        running = random(c).to(vectors), random(c).abs().to(vectors), torch.tensor(4)
        self.norm = ForwardCall(None, None, None, None, *running, momentum=momentum)

    def to(self, device: torch.device | str) -> "Problem":
        """Moves the operands to a device."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor | ForwardCall):
                setattr(self, name, moved(value, device))
        return self


def moved(value: Tensor | ForwardCall, device: torch.device | str) -> Tensor | ForwardCall:
    if isinstance(value, Tensor):
        return value.to(device)
    return ForwardCall(*(t.to(device) if isinstance(t, Tensor) else t for t in value))


def check_convolution(y: Tensor, weight: Tensor, r: Tensor) -> None:
    """r against the convolution of y."""
    truth = torch.nn.functional.conv2d(y.double(), weight.double(), padding=1)
    magnitude = torch.nn.functional.conv2d(y.double().abs(), weight.double().abs(), padding=1)
    # The stored value is rounded once. The sum is rounded to float32 after each of 9 C / 16 products of a fragment; a
    # device may cut off bits inside of a product, which is given four times as much.
    relative, absolute = ROUNDING[r.dtype]
    bound = relative * 1.01 * truth.abs() + absolute + 2**-22 * (9 * weight.shape[0] // 16) * magnitude
    assert ((r.double() - truth).abs() <= bound).all()
    assert r.is_contiguous(memory_format=torch.channels_last)


def check_statistics(norm: ForwardCall, r: Tensor, mean: Tensor, invstd: Tensor, running: tuple) -> None:
    """Of r as rounded. ``norm`` is the call before, ``running`` its statistics and counter afterwards.

    Sums of at most 1,024 values are in float32, by a tree, and in double from there on.
    """
    count, true_mean, m2 = reference.moments(r.double())
    sigma = (m2 / count).sqrt()
    assert ((mean - true_mean).abs() <= 1e-6 * true_mean.abs() + 1e-6 * sigma + 1e-12).all()
    torch.testing.assert_close(invstd.double(), torch.rsqrt(m2 / count + norm.eps), rtol=1e-5, atol=0)
    expected = norm._replace(
        running_mean=norm.running_mean.double(),
        running_var=norm.running_var.double(),
        num_batches_tracked=norm.num_batches_tracked.clone(),
    )
    reference.update_running(expected, count, true_mean, m2)
    for actual, truth in zip(running[:2], expected[4:6], strict=True):
        rounding = {torch.float32: 1e-5}.get(actual.dtype) or ROUNDING[actual.dtype][0]
        torch.testing.assert_close(actual.double(), truth, rtol=rounding, atol=1e-5)
    assert running[2] == expected.num_batches_tracked
