"""The noise of a mini-batch's gradient against the batch's size (equation 2): variances by the probe of that name."""

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

    g is the gradient of the mean loss of those images, C = E |g_i - g|^2 over them. Each size is a step of the
    recording, its batches the parts of an accumulated gradient: their variance is what equation 2 is about, at step
    size 1. With ``replace`` images are drawn independently, else without repetition within a batch. In ``mode``
    "frozen" batch norm uses the statistics of all the images, so that a single image has a gradient; in "training"
    those of each batch, and there is no C. There are as many batches of a size as hold ``budget`` images, ``most`` at
    most.
    """
    options, model = config["options"], build(config).to(device)
    chosen = np.random.default_rng(config["seed"]).permutation(len(data.train.labels))[: options["images"]]
    images = data.normalise(data.train.images[chosen].to(device))
    labels = data.train.labels[chosen].to(device)
    if options["mode"] == "frozen":
        _freeze(model, images)
    sizes, count = options["sizes"], len(images)
    plans = [list(np.arange(count)[:, None])] if options["mode"] == "frozen" else []
    draw = np.random.default_rng(config["seed"] + 1)
    for size in sizes:
        batches = max(2, min(options["most"], options["budget"] // size))
        plans.append([draw.choice(count, size, replace=options["replace"]) for _ in range(batches)])
    with TemporaryDirectory() as out:
        with record(model, ["gradient_noise_scale"], out=out) as recording:
            for step, plan in enumerate(plans):
                for part in plan:
                    (F.cross_entropy(model(images[part]), labels[part]) / len(plan)).backward()
                recording.step()
                model.zero_grad()
                tick((step + 1) / len(plans), f"batches of {sizes[min(step, len(sizes) - 1)]}")
        found = load(out)["gradient_noise_scale"][""]
    noise, square = (list(found[row]) for row in ("noise", "square"))
    arrays: dict[str, Any] = {}
    if options["mode"] == "frozen":  # of all images, not of a sample: by their number, not one less
        arrays |= {"C": noise.pop(0) * (count - 1) / count, "|g|^2": square.pop(0)}
        arrays |= {f"ratio/{size}": size * variance / arrays["C"] for size, variance in zip(sizes, noise, strict=True)}
    arrays |= {f"noise/{size}": variance for size, variance in zip(sizes, noise, strict=True)}
    if options["replace"]:
        arrays["slope"] = np.polyfit(np.log(sizes), np.log(noise), 1)[0]
    return {"noise": {name: np.asarray(value) for name, value in arrays.items()}}


@torch.no_grad()
def _freeze(model: ResNet, images: Tensor) -> None:
    """Eval mode, with the statistics of ``images`` as one batch."""
    norms = [module for module in model.modules() if isinstance(module, BatchNorm2d)]
    kept = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    model(images)
    for norm, momentum in zip(norms, kept, strict=True):
        norm.momentum = momentum
    model.eval()
