"""The noise of a mini-batch's gradient by batch size (equation 2). The probe ``gradient_noise_scale`` measures it."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bnkern.nn import BatchNorm2d
from bnkern.probes import load, record
from bnkern.train.cifar10 import Cifar10
from bnkern.train.resnet import ResNet

from . import Arrays, Tick, build


def measure(config: dict, data: Cifar10, device: torch.device, folder: Path, tick: Tick) -> dict[str, Arrays]:
    """E |g_B - g|^2 of batches drawn from ``images`` images, for each of ``sizes``; and the noise C of single images.

    g is the gradient of the mean loss over those images, and C = E |g_i - g|^2 over them. Each size is one step of the
    recording. Its batches are the parts of an accumulated gradient, and their variance is the one of equation 2 at step
    size 1. With ``replace`` the images of a batch are drawn independently, otherwise without repetition.

    In ``mode`` "frozen" batch norm uses the statistics of all the images, so that a single image has a gradient. In
    ``mode`` "training" it uses those of each batch, and there is no C. The batches of one size hold ``budget`` images
    together, but there are at least 2 and at most ``most`` of them.
    """
    options, model = config["options"], build(config).to(device)
    indices = np.random.default_rng(config["seed"]).permutation(len(data.train.labels))[: options["images"]]
    images = data.normalise(data.train.images[indices].to(device))
    labels = data.train.labels[indices].to(device)
    if options["mode"] == "frozen":
        _freeze(model, images)
    sizes, count = options["sizes"], len(images)
    steps = [list(np.arange(count)[:, None])] if options["mode"] == "frozen" else []
    generator = np.random.default_rng(config["seed"] + 1)
    for size in sizes:
        batches = max(2, min(options["most"], options["budget"] // size))
        steps.append([generator.choice(count, size, replace=options["replace"]) for _ in range(batches)])
    with TemporaryDirectory() as out:
        with record(model, ["gradient_noise_scale"], out=out) as recording:
            for k, parts in enumerate(steps):
                for part in parts:
                    (F.cross_entropy(model(images[part]), labels[part]) / len(parts)).backward()
                recording.step()
                model.zero_grad()
                tick((k + 1) / len(steps), f"batches of {sizes[min(k, len(sizes) - 1)]}")
        recorded = load(out)["gradient_noise_scale"][""]
    noise, square = (list(recorded[row]) for row in ("noise", "square"))
    arrays: dict[str, Any] = {}
    if options["mode"] == "frozen":  # the variance of all images, not of a sample: divided by count, not by count - 1
        arrays |= {"C": noise.pop(0) * (count - 1) / count, "|g|^2": square.pop(0)}
        arrays |= {f"ratio/{size}": size * variance / arrays["C"] for size, variance in zip(sizes, noise, strict=True)}
    arrays |= {f"noise/{size}": variance for size, variance in zip(sizes, noise, strict=True)}
    if options["replace"]:
        arrays["slope"] = np.polyfit(np.log(sizes), np.log(noise), 1)[0]
    return {"noise": {name: np.asarray(value) for name, value in arrays.items()}}


@torch.no_grad()
def _freeze(model: ResNet, images: Tensor) -> None:
    """Puts the model into eval mode, with the statistics of ``images`` as one batch."""
    norms = [module for module in model.modules() if isinstance(module, BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    model(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()
