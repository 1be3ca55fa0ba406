"""Statistics of a network before its first step."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnkern
from bnkern.train.cifar10 import Cifar10, batches
from bnkern.train.resnet import layers

from . import Arrays, Tick, build


def measure(config: dict, data: Cifar10, device: torch.device, folder: Path, tick: Tick) -> dict[str, Arrays]:
    """The configured quantities at the configured layers of a fresh network, on one batch of training images.

    The seed fixes the network and the batch. The loss is the mean cross-entropy; nothing is updated. A quantity
    that needs no gradient costs no backward pass.
    """
    model = build(config).to(device)
    chosen = next(batches(data.train, config["batch"], config["seed"]))
    images, labels = data.normalise(chosen.images.to(device)), chosen.labels.to(device)
    wanted = {number: layers(model)[number] for number in config["layers"]}
    with_gradients = "gradient_signs" in config["quantities"]
    measured: dict[str, Arrays] = {quantity: {} for quantity in config["quantities"]}
    with torch.set_grad_enabled(with_gradients), _watch(wanted) as seen:
        tick(0, "forward")
        loss = F.cross_entropy(model(images), labels)
        if with_gradients:
            tick(0.3, "backward")
            loss.backward()
        for done, number in enumerate(wanted):
            tick(0.9 + 0.1 * done / len(wanted), f"layer {number}")
            for quantity, arrays in measured.items():
                for name, value in QUANTITIES[quantity](wanted[number], *seen[number]).items():
                    arrays[f"{name}/{number}"] = np.asarray(value)
    return measured


@contextmanager
def _watch(modules: dict[int, nn.Module]) -> Iterator[dict[int, tuple[Tensor, Tensor]]]:
    """The input and output of each module's next call, the output's ``grad`` kept where there is one."""
    seen: dict[int, tuple[Tensor, Tensor]] = {}

    def keep(number: int) -> Callable:
        def hook(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
            if output.requires_grad:
                output.retain_grad()
            seen[number] = (args[0].detach(), output)

        return hook

    handles = [module.register_forward_hook(keep(number)) for number, module in modules.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _gradient_signs(conv: nn.Conv2d, x: Tensor, y: Tensor) -> Arrays:
    """a = mean over weights of sum |d| / N, b = mean of |sum d| / N, their ratios, and the sums weight by weight."""
    # In float64, since |sum d| is hundreds of times smaller than sum |d|, both over up to 131,072 terms.
    signs = bnkern.conv2d_grad_signs(x.double(), y.grad.double(), conv.kernel_size, conv.stride, conv.padding)
    count = y.numel() // y.shape[1]
    a, b = (t.abs().mean().item() / count for t in (signs.abs_sum, signs.sum))
    ratios = signs.abs_sum / signs.sum.abs()  # 0/0 between dead channels: left out of the median
    averages = {
        "a": a,
        "b": b,
        "a/b": a / b if b else np.inf,
        "a/(b sqrt N)": a / b / count**0.5 if b else np.inf,
        "median a/b of single weights": ratios.nanmedian().item(),
        "sign agreement": (signs.sign_sum.abs() / signs.nonzero).nanmean().item(),
    }
    return averages | {"count": count} | {name: t.float().cpu().numpy() for name, t in signs._asdict().items()}


def _log_moments(module: nn.Module, x: Tensor, y: Tensor) -> Arrays:
    """ln |mean| and ln std of each channel [C]; -inf for one that is exactly zero (dead or constant channels)."""
    _, mean, var = bnkern.channel_moments(y)
    return {"ln_abs_mean": mean.abs().log().cpu().numpy(), "ln_std": (var.log() / 2).cpu().numpy()}


QUANTITIES = {"gradient_signs": _gradient_signs, "log_moments": _log_moments}
