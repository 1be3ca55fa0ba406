"""Short runs for the tests of training, and comparisons of runs."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from bnkern.train import checkpoint, cifar10
from bnkern.train.cifar10 import Cifar10
from bnkern.train.config import Config
from bnkern.train.loop import batches_of, build
from bnkern.train.runlog import rows
from bnkern.train.step import Step

TIMING = ("seconds", "images_per_second")


def tiny(**changes: object) -> Config:
    """ResNet-8, 12 steps in 2 epochs."""
    settings = {"name": "tiny", "depth": 8, "data": "synthetic", "batch": 8, "epochs": 2, "log_every": 4}
    return Config(**settings | changes)


def images() -> Cifar10:
    return cifar10.synthetic(train=48, test=20)


def stepper(config: Config, data: Cifar10, wrap: Callable[[nn.Module], nn.Module] = lambda network: network) -> Step:
    """A fresh network of the config and its step, on the CPU, at the start of epoch 0. ``wrap`` makes the model."""
    torch.manual_seed(config.seed)
    network = build(config)
    batches = batches_of(config, data.train, data)
    batches.start(0)
    step = Step(wrap(network), network, batches, config)
    step.network, step.batches = network, batches
    step.lr.fill_(config.lr)
    return step


def untimed(folder: Path) -> list[dict]:
    """The metrics of a run without the entries that differ between two runs of one config."""
    return [{k: v for k, v in row.items() if k not in TIMING} for row in rows(folder)]


def tensors(folder: Path, name: str = "checkpoint.pt") -> dict[str, Tensor]:
    """Every tensor in a checkpoint by its path."""
    results = {}

    def walk(path: str, value: object) -> None:
        if isinstance(value, Tensor):
            results[path] = value
        elif isinstance(value, dict):
            for key, inside in value.items():
                walk(f"{path}/{key}", inside)

    walk("", checkpoint.read(folder / name))
    return results


def assert_same_run(first: Path, second: Path, checkpoint: str = "checkpoint.pt") -> None:
    """Both runs finished, with the same metrics and the same bits of all tensors."""
    assert (first / "DONE").exists() and (second / "DONE").exists()
    assert untimed(first) == untimed(second)
    ours, theirs = tensors(first, checkpoint), tensors(second, checkpoint)
    assert len(ours) > 20 and ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name
