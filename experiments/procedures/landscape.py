"""The loss, and its gradient where asked for, along the direction that a mini-batch of normal training would go."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from bnkern.train.cifar10 import Batches, Cifar10
from bnkern.train.config import Config
from bnkern.train.step import Step, loss_of

from . import Arrays, Tick, build


def measure(config: dict, data: Cifar10, device: torch.device, folder: Path, tick: Tick) -> dict[str, Arrays]:
    """At the mini-batches ``options["at"]`` of normal training (1 is the first), the loss along minus its gradient.

    Training is that of the paper at ``options["lr"]``: SGD with momentum 0.9 and weight decay 1e-4, augmented batches.
    Before the update by mini-batch k, and on that same mini-batch, the loss is taken at p - a g for each a of
    ``options["rates"]``, with g the gradient of the loss alone and batch norm in training mode.

    Returns, for each k: ``loss/k`` [rates] and its ``start/k``; ``relative/k`` = loss / start (inf where it is not a
    number); ``improving/k``, the largest rate before the first at which the loss is not below its start; ``largest/k``,
    the largest relative loss, and ``largest to 0.01/k`` that at rates up to 0.01; ``lowest/k``, the smallest, and
    ``best rate/k``, where it is. With ``options["gradients"]``, of the gradient g(a) there, ``predictiveness/k``
    [rates] = ||g(a) - g|| / ||g||, ``smoothness/k`` [rates] = ||g(a) - g|| / ||a g||, and ``reach/k``, the largest rate
    before the first at which the gradient has changed by half of its norm. Always ``norm/k`` = ||g||.
    """
    options = config["options"]
    network = build(config).to(device)
    moved = data.to(device)
    batches = Batches(moved.train, config["batch"], config["seed"], data.mean, data.std, augment=True)
    # The fields of a Config that a Step reads: the recipe's, and how many metrics it keeps.
    step = Step(network, network, batches, Config("landscape", log_every=1, norm=config["norm"], lr=options["lr"]))
    step.lr.fill_(options["lr"])
    batches.start(0)
    arrays: Arrays = {"rates": np.array(options["rates"])}
    for number in range(1, max(options["at"]) + 1):
        if number in options["at"]:
            share = options["at"].index(number) / len(options["at"])

            def reached(part: float, share: float = share, number: int = number) -> None:
                tick(share + part / len(options["at"]), f"mini-batch {number}")

            found = along_gradient(
                network, *batches.at(0, number - 1), options["rates"], options.get("gradients", False), reached
            )
            arrays |= {f"{name}/{number}": np.asarray(value) for name, value in found.items()}
        if number < max(options["at"]):
            step()  # running statistics were moved by looking around; training does not read them
    return {"landscape": arrays}


def along_gradient(
    network: nn.Module, images: Tensor, labels: Tensor, rates: list[float], gradients: bool, reached
) -> dict[str, object]:
    """What :func:`measure` returns, of one mini-batch; the parameters are put back."""
    parameters = list(network.parameters())
    before = [parameter.detach().clone() for parameter in parameters]

    def loss_at(with_gradient: bool) -> tuple[float, list[Tensor]]:
        with torch.set_grad_enabled(with_gradient):
            loss = loss_of(network(images), labels)
            return loss.item(), list(torch.autograd.grad(loss, parameters)) if with_gradient else []

    start, gradient = loss_at(True)
    norm = _norm(gradient)
    losses, distances = [], []
    for k, rate in enumerate(rates):
        reached(k / len(rates))
        with torch.no_grad():
            for parameter, was, g in zip(parameters, before, gradient, strict=True):
                parameter.copy_(was - rate * g)
        loss, there = loss_at(gradients)
        losses.append(loss)
        if gradients:
            distances.append(_norm([a - b for a, b in zip(there, gradient, strict=True)]))
    with torch.no_grad():
        for parameter, was in zip(parameters, before, strict=True):
            parameter.copy_(was)
    found = summary(np.array(losses) / start, np.array(rates)) | {"loss": losses, "start": start, "norm": norm}
    if gradients:
        distance = np.nan_to_num(np.array(distances), nan=np.inf)
        found |= {"predictiveness": distance / norm, "smoothness": distance / (np.array(rates) * norm)}
        found["reach"] = before_the_first(distance / norm >= 0.5, np.array(rates))
    return found


def summary(relative: np.ndarray, rates: np.ndarray) -> dict[str, object]:
    """The numbers that :func:`measure` takes from the relative losses at rising rates."""
    relative = np.nan_to_num(relative, nan=np.inf)
    return {
        "relative": relative,
        "improving": before_the_first(relative >= 1, rates),
        "largest": relative.max(),
        "largest to 0.01": relative[rates <= 0.01].max(),
        "lowest": relative.min(),
        "best rate": rates[relative.argmin()],
    }


def before_the_first(where: np.ndarray, rates: np.ndarray) -> float:
    """The last of the rising rates before one where it is so; 0 where it is so at once."""
    count = where.argmax() if where.any() else len(rates)
    return rates[count - 1] if count else 0.0


def _norm(tensors: list[Tensor]) -> float:
    return sum(t.double().square().sum() for t in tensors).sqrt().item()
