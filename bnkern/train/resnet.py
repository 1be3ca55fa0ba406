"""The CIFAR ResNet of He et al. (2015), section 4.2, with its normalisation on bnkern's fused kernels.

Layers are numbered as in "Understanding Batch Normalization": 1 is the first convolution, block k = 0, 1, ... holds
layers 2 + 2k and 3 + 2k, and the last number, the depth, is the classifier. Projections carry no number.
"""

import torch.nn.functional as F
from torch import Tensor, nn

import bnkern.nn

WIDTHS = (16, 32, 64)  # channels of the three stages, on 32 x 32, 16 x 16 and 8 x 8 pixels


class ResNet(nn.Module):
    """A residual network of 6n + 2 layers for 32 x 32 images: 3 stages of n blocks of 2 convolutions.

    Convolutions are 3 x 3 without bias, Xavier-normal (the paper, section 5); the classifier keeps torch's
    initialisation. Parameters are drawn from torch's global generator, so ``torch.manual_seed`` fixes them, and
    equally for every ``norm`` and ``kernels``.

    Args:
        depth: 6n + 2: 8, 14, 20, ... 110, ...
        norm: "batch", or "none" for the un-normalised network.
        shortcut: where the shape changes, "projection" (1 x 1 convolution, normalised like the others; option B of
            He et al.) or "padding" (every second pixel, zero channels on both sides; option A).
        kernels: "bnkern" for the fused kernels, "torch" for torch's own modules one by one: the baseline, with the
            same parameters from the same seed and the same state_dict.
        classes: number of logits.

    forward: images [N, 3, H, W] -> logits [N, classes].

    Raises:
        ValueError: an argument is none of the above; names it.
    """

    def __init__(
        self,
        depth: int = 110,
        norm: str = "batch",
        shortcut: str = "projection",
        kernels: str = "bnkern",
        classes: int = 10,
    ) -> None:
        super().__init__()
        if depth < 8 or depth % 6 != 2:
            raise ValueError(f"depth must be 6n + 2 with n >= 1 (8, 14, 20, ...), got {depth}")
        _check("norm", norm, ("batch", "none"))
        _check("shortcut", shortcut, ("projection", "padding"))
        _check("kernels", kernels, tuple(_KERNELS))
        normed, plain = _KERNELS[kernels]

        def norm_act(channels: int, act: str | None = "relu") -> nn.Module:
            return normed(channels, act=act) if norm == "batch" else plain(act)

        self.depth = depth
        self.conv = _conv(3, WIDTHS[0])
        self.norm = norm_act(WIDTHS[0])
        blocks, channels = [], WIDTHS[0]
        for width in WIDTHS:
            for _ in range((depth - 2) // 6):
                blocks.append(_Block(channels, width, shortcut, norm_act))
                channels = width
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(channels, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_normal_(module.weight)

    def forward(self, images: Tensor) -> Tensor:
        x = self.blocks(self.norm(self.conv(images)))
        return self.fc(x.mean((2, 3)))


def layers(model: ResNet) -> dict[int, nn.Module]:
    """The convolutions and the classifier under the paper's numbers 1 .. depth."""
    numbered = [model.conv]
    for block in model.blocks:
        numbered += [block.conv1, block.conv2]
    return dict(enumerate([*numbered, model.fc], start=1))


class _Block(nn.Module):
    """relu(norm(conv(relu(norm(conv(x))))) + shortcut(x)); halves the resolution where the width changes."""

    def __init__(self, channels: int, width: int, shortcut: str, norm_act) -> None:
        super().__init__()
        stride = 1 if channels == width else 2
        self.conv1 = _conv(channels, width, stride)
        self.norm1 = norm_act(width)
        self.conv2 = _conv(width, width)
        self.norm2 = norm_act(width)
        if stride == 1:
            self.shortcut = nn.Identity()
        elif shortcut == "padding":
            self.shortcut = _Padding((width - channels) // 2)
        else:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False), norm_act(width, act=None))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(self.conv1(x))
        return self.norm2(self.conv2(y), self.shortcut(x))


class _Padding(nn.Module):
    """Every second pixel, with ``channels`` zero channels on either side: a shortcut without parameters."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.channels, self.channels))


class _TorchBatchNorm2d(nn.BatchNorm2d):
    """bnkern.nn.BatchNorm2d's call on torch's kernels, one operation after the other."""

    def __init__(self, channels: int, act: str | None) -> None:
        super().__init__(channels)
        self.act = act

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return _torch_act(super().forward(x), residual, self.act)


class _TorchActivation(nn.Module):
    """bnkern.nn.Activation's call on torch's kernels."""

    def __init__(self, act: str | None) -> None:
        super().__init__()
        self.act = act

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return _torch_act(x, residual, self.act)


def _torch_act(x: Tensor, residual: Tensor | None, act: str | None) -> Tensor:
    if residual is not None:
        x = x + residual
    return F.relu(x) if act else x


# what norm + activation, and activation alone, are made of
_KERNELS = {
    "bnkern": (bnkern.nn.BatchNorm2d, bnkern.nn.Activation),
    "torch": (_TorchBatchNorm2d, _TorchActivation),
}


def _conv(channels: int, width: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)


def _check(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")
