"""The command line ``python -m bnkern.train NAME...``. Under torchrun it does one run in several processes."""

import argparse
import json
import os
import sys
from pathlib import Path

import torch

from . import cifar10
from .config import PRESETS, Config, from_dict, laptop, parse, preset
from .loop import train
from .processes import process_group
from .sweep import sweep

EXAMPLES = """\
examples:
  python -m bnkern.train --list
  python -m bnkern.train fig1-batch-0.1 --laptop                 ResNet-20, 10 epochs: two CPU cores
  python -m bnkern.train fig1-batch-0.1 --data synthetic --set epochs=1 depth=8    a short trial
  python -m bnkern.train fig1-batch-0.1 fig1-none-0.0001 --seeds 5 --processes 4
  torchrun --nproc-per-node 2 -m bnkern.train fig1-batch-0.1     one run, each batch shared by two processes
After an interruption the same command continues from the last checkpoint.
"""


def main(words: list[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m bnkern.train",
        description="Trains ResNets on CIFAR-10: the runs of 'Understanding Batch Normalization' and others.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="*", metavar="NAME", help="presets, JSON files of settings, or JSON itself")
    parser.add_argument("--list", action="store_true", help="list the presets")
    parser.add_argument("--laptop", action="store_true", help="presets with ResNet-20 and 10/165 of the epochs")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings to change")
    parser.add_argument("--seeds", type=int, metavar="N", help="seeds 0 .. N-1 of each run (default: its own seed)")
    parser.add_argument("--print", action="store_true", help="print the settings as JSON, train nothing")
    parser.add_argument("--out", type=Path, default=Path("results/train"), help="folder of the results (%(default)s)")
    parser.add_argument("--data", metavar="DIR", help="CIFAR-10's binary version, or: synthetic")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: cuda if there is a GPU)")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="parallel runs on this machine")
    parser.add_argument("--ray", metavar="ADDRESS", help="run on a Ray cluster: auto, local, ray://host:10001")
    parser.add_argument("--gpus", type=float, default=1.0, help="GPUs of a run on Ray, may be a fraction (%(default)s)")
    parser.add_argument("--tensorboard", action="store_true", help="write the metrics for TensorBoard too")
    parser.add_argument(
        "--flight-recorder",
        dest="flight_steps",
        nargs="?",
        type=int,
        const=64,
        default=0,
        metavar="N",
        help="keep numbers of the last N steps (%(const)s) and write them if a run diverges: docs/flight_recorder.md",
    )
    parser.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="skip finished runs and continue unfinished ones (default); --no-resume moves them to .old",
    )
    asked = parser.parse_args(words)
    if asked.list:
        for name, run in PRESETS.items():
            print(f"{name:<18} ResNet-{run.depth}, norm {run.norm}, lr {run.lr:g}, {run.epochs} epochs")
        return 0
    if not asked.runs:
        parser.error("name a run; --list lists the presets")
    try:
        configs = _configs(asked)
    except (ValueError, TypeError, OSError) as error:
        parser.error(str(error))
    if asked.print:
        print(json.dumps([config.to_dict() for config in configs], indent=1))
        return 0
    try:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            if len(configs) > 1:
                parser.error("under torchrun all processes do one run together; name one run")
            return _distributed(configs[0], asked)
        options = ("data", "device", "processes", "ray", "gpus", "resume", "tensorboard", "flight_steps")
        return min(1, sweep(configs, asked.out, **{name: getattr(asked, name) for name in options}))
    except (ValueError, RuntimeError, OSError) as error:  # among them DataError and CheckpointError
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; the same command continues from the last checkpoints", file=sys.stderr)
        return 130


def _configs(asked: argparse.Namespace) -> list[Config]:
    changes = {}
    for word in asked.set:
        name, equals, text = word.partition("=")
        if not equals:
            raise ValueError(f"--set takes KEY=VALUE, got {word!r}")
        changes[name] = parse(name, text)
    if asked.data == "synthetic":
        changes["data"] = "synthetic"
    configs = [config.replace(**changes) for text in asked.runs for config in _named(text, asked.laptop)]
    seeds = range(asked.seeds) if asked.seeds else None
    return [config.replace(seed=seed) for config in configs for seed in (seeds or [config.seed])]


def _named(text: str, small: bool) -> list[Config]:
    """Returns the runs of a preset, of JSON or of a JSON file. JSON has the settings of one run or a list of them."""
    if text.endswith(".json"):
        text = Path(text).read_text()
    if text.lstrip()[:1] in ("{", "["):
        values = json.loads(text)
        return [from_dict(run) for run in (values if isinstance(values, list) else [values])]
    return [laptop(text) if small else preset(text)]


def _distributed(config: Config, asked: argparse.Namespace) -> int:
    cuda = asked.device is None and torch.cuda.is_available()
    device = f"cuda:{os.environ['LOCAL_RANK']}" if cuda else asked.device or "cpu"
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    with process_group("nccl" if device.startswith("cuda") else "gloo"):
        data = cifar10.load("synthetic" if config.data == "synthetic" else asked.data)
        options = {"resume": asked.resume, "tensorboard": asked.tensorboard, "flight_steps": asked.flight_steps}
        train(config, asked.out / config.title, data, device, **options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
