"""Products of a network's own convolutions, compared with Theorem 1."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bnkern.train import checkpoint, loop
from bnkern.train.cifar10 import Cifar10
from bnkern.train.resnet import ResNet, layers

from . import Arrays, Tick
from .theory import distance, edge, theorem
from .training import delete_checkpoints, progress, settings_of, subset

POSITIONS = 8  # rows, and columns, of the last stage's activations
SHARES = (np.arange(200) + 0.5) / 200  # the quantiles of the singular values that are kept


def measure(config: dict, data: Cifar10, device: torch.device, folder: Path, tick: Tick) -> dict[str, Arrays]:
    """Singular values of products of M = 1, 2, ... successive convolutions, at initialisation and after training.

    The convolutions are those of ``layers``. They have the same width and stride 1. Training is as in the procedure
    ``training``.
    """
    data = subset(data, config["options"])
    settings = settings_of(config, data)
    torch.manual_seed(config["seed"])  # as in bnkern.train
    network = loop.build(settings)
    results: Arrays = {}
    for when in ("init", "trained"):
        if when == "trained":
            loop.train(settings, folder / "train", data, device, watch=progress(settings, data, tick))
            state = checkpoint.load(folder / "train" / "checkpoint.pt", settings.to_dict())
            assert state is not None, "a run that has ended has a checkpoint"
            network.load_state_dict(state["network"])
        results |= {f"{when} {name}": value for name, value in _products(network, config["layers"]).items()}
    delete_checkpoints(folder)
    return {"products": {name: np.asarray(value) for name, value in results.items()}}


def _products(network: ResNet, numbers: list[int]) -> Arrays:
    product: np.ndarray | None = None
    results: dict[str, Any] = {}
    for m, number in enumerate(numbers, start=1):
        factor = transfer(layers(network)[number].weight, POSITIONS)  # type: ignore[arg-type]  # a convolution's
        product = factor if product is None else factor @ product
        s, (x, _, share) = np.linalg.svd(product, compute_uv=False), theorem(m)
        results |= {
            f"s/{m}": np.quantile(s, SHARES),
            f"theorem/{m}": np.sqrt(np.interp(SHARES, share, x)),
            f"distance/{m}": distance(s.ravel() ** 2, m),
            f"largest over edge/{m}": s.max() / edge(m) ** 0.5,
            f"log10 kappa/{m}": np.log10(s.max() / s.min()),
        }
    return results


def transfer(weight: Tensor, positions: int) -> np.ndarray:
    """The convolution as a matrix at each frequency: [positions^2, out, in], complex, mean squared singular value 1.

    With circular padding a convolution of stride 1 is block diagonal in the Fourier basis. So its singular values are
    those of the blocks, and the blocks of a product are the products of the blocks (Sedghi, Gupta and Long, "The
    singular values of convolutional layers", 2019). The network has zero padding, which differs at the border.
    """
    blocks = np.fft.fft2(weight.detach().cpu().double().numpy(), (positions, positions))
    blocks = blocks.transpose(2, 3, 0, 1).reshape(-1, *weight.shape[:2])
    return blocks / np.sqrt((np.abs(blocks) ** 2).sum((1, 2)).mean() / blocks.shape[-1])
