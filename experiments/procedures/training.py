"""Training runs of bnkern.train, which continue from their checkpoints. Divergence is a result, not an error."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor, nn

from bnkern.probes import load, record
from bnkern.train import loop
from bnkern.train.cifar10 import Batches, Cifar10, Split
from bnkern.train.config import Config, learning_rate
from bnkern.train.runlog import outcome, rows
from bnkern.train.step import autocast, loss_of

from . import Arrays, Tick

# The options of this procedure and of rates.py. All others are settings of bnkern.train.
PROCEDURE_OPTIONS = ("images", "tests", "noise", "parts", "lrs", "search")


def measure(
    config: dict, data: Cifar10, device: torch.device, folder: Path, tick: Tick, kind: "type[Noise] | None" = None
) -> dict[str, Arrays]:
    """The results of a training run with the options as settings, on the first ``images`` training images or on all.

    Accuracies are measured on the first ``tests`` test images, or on all.

    With ``noise`` the noise of the gradient is measured that many times during the run, by ``kind`` or by
    :class:`Noise`, on ``parts`` batches. This changes no bit of the run.
    """
    options = config["options"]
    data = subset(data, options)
    settings = settings_of(config, data)
    noise = None
    if options.get("noise"):
        noise = (kind or Noise)(
            settings, data, device, folder / "noise", options["noise"], options.get("parts", Noise.PARTS)
        )
    loop.train(settings, folder / "train", data, device, before_step=noise, watch=progress(settings, data, tick))
    results = {"training": curves(folder / "train", settings.epochs)}
    if noise:
        results["noise"] = noise.arrays(outcome(folder / "train").steps)
    delete_checkpoints(folder)
    return results


def subset(data: Cifar10, options: dict) -> Cifar10:
    """The data set with only the first ``images`` training images and the first ``tests`` test images, or with all."""
    train, test = (
        Split(*(t[: options.get(name)] for t in split))
        for name, split in (("images", data.train), ("tests", data.test))
    )
    return dataclasses.replace(data, train=train, test=test)


def settings_of(config: dict, data: Cifar10, **changes: object) -> Config:
    """The run as a Config of bnkern.train."""
    settings = {name: config[name] for name in ("seed", "depth", "norm", "shortcut", "init", "kernels", "batch")}
    settings |= {name: value for name, value in config["options"].items() if name not in PROCEDURE_OPTIONS}
    channels_last = config.get("layout") != "contiguous"
    intervals = {"evaluate_every": max(1, settings.get("epochs", 165) // 8), "checkpoint_every": 200}
    return Config(config["label"], data=data.source, channels_last=channels_last, **intervals | settings | changes)


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


def progress(config: Config, data: Cifar10, tick: Tick) -> Callable[[int], None]:
    """The ``watch`` argument for bnkern.train, which calls ``tick``."""
    steps = config.epochs * (len(data.train.labels) // config.batch)
    return lambda done: tick(done / steps, f"{config.name}, step {done} of {steps}")


# ------------------------------------------------------------------------------------------------ noise during training


class Noise:
    """Measures C, the variance of the gradient times the batch size, a number of times in a run, evenly in ln step.

    Before those steps ``parts`` additional batches of the run's own size pass through the network in training mode.
    They come from epochs that training does not reach. Gradients and running statistics are restored afterwards. The
    probe ``gradient_noise_scale`` computes the sums.

    It is the ``before_step`` of bnkern.train. The steps are known beforehand and the measurement is outside of the
    step, so a GPU replays the training step as a CUDA graph before and after it.
    """

    PARTS, FIRST_EPOCH = 8, 2**31

    def __init__(
        self, config: Config, data: Cifar10, device: torch.device, out: Path, times: int, parts: int = PARTS
    ) -> None:
        self.config, self.data, self.device, self.out, self.parts = config, data, device, out, parts
        self.steps = config.epochs * (len(data.train.labels) // config.batch)
        self.due = {0, *np.unique(np.geomspace(1, self.steps - 1, times - 1).round().astype(int)).tolist()}

    @cached_property
    def batches(self) -> Batches:
        data = self.data.to(self.device)
        return loop.batches_of(self.config, data.train, data)

    def __call__(self, network: nn.Module, step: int) -> None:
        if step in self.due:
            self._measure(network, step)

    def _measure(self, network: nn.Module, step: int) -> None:
        gradients = [parameter.grad for parameter in network.parameters()]
        statistics = {name: t.clone() for name, t in network.named_buffers()}
        network.zero_grad()
        recorded = self.record(network, step)
        self.out.mkdir(exist_ok=True)
        np.savez(self.out / f"{step:07d}.npz", step=step, **recorded)  # type: ignore[arg-type]
        for parameter, gradient in zip(network.parameters(), gradients, strict=True):
            parameter.grad = gradient
        for name, t in network.named_buffers():
            t.copy_(statistics[name])

    def record(self, network: nn.Module, step: int) -> dict[str, np.ndarray]:
        """One measurement on a network without gradients: named arrays with one number."""
        with TemporaryDirectory() as out:
            with record(network, ["gradient_noise_scale"], out=out) as recording:
                for loss in self.losses(network, step):
                    (loss / self.parts).backward()
                recording.step()
            return load(out)["gradient_noise_scale"][""]

    def losses(self, network: nn.Module, step: int) -> Iterator[Tensor]:
        """The mean loss of each part."""
        for part in range(self.parts):
            images, labels = self.batches.at(self.FIRST_EPOCH + step, part % len(self.batches))
            with autocast(self.config, self.device):
                logits = network(images)
            yield loss_of(logits, labels)

    def measured(self, steps: int) -> list[dict[str, np.ndarray]]:
        """The measurements up to ``steps``, in the order of their steps."""
        rows = [dict(np.load(file)) for file in sorted(self.out.glob("*.npz"))]
        return [row for row in rows if row["step"] <= steps]

    def arrays(self, steps: int) -> Arrays:
        """For each measurement up to ``steps``: ``step``, ``C`` = |B| times the variance, ``|g|^2``, ``lr C / |B|``."""
        size = self.config.batch
        measured = self.measured(steps)
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
