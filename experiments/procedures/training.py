"""Training runs by bnkern.train, resumed from their checkpoints; divergence is a result."""

import dataclasses
import math
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

OWN = ("lrs", "images", "tests", "noise")  # options of this procedure; the others are bnkern.train's settings


def measure(config: dict, data: Cifar10, device: torch.device, folder: Path, tick: Tick) -> dict[str, Arrays]:
    """What came of a training run with the options as settings, on the first ``images`` of the training set or on all.

    Accuracies are of the first ``tests`` test images, or of all.

    With ``lrs`` one short run for each of these learning rates: see :func:`_limits`. With ``noise``, a number of
    times, the noise of the gradient is measured along the run: see :class:`_Noise`.
    """
    options = config["options"]
    data = subset(data, options)
    if "lrs" in options:
        return {"limits": _limits(config, data, device, folder, tick)}
    settings = settings_of(config, data, device)
    heard = listener(settings, data, tick, options.get("noise", 0))
    loop.train(settings, folder / "train", data, device, probes=heard)
    found = {"training": curves(folder / "train", settings.epochs)}
    if isinstance(heard, _Noise):
        found["noise"] = heard.arrays(folder / "train")
    forget(folder)
    return found


def subset(data: Cifar10, options: dict) -> Cifar10:
    """The same set with the first ``images`` for training and ``tests`` for tests, or all."""
    train, test = (
        Split(*(t[: options.get(name)] for t in split))
        for name, split in (("images", data.train), ("tests", data.test))
    )
    return dataclasses.replace(data, train=train, test=test)


def settings_of(config: dict, data: Cifar10, device: torch.device, **changes: object) -> Config:
    """The run as bnkern.train states it: in channels_last on the CPU, where that is faster."""
    own = {name: config[name] for name in ("seed", "depth", "norm", "shortcut", "init", "kernels", "batch")}
    own |= {name: value for name, value in config["options"].items() if name not in OWN}
    last = device.type == "cpu"
    rare = {"evaluate_every": max(1, own.get("epochs", 165) // 8), "checkpoint_every": 200}
    return Config(config["label"], data=data.source, channels_last=last, **rare | own | changes)


def forget(folder: Path) -> None:
    """Removes the checkpoints of finished runs in a folder, which weigh more than all else."""
    for name in ("checkpoint*.pt", "diverged.pt"):
        for file in folder.glob(f"**/{name}"):
            file.unlink()


def curves(folder: Path, epochs: int) -> Arrays:
    """Accuracies in percent by the share of training done (NaN where not evaluated), and how it ended.

    Of the share before the first drop of the learning rate, the last evaluation is taken.
    """
    ended = outcome(folder)
    told = [row for row in rows(folder) if row["event"] == "epoch"]
    share = np.array([(row["epoch"] + 1) / epochs for row in told])
    train, test = (
        np.array([100 * row.get(name, math.nan) for row in told]) for name in ("train_accuracy", "test_accuracy")
    )
    early = test[(share <= 0.5) & np.isfinite(test)]
    found = {
        "share": share,
        "train curve": train,
        "test curve": test,
        "test accuracy": _percent(ended.test_accuracy) if ended.diverged is None else math.nan,
        "train accuracy": _percent(ended.train_accuracy) if ended.diverged is None else math.nan,
        "best test accuracy": _percent(ended.best_test_accuracy),
        "test accuracy before the first drop": early[-1] if len(early) else math.nan,
        "diverged": float(ended.diverged is not None),
        "steps": ended.steps,
    }
    return {name: np.asarray(value, float) for name, value in found.items()}


def _percent(share: float | None) -> float:
    return math.nan if share is None else 100 * share


def listener(config: Config, data: Cifar10, tick: Tick, noise: int = 0) -> "_Listener":
    """What to give bnkern.train as probes: it tells ``tick``, and measures ``noise`` so many times along the run."""
    return _Noise(config, data, tick, noise) if noise else _Listener(config, data, tick)


class _Listener:
    """What bnkern.train calls its probes: here a reader of its progress, which decides nothing on the host."""

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
        if told := rows(self.out.parent):
            self.tick(told[-1]["step"] / self.steps, f"{self.name}, step {told[-1]['step']} of {self.steps}")


# ------------------------------------------------------------------------------------------------ usable rates


def _limits(config: dict, data: Cifar10, device: torch.device, folder: Path, tick: Tick) -> Arrays:
    """Which of ``lrs`` a network bears: one epoch at each, a run of its own, without drops.

    ``survived``: no loss was over 1e3 or not finite. ``learned``: and the mean loss of the last quarter is below the
    first loss and below that of guessing, ln 10. ``limit`` and ``learning limit``: log10 of the largest such rate.
    ``limit bound`` and ``learning limit bound`` are 1 where that is the largest rate tried, so that the limit is at
    least this; -1 where no rate served, so that it is below the smallest one tried, which then stands as the limit.
    """
    rates = sorted(config["options"]["lrs"])
    data = subset(data, {"tests": 1})  # nobody looks at the accuracy
    survived, learned = [], []
    for done, rate in enumerate(rates):
        tick(done / len(rates), f"learning rate {rate:g}")
        settings = settings_of(config, data, device, lr=rate, drops=(), log_every=1, checkpoint_every=10**6)
        place = folder / f"lr-{rate:g}"
        loop.train(settings, place, data, device)
        losses = [float(row["loss"]) for row in rows(place) if row["event"] == "train"]
        survived.append(outcome(place).diverged is None)
        learned.append(survived[-1] and teaches(losses))
    forget(folder)

    found: dict[str, Any] = {"lrs": rates, "survived": survived, "learned": learned}
    for name, usable in (("limit", survived), ("learning limit", learned)):
        found[name], found[f"{name} bound"] = largest(rates, usable)
    return {name: np.asarray(value, float) for name, value in found.items()}


def largest(rates: list[float], usable: list[bool]) -> tuple[float, int]:
    """log10 of the largest usable of the rising rates, and its bound as :func:`_limits` has it."""
    served = [rate for rate, good in zip(rates, usable, strict=True) if good]
    if not served:
        return math.log10(rates[0]), -1
    return math.log10(served[-1]), 1 if served[-1] == rates[-1] else 0


def teaches(losses: list[float]) -> bool:
    """Whether the last quarter's mean is below the first loss, and below that of guessing among ten classes."""
    return bool(np.mean(losses[-max(1, len(losses) // 4) :]) < min(losses[0], math.log(10)))


# ------------------------------------------------------------------------------------------------ noise along the way


class _Noise(_Listener):
    """Measures C, the variance of the gradient times the batch's size, so many times along a run, evenly in ln step.

    At those steps ``PARTS`` more batches of the run's own size, from an epoch far away, are passed through the network
    as it stands, in training mode; gradients and running statistics are put back. The probe ``gradient_noise_scale``
    does the sums.
    """

    PARTS, ELSEWHERE = 8, 2**31
    on_device = False

    def __init__(self, config: Config, data: Cifar10, tick: Tick, times: int) -> None:
        super().__init__(config, data, tick)
        self.config, self.data = config, data
        self.due = {0, *np.unique(np.geomspace(1, self.steps - 1, times - 1).round().astype(int)).tolist()}

    def __call__(self, network: nn.Module, out: Path, step: int) -> "_Noise":
        super().__call__(network, out, step)
        out.mkdir(exist_ok=True)
        device, kind = next(network.parameters()).device, torch.channels_last if self.config.channels_last else None
        self.batches = Batches(
            Split(*(t.to(device) for t in self.data.train)),
            self.config.batch,
            self.config.seed,
            self.data.mean,
            self.data.std,
            augment=self.config.augment,
            memory_format=kind or torch.contiguous_format,
        )
        self.taken = step
        return self

    def step(self, loss: Tensor) -> None:
        if self.taken in self.due:
            self._measure(self.taken)
        self.taken += 1

    def _measure(self, step: int) -> None:
        network = self.network
        gradients = [parameter.grad for parameter in network.parameters()]
        statistics = {name: t.clone() for name, t in network.named_buffers()}
        network.zero_grad()
        with TemporaryDirectory() as out:
            with record(network, ["gradient_noise_scale"], out=out) as recording:
                for part in range(self.PARTS):
                    images, labels = self.batches.at(self.ELSEWHERE + step, part % len(self.batches))
                    (F.cross_entropy(network(images), labels) / self.PARTS).backward()
                recording.step()
            found = load(out)["gradient_noise_scale"][""]
        np.savez(self.out / f"noise-{step:07d}.npz", step=step, **found)  # type: ignore[arg-type]
        for parameter, gradient in zip(network.parameters(), gradients, strict=True):
            parameter.grad = gradient
        for name, t in network.named_buffers():
            t.copy_(statistics[name])

    def arrays(self, folder: Path) -> Arrays:
        """By measurement: ``step``, ``C`` = |B| times the variance, ``|g|^2``, and ``lr C / |B|``."""
        size, steps = self.config.batch, outcome(folder).steps
        told = [dict(np.load(file)) for file in sorted((folder / "probes").glob("noise-*.npz"))]
        told = [row for row in told if row["step"] <= steps]
        step, noise, square = (np.array([row[name].item() for row in told]) for name in ("step", "noise", "square"))
        rates = np.array([learning_rate(self.config, int(at), self.steps) for at in step])
        early = step < self.config.drops[0] * self.steps if self.config.drops else step >= 0
        felt = rates * noise
        found = {
            "step": step,
            "C": noise * size,
            "|g|^2": square,
            "lr C / |B|": felt,
            "C before the first drop": noise[early][-1] * size,
            "lr C / |B| before the first drop": felt[early][-1],
            "log10 lr C / |B| before the first drop": math.log10(felt[early][-1]) if felt[early][-1] > 0 else -math.inf,
        }
        return {name: np.asarray(value, float) for name, value in found.items()}
