"""The loss along the negative gradient of a mini-batch of normal training, and its gradient if it is requested."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from bnkern.train.cifar10 import Batches, Cifar10
from bnkern.train.config import Config
from bnkern.train.step import Step, loss_of

from . import Arrays, Tick, build


def measure(config: dict, data: Cifar10, device: torch.device, folder: Path, tick: Tick) -> dict[str, Arrays]:
    """The loss along its negative gradient, at the mini-batches ``options["at"]`` of normal training (1 is the first).

    Training is the paper's, at ``options["lr"]``: SGD with momentum 0.9 and weight decay 1e-4, on augmented batches.
    Before the update with mini-batch k, the loss of the same mini-batch is computed at p - a g for each a in
    ``options["rates"]``. Here p are the parameters and g is the gradient of the loss without weight decay. Batch norm
    is in training mode.

    A network is dead if all images have the same logits, to 1e-6 of the largest. Then no unit has an output that
    depends on the image, and the logits are the classifier's bias. Its loss may be far below the loss of a bad start,
    but this is no improvement.

    Returns for each k: ``loss/k`` [rates]; ``start/k``, the loss at rate 0; ``dead/k`` [rates] and
    ``dead at start/k`` (0 or 1); and ``relative/k`` [rates] = loss / start, which is inf where the ratio is not a
    number. The following are computed without the dead networks:

    - ``improving/k``: the largest rate before the first at which the loss is not below its start;
    - ``best rate/k`` and ``lowest/k``: the rate with the smallest relative loss, and that loss (nan if all are dead);
    - ``passes 1e3/k``, ``passes 1e6/k``: the smallest rate at which the relative loss is above 1e3 and 1e6;
    - ``largest to 0.2/k``: the largest relative loss at rates up to 0.2.

    With ``options["gradients"]`` it also returns three values of the gradient g(a) at p - a g:
    ``predictiveness/k`` [rates] = ||g(a) - g|| / ||g||, ``smoothness/k`` [rates] = ||g(a) - g|| / ||a g||, and
    ``reach/k``, the largest rate before the first at which the gradient has changed by half of its norm.
    ``norm/k`` = ||g|| is always returned.

    A rate at the edge of those tried is only a bound: ``<name> bound/k`` is then 1 for "at least" or -1 for "at most".
    Otherwise it is 0.
    """
    options = config["options"]
    network = build(config).to(device)
    on_device = data.to(device)
    batches = Batches(on_device.train, config["batch"], config["seed"], data.mean, data.std, augment=True)
    # The Config has only the fields that a Step reads: those of the recipe, and the number of metrics to keep.
    step = Step(network, network, batches, Config("landscape", log_every=1, norm=config["norm"], lr=options["lr"]))
    step.lr.fill_(options["lr"])
    batches.start(0)
    arrays: Arrays = {"rates": np.array(options["rates"])}
    for number in range(1, max(options["at"]) + 1):
        if number in options["at"]:
            start_share = options["at"].index(number) / len(options["at"])

            def report(part: float, start_share: float = start_share, number: int = number) -> None:
                tick(start_share + part / len(options["at"]), f"mini-batch {number}")

            results = along_gradient(
                network, *batches.at(0, number - 1), options["rates"], options.get("gradients", False), report
            )
            arrays |= {f"{name}/{number}": np.asarray(value) for name, value in results.items()}
        if number < max(options["at"]):
            step()  # along_gradient has changed the running statistics, but training does not read them
    return {"landscape": arrays}


def along_gradient(
    network: nn.Module, images: Tensor, labels: Tensor, rates: list[float], gradients: bool, report
) -> dict[str, object]:
    """The values that :func:`measure` returns, for one mini-batch. The parameters are restored."""
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
        report(k / len(rates))
        with torch.no_grad():
            for parameter, value, g in zip(parameters, before, gradient, strict=True):
                parameter.copy_(value - rate * g)
        loss, dead_at_rate, gradient_at_rate = loss_at(gradients)
        losses.append(loss)
        dead.append(dead_at_rate)
        if gradients:
            distances.append(_norm([a - b for a, b in zip(gradient_at_rate, gradient, strict=True)]))
    with torch.no_grad():
        for parameter, value in zip(parameters, before, strict=True):
            parameter.copy_(value)
    results = {"loss": losses, "start": start, "norm": norm, "dead": dead, "dead at start": dead_at_start}
    results |= summary(np.array(losses) / start, np.array(dead), np.array(rates))
    if gradients:
        distance = np.nan_to_num(np.array(distances), nan=np.inf)
        results |= {"predictiveness": distance / norm, "smoothness": distance / (np.array(rates) * norm)}
        results |= with_bound("reach", before_the_first(distance / norm >= 0.5, np.array(rates)))
    return results


def is_dead(logits: Tensor) -> bool:
    """Whether all images have the same logits [N, classes], to 1e-6 of the largest. Logits that are not finite count as
    different."""
    logits = logits.detach().double()
    spread = (logits.amax(0) - logits.amin(0)).max()
    return bool(spread <= 1e-6 * logits.abs().max()) and bool(logits.isfinite().all())


def summary(relative: np.ndarray, dead: np.ndarray, rates: np.ndarray) -> dict[str, object]:
    """The numbers that :func:`measure` computes from the relative losses. The rates are in increasing order."""
    relative = np.nan_to_num(relative, nan=np.inf)
    living = np.where(dead, np.inf, relative)
    best = living.argmin()
    edge = {0: -1, len(rates) - 1: 1}.get(int(best), 0)
    results = {
        "relative": relative,
        "lowest": living[best] if not dead.all() else np.nan,
        "largest to 0.2": relative[(rates <= 0.2) & ~dead].max(initial=0.0),
    }
    results |= with_bound("improving", before_the_first(living >= 1, rates))
    results |= with_bound("best rate", (rates[best], edge))
    for name, factor in (("passes 1e3", 1e3), ("passes 1e6", 1e6)):
        results |= with_bound(name, the_first((relative > factor) & ~dead, rates))
    return results


def with_bound(name: str, limit: tuple[float, int]) -> dict[str, object]:
    """A limit as ``name``, and its bound as ``"<name> bound"``."""
    return {name: limit[0], f"{name} bound": limit[1]}


def before_the_first(condition: np.ndarray, rates: np.ndarray) -> tuple[float, int]:
    """The last rate before the first at which the condition holds, and its bound. The rates are in increasing order.

    The bound is 1 if the condition holds at no rate, and -1 if it holds at the first one.
    """
    if not condition.any():
        return rates[-1], 1
    first = condition.argmax()
    return (rates[first - 1], 0) if first else (rates[0], -1)


def the_first(condition: np.ndarray, rates: np.ndarray) -> tuple[float, int]:
    """The first rate at which the condition holds, and its bound, as for :func:`before_the_first`."""
    if not condition.any():
        return rates[-1], 1
    first = condition.argmax()
    return rates[first], 0 if first else -1


def _norm(tensors: list[Tensor]) -> float:
    total: Tensor = sum(t.double().square().sum() for t in tensors)  # type: ignore[assignment]  # never the int 0
    return total.sqrt().item()
