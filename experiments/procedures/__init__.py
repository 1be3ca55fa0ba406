"""What specs name as procedures: each takes a run's configuration and the data, and gives what it measured.

A procedure is a file here with a function ``measure(config, data, device, folder, tick)``; its file's name is its own.

    config  the run as ``config.json`` has it: the fields of specs.Run (its seed in ``seed``)
    data    CIFAR-10 on the CPU, or made-up images; None where the spec needs no images
    device  where to compute
    folder  the run's own, for what must survive an interruption, such as checkpoints: a run that is done again after
            one finds there what it left, unless its configuration changed
    tick    call it with the share of the run that is done, and what comes next

It returns {file: {name: array}}, written as ``probes/<file>.npz``. Names of what belongs to a layer end in "/" and its
number. An exception is a failed run; a network that diverges is a result.
"""

import importlib
import pkgutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from bnkern.train.cifar10 import Cifar10
from bnkern.train.resnet import ResNet

Arrays = dict[str, np.ndarray]
Tick = Callable[[float, str], None]
Procedure = Callable[[dict, Cifar10 | None, torch.device, Path, Tick], dict[str, Arrays]]


def build(config: dict) -> ResNet:
    """The fresh network of a run, drawn from its seed."""
    torch.manual_seed(config["seed"])
    return ResNet(config["depth"], config["norm"], config["shortcut"], config["kernels"], init=config["init"])


PROCEDURES: dict[str, Procedure] = {
    module.name: importlib.import_module(f"{__name__}.{module.name}").measure
    for module in pkgutil.iter_modules(__path__)
}
