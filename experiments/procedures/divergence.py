"""Activations at points along the update that makes training diverge."""

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
    """Channel moments of the configured layers' outputs at ``options["parts"]`` + 1 points along one update.

    A network is trained at ``options["lr"]``, as in the paper's Figure 1, until the loss of a mini-batch after step 0
    is above 1e3. Let theta0 and theta1 be the parameters before and after the update that precedes this loss. The
    parameters are set to theta0 + p (theta1 - theta0) for p from 0 to 1, in float64. For each p the network computes
    the loss of that mini-batch, with batch norm in training mode.

    Returns ``part`` [points], ``loss`` [points] and ``step``, the step with the loss above 1e3. For each layer it
    returns ``mean/<layer>`` and ``var/<layer>`` [points, C]; ``largest mean/<layer>``, which is max |mean| over
    channels at p = 1; and ``half way/<layer>``, the p from which on max |mean| is at least half of that value, with
    linear interpolation between points.

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
        log_every=1,  # checks the loss of every step
    )
    tick(0, "training until it diverges")
    training = folder / "training"
    with open(os.devnull, "w") as devnull, contextlib.redirect_stdout(devnull):
        outcome = train(run, training, data, device)
    if outcome.diverged is None:
        raise RuntimeError(f"training at lr {options['lr']} did not diverge in {outcome.steps} steps")
    state = checkpoint.read(training / "diverged.pt")
    images, labels = (state["batches"]["shown"][name].to(device) for name in ("images", "labels"))
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
                before, after = (state[moment][name].to(parameter) for moment in ("before", "after"))
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
    for subfolder in ("training", "recording"):
        shutil.rmtree(folder / subfolder)
    return {"divergence": {name: np.asarray(value) for name, value in arrays.items()}}


def _half_way(values: np.ndarray, parts: np.ndarray) -> float:
    """The part at which the values rise above half of the last value for the last time."""
    half = values[-1] / 2
    below = np.flatnonzero(values < half)
    if not len(below):
        return parts[0]
    k = below[-1]
    return float(np.interp(half, values[k : k + 2], parts[k : k + 2]))
