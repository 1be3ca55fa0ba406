"""Activations while the update that makes training diverge is applied bit by bit."""

import contextlib
import os
import shutil
from pathlib import Path

import numpy as np
import torch

from bnkern.probes import load, record
from bnkern.probes.quantities import make
from bnkern.train import checkpoint
from bnkern.train.cifar10 import Cifar10
from bnkern.train.config import Config
from bnkern.train.loop import train
from bnkern.train.step import loss_of

from . import Arrays, Tick, build
from .at_init import layer_names


def measure(config: dict, data: Cifar10, device: torch.device, folder: Path, tick: Tick) -> dict[str, Arrays]:
    """Channel moments at the configured layers' outputs at ``options["parts"]`` + 1 points between two parameters.

    A network is trained at ``options["lr"]``, as the paper's Figure 1 is, until a mini-batch's loss is above 1e3 after
    step 0. With theta0 and theta1 the parameters before and after the update that came before that loss, all are set
    to theta0 + p (theta1 - theta0), p = 0 .. 1, in float64, and fed that mini-batch, batch norm in training mode.

    Returns ``part`` [points], ``loss`` [points], ``step`` (whose loss was too large), and by layer ``mean/<layer>`` and
    ``var/<layer>`` [points, C], ``largest mean/<layer>`` = max |mean| over channels at p = 1, and
    ``half way/<layer>``, the p from which on max |mean| is at least half of that, between points by a straight line.

    Raises:
        RuntimeError: training did not diverge within ``options["epochs"]`` epochs.
    """
    options = config["options"]
    names = ("seed", "depth", "norm", "shortcut", "init", "kernels", "batch")
    run = Config(
        "divergence",
        **{name: config[name] for name in names},
        data=data.source,
        lr=options["lr"],
        epochs=options["epochs"],
        log_every=1,  # looks at every step
    )
    tick(0, "training until it diverges")
    training = folder / "training"
    with open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet):
        outcome = train(run, training, data, device)
    if outcome.diverged is None:
        raise RuntimeError(f"training at lr {options['lr']} did not diverge in {outcome.steps} steps")
    found = checkpoint.read(training / "diverged.pt")
    images, labels = (found["batches"]["shown"][name].to(device) for name in ("images", "labels"))
    network = build(config).to(device, torch.float64)
    layers = layer_names(network, config["layers"])
    norms = {number: name.replace("conv", "norm") for number, name in layers.items()}
    parts, losses = np.linspace(0, 1, options["parts"] + 1), []
    shutil.rmtree(folder / "recording", ignore_errors=True)
    with (
        torch.no_grad(),
        record(network, [make("activation_moments", layers=norms.values())], out=folder / "recording") as recording,
    ):
        for part in parts:
            tick(0.2 + 0.8 * part, f"{part:.0%} of the update")
            for name, parameter in network.named_parameters():
                before, after = (found[which][name].to(parameter) for which in ("before", "after"))
                parameter.copy_(before + part * (after - before))
            losses.append(loss_of(network(images.double()), labels).item())
            recording.step()
    moments = load(folder / "recording")["activation_moments"]
    arrays: dict[str, np.ndarray | float] = {
        "part": parts,
        "loss": np.array(losses),
        "step": np.asarray(outcome.diverged),
    }
    for number, name in norms.items():
        largest = np.abs(moments[name]["mean"]).max(1)
        arrays |= {
            f"mean/{number}": moments[name]["mean"],
            f"var/{number}": moments[name]["var"],
            f"largest mean/{number}": largest[-1],
            f"half way/{number}": _half_way(largest, parts),
        }
    for left in ("training", "recording"):
        shutil.rmtree(folder / left)
    return {"divergence": {name: np.asarray(value) for name, value in arrays.items()}}


def _half_way(values: np.ndarray, parts: np.ndarray) -> float:
    """Where values rise for the last time past half of the last one."""
    half = values[-1] / 2
    below = np.flatnonzero(values < half)
    if not len(below):
        return parts[0]
    k = below[-1]
    return float(np.interp(half, values[k : k + 2], parts[k : k + 2]))
