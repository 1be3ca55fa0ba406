"""Short training runs at several learning rates: which one is best, and the largest one that a network can use."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from bnkern.train import loop
from bnkern.train.cifar10 import Cifar10
from bnkern.train.runlog import outcome, rows

from . import Arrays, Tick
from .training import delete_checkpoints, progress, settings_of, subset

MARGIN = 0.05  # by which the loss must fall
REACH, STRIDE = 3, 0.5  # decades
USES = {"survived": "limit", "learned": "learning limit"}


class Ended(NamedTuple):
    """The end of the run at one rate."""

    survived: bool  # every loss was finite and at most 1e3
    learned: bool  # it survived, and learns(its losses)
    last_loss: float  # the mean training loss of its last epoch, infinite if it diverged


def measure(config: dict, data: Cifar10, device: torch.device, folder: Path, tick: Tick) -> dict[str, Arrays]:
    """The outcomes of runs at learning rates among ``options["lrs"]``, each for ``epochs`` epochs without drops.

    Without ``options["search"]`` all rates are tried. With it :func:`search` chooses the rates.

    ``lrs``: the rates that were tried. ``survived``, ``learned`` and ``last loss`` have a value for each of them, see
    :class:`Ended`, and ``last loss at <rate>`` has the same. ``best rate``: log10 of the rate with the lowest last
    loss, nan if all diverged. ``limit``, ``learning limit`` and their bounds: see :func:`search`.
    """
    options = config["options"]
    data = subset(data, options | {"tests": 1})  # the accuracy is not used
    rates = sorted(options["lrs"])
    tried: dict[float, Ended] = {}

    def try_rate(rate: float) -> Ended:
        if rate not in tried:
            settings = settings_of(config, data, lr=rate, drops=(), log_every=1, checkpoint_every=10**6)
            already_tried = len(tried)

            def report(share: float, next_step: str) -> None:
                most = 12 if options.get("search") else len(rates)  # few searches try more
                tick(min(0.99, (already_tried + share) / most), f"learning rate {rate:.3g}: {next_step}")

            run_folder = folder / f"lr-{rate:g}"
            loop.train(settings, run_folder, data, device, watch=progress(settings, data, report))
            metrics = rows(run_folder)
            losses = [float(row["loss"]) for row in metrics if row["event"] == "train"]
            survived = outcome(run_folder).diverged is None
            last = metrics[-1]["train_loss"] if survived else math.inf
            tried[rate] = Ended(survived, survived and learns(losses), last)
        return tried[rate]

    limits = search(rates, try_rate) if options.get("search") else largest(rates, [try_rate(rate) for rate in rates])
    delete_checkpoints(folder)
    rates = sorted(tried)
    last = [tried[rate].last_loss for rate in rates]
    results: dict[str, Any] = {"lrs": rates, "last loss": last}
    results["survived"], results["learned"] = ([getattr(tried[rate], name) for rate in rates] for name in USES)
    results["best rate"] = math.log10(rates[int(np.argmin(last))]) if min(last) < math.inf else math.nan
    results |= {f"last loss at {rate:g}": loss for rate, loss in zip(rates, last, strict=True)} | limits
    return {"limits": {name: np.asarray(value, float) for name, value in results.items()}}


def largest(rates: list[float], ends: list[Ended]) -> dict[str, float]:
    """The results of :func:`search` for rates that have all been tried."""
    results: dict[str, float] = {}
    for use, name in USES.items():
        usable = [index for index, end in enumerate(ends) if getattr(end, use)]
        results |= _found(name, rates, max(usable, default=-1), 0)
    return results


def search(rates: list[float], try_rate: Callable[[float], Ended]) -> dict[str, float]:
    """``limit`` and ``learning limit``: log10 of the largest rate that survives, and of the largest one that learns.

    ``rates`` are in increasing order, evenly spaced in the logarithm. ``try_rate(rate)`` tries a rate. The limit is
    found by bisection, which assumes that every rate below one that survives survives too. Small rates do not learn in
    few steps. The learning limit is therefore searched from the limit downwards, in strides of half a decade for three
    decades, and then by bisection between the first rate that learns and the one above it.

    ``limit bound`` and ``learning limit bound`` are 1 if that rate is the largest of all. The limit is then at least
    this rate. They are -1 if no rate that was tried can be used. The limit is then below the smallest of these, which
    is returned instead. Otherwise they are 0.
    """
    limit = _last(lambda k: try_rate(rates[k]).survived, -1, len(rates))
    results = _found("limit", rates, limit, 0)
    spacing = (math.log10(rates[-1]) - math.log10(rates[0])) / max(1, len(rates) - 1)
    stride = max(1, round(STRIDE / spacing)) if spacing else 1
    lowest = max(0, limit - round(REACH / spacing)) if spacing else 0
    chosen = [*range(limit, lowest, -stride), lowest] if limit >= 0 else []
    above, learning = limit + 1, -1
    for k in chosen:
        if try_rate(rates[k]).learned:
            learning = _last(lambda k: try_rate(rates[k]).learned, k, above)
            break
        above = k
    return results | _found("learning limit", rates, learning, lowest)


def _last(usable: Callable[[int], bool], low: int, high: int) -> int:
    """The largest index from ``low`` to below ``high`` that is usable, if ``low`` and all indices up to it are."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if usable(middle) else (low, middle)
    return low


def _found(name: str, rates: list[float], index: int, lowest: int) -> dict[str, float]:
    bound = -1 if index < 0 else int(index == len(rates) - 1)
    return {name: math.log10(rates[index if index >= 0 else lowest]), f"{name} bound": bound}


def learns(losses: list[float]) -> bool:
    """Whether the last quarter's mean is :data:`MARGIN` below the first loss and below that of a guess among ten."""
    return bool(np.mean(losses[-max(1, len(losses) // 4) :]) < min(losses[0], math.log(10)) - MARGIN)
