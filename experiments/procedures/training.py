"""Training runs of bnkern.train, which continue from their checkpoints. Divergence is a result, not an error."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnkern.probes import load, record
from bnkern.train import loop
from bnkern.train.cifar10 import Batches, Cifar10, Split
from bnkern.train.config import Config, learning_rate
from bnkern.train.runlog import outcome, rows

from . import Arrays, Tick

OWN = ("lrs", "images", "tests", "noise")  # the options of this procedure; all others are settings of bnkern.train


def measure(config: dict, data: Cifar10, device: torch.device, folder: Path, tick: Tick) -> dict[str, Arrays]:
    """The results of a training run with the options as settings, on the first ``images`` training images or on all.

    Accuracies are measured on the first ``tests`` test images, or on all.

    With ``lrs`` there is one short run for each of these learning rates, see :func:`_limits`. With ``noise`` the noise
    of the gradient is measured that many times during the run, see :class:`_Noise`.
    """
    options = config["options"]
    data = subset(data, options)
    if "lrs" in options:
        return {"limits": _limits(config, data, device, folder, tick)}
    settings = settings_of(config, data, device)
    probes = listener(settings, data, tick, options.get("noise", 0))
    loop.train(settings, folder / "train", data, device, probes=probes)
    results = {"training": curves(folder / "train", settings.epochs)}
    if isinstance(probes, _Noise):
        results["noise"] = probes.arrays(folder / "train")
    delete_checkpoints(folder)
    return results


def subset(data: Cifar10, options: dict) -> Cifar10:
    """The data set with only the first ``images`` training images and the first ``tests`` test images, or with all."""
    train, test = (
        Split(*(t[: options.get(name)] for t in split))
        for name, split in (("images", data.train), ("tests", data.test))
    )
    return dataclasses.replace(data, train=train, test=test)


def settings_of(config: dict, data: Cifar10, device: torch.device, **changes: object) -> Config:
    """The run as a Config of bnkern.train. On the CPU it uses channels_last, which is faster there."""
    own = {name: config[name] for name in ("seed", "depth", "norm", "shortcut", "init", "kernels", "batch")}
    own |= {name: value for name, value in config["options"].items() if name not in OWN}
    channels_last = device.type == "cpu"
    intervals = {"evaluate_every": max(1, own.get("epochs", 165) // 8), "checkpoint_every": 200}
    return Config(config["label"], data=data.source, channels_last=channels_last, **intervals | own | changes)


def delete_checkpoints(folder: Path) -> None:
    """Deletes the checkpoints of finished runs in a folder. They take more space than all other files."""
    for name in ("checkpoint*.pt", "diverged.pt"):
        for file in folder.glob(f"**/{name}"):
            file.unlink()


def curves(folder: Path, epochs: int) -> Arrays:
    """Accuracies in percent by the share of training done (NaN where not evaluated), and the outcome of the run.

    The accuracy before the first drop of the learning rate is the last one that was evaluated in the first half.
    """
    end = outcome(folder)
    logged = [row for row in rows(folder) if row["event"] == "epoch"]
    share = np.array([(row["epoch"] + 1) / epochs for row in logged])
    train, test = (
        np.array([100 * row.get(name, math.nan) for row in logged]) for name in ("train_accuracy", "test_accuracy")
    )
    early = test[(share <= 0.5) & np.isfinite(test)]
    results = {
        "share": share,
        "train curve": train,
        "test curve": test,
        "test accuracy": _percent(end.test_accuracy) if end.diverged is None else math.nan,
        "train accuracy": _percent(end.train_accuracy) if end.diverged is None else math.nan,
        "best test accuracy": _percent(end.best_test_accuracy),
        "test accuracy before the first drop": early[-1] if len(early) else math.nan,
        "diverged": float(end.diverged is not None),
        "steps": end.steps,
    }
    return {name: np.asarray(value, float) for name, value in results.items()}


def _percent(share: float | None) -> float:
    return math.nan if share is None else 100 * share


def listener(config: Config, data: Cifar10, tick: Tick, noise: int = 0) -> "_Listener":
    """The ``probes`` argument for bnkern.train. It calls ``tick``, and measures the noise ``noise`` times."""
    return _Noise(config, data, tick, noise) if noise else _Listener(config, data, tick)


class _Listener:
    """The probes of bnkern.train, used to report its progress. It decides nothing on the host (``on_device``)."""

    on_device = True

    def __init__(self, config: Config, data: Cifar10, tick: Tick) -> None:
        self.steps = config.epochs * (len(data.train.labels) // config.batch)
        self.tick, self.name = tick, config.name

    def __call__(self, network: nn.Module, out: Path, step: int) -> "_Listener":
        self.network, self.out = network, out
        return self

    def __enter__(self) -> "_Listener":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def step(self, loss: Tensor) -> None:
        pass

    def rewind(self, step: int) -> None:
        pass

    def flush(self, wait: bool = False) -> None:
        if logged := rows(self.out.parent):
            self.tick(logged[-1]["step"] / self.steps, f"{self.name}, step {logged[-1]['step']} of {self.steps}")


# ------------------------------------------------------------------------------------------------ usable rates


MARGIN = 0.05  # by which the loss must fall
REACH, STRIDE = 3, 0.5  # decades


def _limits(config: dict, data: Cifar10, device: torch.device, folder: Path, tick: Tick) -> Arrays:
    """The largest learning rates among ``lrs`` that a network can use. Each rate has a run of its own, without drops.

    ``survived``: every loss was finite and at most 1e3. ``learned``: the run survived, and the mean loss of its last
    quarter is at least :data:`MARGIN` below the first loss and below ln 10, the loss of a guess. Both are of the rates
    that were tried, which are returned as ``lrs``. :func:`search` chooses them and returns the limits.
    """
    data = subset(data, {"tests": 1})  # the accuracy is not used
    tried: dict[float, tuple[bool, bool]] = {}

    def outcomes(rate: float) -> tuple[bool, bool]:
        if rate not in tried:
            tick(1 - 0.85 ** len(tried), f"learning rate {rate:.3g}")  # most searches try 8 to 16 rates
            settings = settings_of(config, data, device, lr=rate, drops=(), log_every=1, checkpoint_every=10**6)
            rate_folder = folder / f"lr-{rate:g}"
            loop.train(settings, rate_folder, data, device)
            losses = [float(row["loss"]) for row in rows(rate_folder) if row["event"] == "train"]
            survived = outcome(rate_folder).diverged is None
            tried[rate] = survived, survived and teaches(losses)
        return tried[rate]

    results: dict[str, Any] = search(sorted(config["options"]["lrs"]), outcomes)
    delete_checkpoints(folder)
    results["lrs"] = sorted(tried)
    results["survived"], results["learned"] = zip(*(tried[rate] for rate in results["lrs"]), strict=True)
    return {name: np.asarray(value, float) for name, value in results.items()}


def search(rates: list[float], outcomes: Callable[[float], tuple[bool, bool]]) -> dict[str, float]:
    """``limit`` and ``learning limit``: log10 of the largest rate that survives, and of the largest one that learns.

    ``rates`` are in increasing order, evenly spaced in the logarithm. ``outcomes(rate)`` returns whether the rate
    survives and whether it learns. The limit is found by bisection, which assumes that every rate below one that
    survives survives too. Small rates do not learn in few steps. The learning limit is therefore searched from the
    limit downwards, in strides of half a decade for three decades, and then by bisection between the first rate that
    learns and the one above it.

    ``limit bound`` and ``learning limit bound`` are 1 if that rate is the largest of all. The limit is then at least
    this rate. They are -1 if no rate that was tried can be used. The limit is then below the smallest of these, which
    is returned in its stead. Otherwise they are 0.
    """
    limit = _last(lambda k: outcomes(rates[k])[0], -1, len(rates))
    results = _found("limit", rates, limit, 0)
    spacing = (math.log10(rates[-1]) - math.log10(rates[0])) / max(1, len(rates) - 1)
    stride = max(1, round(STRIDE / spacing)) if spacing else 1
    lowest = max(0, limit - round(REACH / spacing)) if spacing else 0
    chosen = [*range(limit, lowest, -stride), lowest] if limit >= 0 else []
    above, learning = limit + 1, -1
    for k in chosen:
        if outcomes(rates[k])[1]:
            learning = _last(lambda k: outcomes(rates[k])[1], k, above)
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


def teaches(losses: list[float]) -> bool:
    """Whether the last quarter's mean is :data:`MARGIN` below the first loss and below that of a guess among ten."""
    return bool(np.mean(losses[-max(1, len(losses) // 4) :]) < min(losses[0], math.log(10)) - MARGIN)


# ------------------------------------------------------------------------------------------------ noise during training


class _Noise(_Listener):
    """Measures C, the variance of the gradient times the batch size, a number of times in a run, evenly in ln step.

    At those steps ``PARTS`` additional batches of the run's own size pass through the network in training mode. They
    come from epochs that training does not reach. Gradients and running statistics are restored afterwards. The probe
    ``gradient_noise_scale`` computes the sums.
    """

    PARTS, FIRST_EPOCH = 8, 2**31
    on_device = False

    def __init__(self, config: Config, data: Cifar10, tick: Tick, times: int) -> None:
        super().__init__(config, data, tick)
        self.config, self.data = config, data
        self.due = {0, *np.unique(np.geomspace(1, self.steps - 1, times - 1).round().astype(int)).tolist()}

    def __call__(self, network: nn.Module, out: Path, step: int) -> "_Noise":
        super().__call__(network, out, step)
        out.mkdir(exist_ok=True)
        device = next(network.parameters()).device
        memory_format = torch.channels_last if self.config.channels_last else torch.contiguous_format
        self.batches = Batches(
            Split(*(t.to(device) for t in self.data.train)),
            self.config.batch,
            self.config.seed,
            self.data.mean,
            self.data.std,
            augment=self.config.augment,
            memory_format=memory_format,
        )
        self.steps_done = step
        return self

    def step(self, loss: Tensor) -> None:
        if self.steps_done in self.due:
            self._measure(self.steps_done)
        self.steps_done += 1

    def _measure(self, step: int) -> None:
        network = self.network
        gradients = [parameter.grad for parameter in network.parameters()]
        statistics = {name: t.clone() for name, t in network.named_buffers()}
        network.zero_grad()
        with TemporaryDirectory() as out:
            with record(network, ["gradient_noise_scale"], out=out) as recording:
                for part in range(self.PARTS):
                    images, labels = self.batches.at(self.FIRST_EPOCH + step, part % len(self.batches))
                    (F.cross_entropy(network(images), labels) / self.PARTS).backward()
                recording.step()
            recorded = load(out)["gradient_noise_scale"][""]
        np.savez(self.out / f"noise-{step:07d}.npz", step=step, **recorded)  # type: ignore[arg-type]
        for parameter, gradient in zip(network.parameters(), gradients, strict=True):
            parameter.grad = gradient
        for name, t in network.named_buffers():
            t.copy_(statistics[name])

    def arrays(self, folder: Path) -> Arrays:
        """For each measurement: ``step``, ``C`` = |B| times the variance, ``|g|^2``, and ``lr C / |B|``."""
        size, steps = self.config.batch, outcome(folder).steps
        measured = [dict(np.load(file)) for file in sorted((folder / "probes").glob("noise-*.npz"))]
        measured = [row for row in measured if row["step"] <= steps]
        step, noise, square = (np.array([row[name].item() for row in measured]) for name in ("step", "noise", "square"))
        rates = np.array([learning_rate(self.config, int(number), self.steps) for number in step])
        early = step < self.config.drops[0] * self.steps if self.config.drops else step >= 0
        scaled = rates * noise
        last = scaled[early][-1]
        results = {
            "step": step,
            "C": noise * size,
            "|g|^2": square,
            "lr C / |B|": scaled,
            "C before the first drop": noise[early][-1] * size,
            "lr C / |B| before the first drop": last,
            "log10 lr C / |B| before the first drop": math.log10(last) if last > 0 else -math.inf,
        }
        return {name: np.asarray(value, float) for name, value in results.items()}
