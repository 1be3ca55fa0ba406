"""The CIFAR ResNet of He et al. (2015), section 4.2, with bnkern's fused kernels for its normalisation.

Layers are numbered as in "Understanding Batch Normalization". Layer 1 is the first convolution, block k = 0, 1, ... has
the layers 2 + 2k and 3 + 2k, and the last number, the depth, is the classifier. Projections have no number.
"""

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnkern
import bnkern.nn
from bnkern.nn import ChainLink

WIDTHS = (16, 32, 64)  # channels of the three stages, on 32 x 32, 16 x 16 and 8 x 8 pixels
NORMS = ("batch", "none", "final", "layer", "group", "instance", "affine")
SHORTCUTS = ("projection", "padding")
INITS = ("xavier_normal", "xavier_uniform", "kaiming", "fixup")
KERNELS = ("bnkern", "torch")
GROUPS = 8  # for norm="group", with 2, 4 and 8 channels each. 16 channels do not allow the 32 groups of Wu and He.


class ResNet(nn.Module):
    """A residual network of 6n + 2 layers for 32 x 32 images: 3 stages of n blocks of 2 convolutions.

    Convolutions are 3 x 3 without bias. The classifier has torch's initialisation, except with "fixup". Parameters are
    drawn from torch's global generator, so ``torch.manual_seed`` determines them. They are the same for every ``norm``
    and ``kernels``.

    Args:
        depth: 6n + 2: 8, 14, 20, ... 110, ... 1202, ...
        norm: "batch"; "none" for the un-normalised network; "final" for one batch norm of the last block's output,
            before the pooling, and no other norm; "layer", "group" (8 groups) and "instance" for those norms with a
            weight and a bias per channel. "layer" normalises over the channels and pixels of an image. "affine" for
            batch norms whose statistics are frozen at mean 0 and variance 1, with eps 0: only weight and bias are left.
        shortcut: The shortcut where the shape changes: "projection" (1 x 1 convolution, normalised like the others;
            option B of He et al.) or "padding" (every second pixel, zero channels on both sides; option A).
        kernels: "bnkern" for the fused kernels, or "torch" for torch's own modules, called one after the other. The
            latter is the baseline. It has the same parameters for the same seed, and the same state_dict.
        classes: The number of logits.
        init: The initialisation of the convolutions: "xavier_normal" (the paper, section 5), "xavier_uniform",
            "kaiming" (normal, fan out) or "fixup" (Zhang, Dauphin and Ma, 2019; only with norm="none"). "fixup" is
            Kaiming normal, in branches times L^(-1/2) for L blocks. The last convolution of each branch and the
            classifier are zero. There is a scalar bias before each convolution, each activation and the classifier,
            and one multiplier per branch.

    forward: images [N, 3, H, W] -> logits [N, classes].

    Raises:
        ValueError: An argument has another value. The message names it.
    """

    def __init__(
        self,
        depth: int = 110,
        norm: str = "batch",
        shortcut: str = "projection",
        kernels: str = "bnkern",
        classes: int = 10,
        init: str = "xavier_normal",
    ) -> None:
        super().__init__()
        check_options(depth, norm, shortcut, kernels, init)
        fixup = init == "fixup"

        def norm_act(channels: int, act: str | None = "relu", scaled: bool = False) -> nn.Module:
            return _Fixup(act, kernels, scaled) if fixup else _norm_act(norm, kernels, channels, act)

        self.depth = depth
        conv = bnkern.nn.Conv2d if kernels == "bnkern" else nn.Conv2d
        self.conv = _conv(conv, 3, WIDTHS[0])
        self.norm = norm_act(WIDTHS[0])
        blocks, channels = [], WIDTHS[0]
        for width in WIDTHS:
            for _ in range((depth - 2) // 6):
                blocks.append(_Block(conv, channels, width, shortcut, norm_act, fixup))
                channels = width
        self.blocks = bnkern.nn.Chain(*blocks) if kernels == "bnkern" else nn.Sequential(*blocks)
        self.final = _norm_act("batch", kernels, channels, None) if norm == "final" else None
        self.bias = _scalar(0.0) if fixup else None  # the bias of Fixup before the classifier
        self.fc = nn.Linear(channels, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                _draw_(module.weight, init)
        if fixup:
            _fixup_(self)

    def forward(self, images: Tensor) -> Tensor:
        x = self.blocks(self.norm(self.conv(images)))
        if self.final is not None:
            x = self.final(x)
        x = x.mean((2, 3))
        return self.fc(x if self.bias is None else x + self.bias)


def layers(model: ResNet) -> dict[int, nn.Module]:
    """Returns the convolutions and the classifier by the paper's numbers 1 .. depth."""
    numbered: list[nn.Module] = [model.conv]
    for block in _blocks(model):
        numbered += [block.conv1, block.conv2]
    return dict(enumerate([*numbered, model.fc], start=1))


def _blocks(model: ResNet) -> "list[_Block]":
    return cast("list[_Block]", list(model.blocks))


def check_options(depth: int, norm: str, shortcut: str, kernels: str, init: str) -> None:
    """Raises a ValueError that names the option if an option of :class:`ResNet` has none of its values."""
    if depth < 8 or depth % 6 != 2:
        raise ValueError(f"depth must be 6n + 2 with n >= 1 (8, 14, 20, ...), got {depth}")
    for name, value, allowed in (
        ("norm", norm, NORMS),
        ("shortcut", shortcut, SHORTCUTS),
        ("kernels", kernels, KERNELS),
        ("init", init, INITS),
    ):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")
    if init == "fixup" and norm != "none":
        raise ValueError(f'init="fixup" is for the un-normalised network, norm="none"; got norm={norm!r}')


class _Block(nn.Module):
    """relu(norm(conv(relu(norm(conv(x))))) + shortcut(x)), at half the resolution if the width changes."""

    def __init__(
        self, conv: type[nn.Conv2d], channels: int, width: int, shortcut: str, norm_act: Callable, fixup: bool
    ) -> None:
        super().__init__()
        stride = 1 if channels == width else 2
        self.bias1: nn.Parameter | None
        self.bias2: nn.Parameter | None
        self.bias1, self.bias2 = (_scalar(0.0), _scalar(0.0)) if fixup else (None, None)
        self.conv1 = _conv(conv, channels, width, stride)
        self.norm1 = norm_act(width)
        self.conv2 = _conv(conv, width, width)
        self.norm2 = norm_act(width, scaled=True)
        if stride == 1:
            self.shortcut: nn.Module = nn.Identity()
        elif shortcut == "padding":
            self.shortcut = _Padding((width - channels) // 2)
        else:
            normed = nn.Identity() if fixup else norm_act(width, act=None)
            self.shortcut = nn.Sequential(conv(channels, width, 1, stride, bias=False), normed)

    def chain_links(self) -> list[ChainLink] | None:
        if self.bias1 is not None or not isinstance(self.shortcut, nn.Identity):
            return None
        return [ChainLink(self.conv1, self.norm1), ChainLink(self.conv2, self.norm2, 0)]

    def start_chain(self, x: Tensor) -> tuple[Tensor, list[ChainLink]]:
        if self.bias1 is not None:
            return self(x), []
        return self.norm1(self.conv1(x)), [ChainLink(self.conv2, self.norm2, self.shortcut(x))]

    def forward(self, x: Tensor) -> Tensor:
        if self.bias1 is None or self.bias2 is None:
            y = self.norm1(self.conv1(x))
            return self.norm2(self.conv2(y), self.shortcut(x))
        y = self.norm1(self.conv1(x + self.bias1))
        return self.norm2(self.conv2(y + self.bias2), self.shortcut(x))


class _Padding(nn.Module):
    """A shortcut without parameters: every second pixel, with ``channels`` zero channels on both sides."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.channels, self.channels))


def _conv(conv: type[nn.Conv2d], channels: int, width: int, stride: int = 1) -> nn.Conv2d:
    return conv(channels, width, 3, stride, padding=1, bias=False)


# ------------------------------------------------- norm + residual + activation, with bnkern's or torch's kernels


def _torch_act(x: Tensor, residual: Tensor | None, act: str | None) -> Tensor:
    if residual is not None:
        x = x + residual
    return F.relu(x) if act else x


class _TorchBatchNorm2d(nn.BatchNorm2d):
    """Has the call of bnkern.nn.BatchNorm2d and runs torch's kernels, one operation after the other."""

    def __init__(self, channels: int, act: str | None, frozen: bool = False) -> None:
        super().__init__(channels, eps=0.0 if frozen else 1e-5)
        self.act, self.frozen = act, frozen
        self.train()

    def train(self, mode: bool = True) -> "_TorchBatchNorm2d":
        return super().train(mode and not self.frozen)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return _torch_act(super().forward(x), residual, self.act)


class _TorchActivation(nn.Module):
    """Has the call of bnkern.nn.Activation and runs torch's kernels."""

    def __init__(self, act: str | None) -> None:
        super().__init__()
        self.act = act

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return _torch_act(x, residual, self.act)


class _GroupNorm(nn.GroupNorm):
    """act(group_norm(x) + residual). The norm is torch's; bnkern (``fused``) or torch computes the rest."""

    def __init__(self, groups: int, channels: int, act: str | None, fused: bool) -> None:
        super().__init__(groups, channels)
        self.act, self.fused = act, fused

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        x = super().forward(x)
        if self.fused and (self.act or residual is not None):
            return bnkern.add_act(x, residual, self.act)
        return _torch_act(x, residual, self.act)


class _InstanceNorm(nn.InstanceNorm2d):
    """act(instance_norm(x) + residual), by torch, or (``fused``) as the batch norm of one image with N C channels.

    Only in NCHW each of these N C channels is contiguous. A channels_last tensor is copied to NCHW and back.
    """

    def __init__(self, channels: int, act: str | None, fused: bool) -> None:
        super().__init__(channels, affine=True)
        self.act, self.fused = act, fused

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if not self.fused:
            return _torch_act(super().forward(x), residual, self.act)
        n, c, *places = x.shape
        y = bnkern.batch_norm(
            x.reshape(1, n * c, *places),
            None,
            None,
            self.weight.repeat(n),
            self.bias.repeat(n),
            training=True,
            eps=self.eps,
            residual=None if residual is None else residual.reshape(1, n * c, *places),
            act=self.act,
        )
        last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        return y.reshape(x.shape).contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


class _Fixup(nn.Module):
    """act(scale * x + bias + residual) with a scalar bias and, where ``scaled``, a scalar multiplier.

    This is a batch norm in eval mode with mean 0 and variance 1, so the kernels of batch norm compute it.
    """

    def __init__(self, act: str | None, kernels: str, scaled: bool = False) -> None:
        super().__init__()
        self.act, self.fused = act, kernels == "bnkern"
        self.bias = _scalar(0.0)
        self.scale = _scalar(1.0) if scaled else None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if not self.fused:
            return _torch_act((x if self.scale is None else x * self.scale) + self.bias, residual, self.act)
        bias = self.bias.repeat(x.shape[1])
        scale = None if self.scale is None else self.scale.repeat(x.shape[1])
        zeros, ones = torch.zeros_like(bias), torch.ones_like(bias)
        return bnkern.batch_norm(x, zeros, ones, scale, bias, eps=0.0, residual=residual, act=self.act)


def _norm_act(norm: str, kernels: str, channels: int, act: str | None) -> nn.Module:
    fused = kernels == "bnkern"
    if norm == "batch":
        return bnkern.nn.BatchNorm2d(channels, act=act) if fused else _TorchBatchNorm2d(channels, act)
    if norm == "affine":
        if not fused:
            return _TorchBatchNorm2d(channels, act, frozen=True)
        affine = bnkern.nn.BatchNorm2d(channels, eps=0.0, act=act)
        bnkern.nn.freeze_statistics(affine)
        return affine
    if norm in ("layer", "group"):
        return _GroupNorm(1 if norm == "layer" else GROUPS, channels, act, fused)
    if norm == "instance":
        return _InstanceNorm(channels, act, fused)
    return bnkern.nn.Activation(act) if fused else _TorchActivation(act)


# ------------------------------------------------------------------------------------------------ initialisation


def _draw_(weight: Tensor, init: str) -> None:
    if init == "xavier_normal":
        nn.init.xavier_normal_(weight)
    elif init == "xavier_uniform":
        nn.init.xavier_uniform_(weight)
    else:  # "fixup" starts from Kaiming too
        nn.init.kaiming_normal_(weight, mode="fan_out", nonlinearity="relu")


def _scalar(value: float) -> nn.Parameter:
    return nn.Parameter(torch.full((1,), value))


@torch.no_grad()
def _fixup_(model: ResNet) -> None:
    """Rescales Kaiming weights for Fixup: in each of L branches by L^(-1/2), and the last convolution to zero."""
    for block in _blocks(model):
        block.conv1.weight *= len(model.blocks) ** -0.5
        block.conv2.weight.zero_()
    for parameter in model.fc.parameters():
        parameter.zero_()
