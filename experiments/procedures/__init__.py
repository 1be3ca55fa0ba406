"""The procedures that specs name. Each takes the configuration of a run and the data, and returns the measurements.

A procedure is a file of this package with a function ``measure(config, data, device, folder, tick)``. The file's name
is the name of the procedure.

    config  the run as it is in ``config.json``: the fields of specs.Run, with its seed as ``seed``. The runner adds
            ``layout``, one of specs.LAYOUTS, in which the activations of training runs are stored
    data    CIFAR-10 on the CPU, or synthetic images; None if the spec needs no images
    device  the device that computes
    folder  the folder of the run, for files that must survive an interruption, such as checkpoints. A run that is
            started again after an interruption has these files, unless its configuration changed.
    tick    a function to call with the share of the run that is done, and the text of the next step. It raises
            bnkern.train.loop.Stopped if the time of the command is over; then the run is started again later

It returns {file: {name: array}}, which is written as ``probes/<file>.npz``. The name of an array that belongs to a
layer ends in "/" and the layer's number. An exception means a failed run. A network that diverges is a result.
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
    """The network of a run before training. Its weights are drawn with the run's seed."""
    torch.manual_seed(config["seed"])
    return ResNet(config["depth"], config["norm"], config["shortcut"], config["kernels"], init=config["init"])


PROCEDURES: dict[str, Procedure] = {
    module.name: importlib.import_module(f"{__name__}.{module.name}").measure
    for module in pkgutil.iter_modules(__path__)
}
