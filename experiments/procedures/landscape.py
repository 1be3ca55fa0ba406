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

    A network is dead where all images have the same logits, to 1e-6 of the largest: no unit passes anything on, and
    only the classifier's bias is left. Its loss may be far below a bad start, which is no improvement.

    Returns, for each k: ``loss/k`` [rates], its ``start/k``, ``dead/k`` [rates] and ``dead at start/k`` (0 or 1);
    ``relative/k`` [rates] = loss / start, inf where that is not a number. Of the living networks alone:

    - ``improving/k``: the largest rate before the first at which the loss is not below its start;
    - ``best rate/k`` and ``lowest/k``: where the relative loss is smallest, and that loss (nan if all are dead);
    - ``passes 1e3/k``, ``passes 1e6/k``: the smallest rate at which the relative loss is above 1e3 and 1e6;
    - ``largest to 0.2/k``: the largest relative loss at rates up to 0.2.

    With ``options["gradients"]``, of the gradient g(a) there, ``predictiveness/k`` [rates] = ||g(a) - g|| / ||g||,
    ``smoothness/k`` [rates] = ||g(a) - g|| / ||a g||, and ``reach/k``, the largest rate before the first at which the
    gradient has changed by half of its norm. Always ``norm/k`` = ||g||.

    A rate that lies at the edge of those tried is only a bound: ``<name> bound/k`` is then 1 for "at least" or -1 for
    "at most", and 0 otherwise.
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

    def loss_at(with_gradient: bool) -> tuple[float, bool, list[Tensor]]:
        with torch.set_grad_enabled(with_gradient):
            logits = network(images)
            loss = loss_of(logits, labels)
            gradient = list(torch.autograd.grad(loss, parameters)) if with_gradient else []
            return loss.item(), is_dead(logits), gradient

    start, dead_at_start, gradient = loss_at(True)
    norm = _norm(gradient)
    losses, dead, distances = [], [], []
    for k, rate in enumerate(rates):
        reached(k / len(rates))
        with torch.no_grad():
            for parameter, was, g in zip(parameters, before, gradient, strict=True):
                parameter.copy_(was - rate * g)
        loss, is_dead_there, there = loss_at(gradients)
        losses.append(loss)
        dead.append(is_dead_there)
        if gradients:
            distances.append(_norm([a - b for a, b in zip(there, gradient, strict=True)]))
    with torch.no_grad():
        for parameter, was in zip(parameters, before, strict=True):
            parameter.copy_(was)
    found = {"loss": losses, "start": start, "norm": norm, "dead": dead, "dead at start": dead_at_start}
    found |= summary(np.array(losses) / start, np.array(dead), np.array(rates))
    if gradients:
        distance = np.nan_to_num(np.array(distances), nan=np.inf)
        found |= {"predictiveness": distance / norm, "smoothness": distance / (np.array(rates) * norm)}
        found |= named("reach", before_the_first(distance / norm >= 0.5, np.array(rates)))
    return found


def is_dead(logits: Tensor) -> bool:
    """Whether all images [N, classes] have the same logits, to 1e-6 of the largest. Infinite ones are not dead."""
    logits = logits.detach().double()
    spread = (logits.amax(0) - logits.amin(0)).max()
    return bool(spread <= 1e-6 * logits.abs().max()) and bool(logits.isfinite().all())


def summary(relative: np.ndarray, dead: np.ndarray, rates: np.ndarray) -> dict[str, object]:
    """The numbers that :func:`measure` takes from the relative losses at rising rates."""
    relative = np.nan_to_num(relative, nan=np.inf)
    living = np.where(dead, np.inf, relative)
    best = living.argmin()
    edge = {0: -1, len(rates) - 1: 1}.get(int(best), 0)
    found = {
        "relative": relative,
        "lowest": living[best] if not dead.all() else np.nan,
        "largest to 0.2": relative[(rates <= 0.2) & ~dead].max(initial=0.0),
    }
    found |= named("improving", before_the_first(living >= 1, rates))
    found |= named("best rate", (rates[best], edge))
    for text, factor in (("passes 1e3", 1e3), ("passes 1e6", 1e6)):
        found |= named(text, the_first((relative > factor) & ~dead, rates))
    return found


def named(name: str, limit: tuple[float, int]) -> dict[str, object]:
    """A limit and its bound under their names."""
    return {name: limit[0], f"{name} bound": limit[1]}


def before_the_first(where: np.ndarray, rates: np.ndarray) -> tuple[float, int]:
    """The last of the rising rates before one where it is so, and its bound: none is so, or the very first is."""
    if not where.any():
        return rates[-1], 1
    first = where.argmax()
    return (rates[first - 1], 0) if first else (rates[0], -1)


def the_first(where: np.ndarray, rates: np.ndarray) -> tuple[float, int]:
    """The first of the rising rates where it is so, and its bound."""
    if not where.any():
        return rates[-1], 1
    first = where.argmax()
    return rates[first], 0 if first else -1


def _norm(tensors: list[Tensor]) -> float:
    total: Tensor = sum(t.double().square().sum() for t in tensors)  # type: ignore[assignment]  # of some, so no 0
    return total.sqrt().item()
