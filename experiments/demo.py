"""The demo: Table 1 of the paper on one seed, and a probe of two short training runs, as numbers and as one figure.

``python -m experiments demo`` takes a minute or two on two cores. Everything is written to ``<out>/<data>/``, where
``data`` is "cifar10" or "synthetic": the runs of ``gradient_signs``, with the same files as those of
``python -m experiments run``, the two recordings, and ``demo.png``.
"""

import os
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from bnkern.probes import load, record
from bnkern.train import cifar10
from bnkern.train.resnet import ResNet

from . import draw, drawer, spec
from .draw.demo import draw as draw_demo
from .results import read
from .run import run

TABLE = "gradient_signs"
TITLE = "Table 1, and a probe of two short training runs"
PROBE = "activation_moments"
SETTINGS = {"full": {"depth": 8, "batch": 128, "steps": 15}, "smoke": {"depth": 8, "batch": 4, "steps": 2}}
LEARNING_RATE = 0.1


def demo(data: str | None, device: str | None, out: Path, scale: str = "full") -> int:
    """Runs, prints and draws the demo.

    Args:
        data: as for bnkern.train.cifar10.load. If it is not given and CIFAR-10 is not available, synthetic images are
            used instead, and a message is printed.
        device: torch's name. The default is "cuda" if there is a GPU, and else "cpu".
        out: folder of the results.
        scale: "full", or "smoke" for a test on a few images.

    Returns:
        the exit status: 0; that of the runner if Table 1 was not measured; 1 if the data are missing.
    """
    start = time.perf_counter()
    requested = data or os.environ.get("BNKERN_DATA")
    try:
        images = cifar10.load(requested)
    except cifar10.DataError as error:
        print(error, file=sys.stderr)
        if requested:
            return 1
        images, requested = cifar10.synthetic(), "synthetic"
    out = out / images.source
    if images.source == "synthetic":
        print("The images are synthetic, not CIFAR-10: the numbers below are not comparable with the paper's.")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")

    print("\nStep 1 of 2: Table 1 of the paper, on a fresh ResNet-110 with and without batch norm", flush=True)
    if status := run([TABLE], scale, requested, device, seeds=1, out=out):
        return status
    rows = drawer(TABLE).tables(spec(TABLE), read(out / TABLE, spec(TABLE), scale))[TABLE]
    print(_table(rows))

    settings = SETTINGS[scale]
    print(
        f"\nStep 2 of 2: {settings['steps']} training steps of a ResNet-{settings['depth']} at learning rate "
        f"{LEARNING_RATE:g}, with {PROBE} recorded at every step",
        flush=True,
    )
    for norm in draw.NETS:
        rows += _training(norm, images, torch.device(device), out / f"probes-{norm}", **settings)
    draw.save(draw_demo, rows, out / "demo", TITLE, draw_demo.__doc__ or "")
    print(f"recordings: {out}/probes-*, which bnkern.probes.load reads")
    print(f"figure: {out / 'demo.png'}")
    print(f"The demo took {time.perf_counter() - start:.0f} s. `make reproduce` runs all experiments of the paper.")
    return 0


def _table(rows: draw.Rows) -> str:
    """Table 1 as text."""
    lines = [f"{'a/b at layer':<14}{'network':<18}{'paper':>8}{'bnkern':>9}"]
    for row in sorted(rows, key=lambda row: row["layer"]):
        network = draw.NETS[row["norm"]][0]
        lines.append(f"{row['layer']:<14}{network:<18}{row['a/b paper']:>8g}{row['a/b']:>9.3g}")
    lines.append("a/b is large if the summands of a weight's gradient cancel.")
    return "\n".join(lines)


def _training(
    norm: str, images: cifar10.Cifar10, device: torch.device, folder: Path, depth: int, batch: int, steps: int
) -> draw.Rows:
    """A few steps of SGD under a probe, and for each step the spread of the inputs of the last norm layer."""
    shutil.rmtree(folder, ignore_errors=True)
    torch.manual_seed(0)
    model = ResNet(depth, norm).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in the stub
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE, momentum=0.9)
    network, losses = draw.NETS[norm][0], []
    with record(model, [PROBE], out=folder) as recorder:
        for chosen, _ in zip(
            cifar10.batches(images.train, batch, seed=0),
            tqdm(range(steps), desc=network, disable=None, leave=False),
            strict=False,
        ):
            inputs = images.normalise(chosen.images.to(device)).contiguous(memory_format=torch.channels_last)
            loss = F.cross_entropy(model(inputs), chosen.labels.to(device))
            loss.backward()
            optimizer.step()
            recorder.step(loss)
            optimizer.zero_grad()
            losses.append(loss.item())
    recorded = load(folder)
    last = f"blocks.{len(model.blocks) - 1}.norm2"
    low, median, high = np.percentile(np.sqrt(recorded[PROBE][last]["var"]), (5, 50, 95), axis=1)
    print(
        f"{network}: loss {losses[0]:.2f} -> {losses[-1]:.2f}; standard deviation of the input of {last}, "
        f"median channel {median[0]:.2f} -> {median[-1]:.2f}",
        flush=True,
    )
    return [
        {"norm": norm, "step": step, "sd": median[k], "sd low": low[k], "sd high": high[k]}
        for k, step in enumerate(recorded.steps)
    ]
