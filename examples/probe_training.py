"""Record per-channel statistics while a network trains, and plot them.

    pip install 'bnkern[draw]'  # matplotlib
    python examples/probe_training.py --steps 30 --out run/probe_training

The images are synthetic. Replace ``cifar10.synthetic()`` by ``cifar10.load()`` to train on CIFAR-10.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F

import bnkern
from bnkern.train import cifar10
from bnkern.train.resnet import ResNet


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path("run/probe_training"))
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    data = cifar10.synthetic()
    model = ResNet(depth=8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with bnkern.probes.record(model, ["activation_moments", "gradient_channel_signs"], out=args.out) as recorder:
        for _, batch in zip(range(args.steps), cifar10.batches(data.train, args.batch, seed=0), strict=False):
            loss = F.cross_entropy(model(data.normalise(batch.images)), batch.labels)
            loss.backward()
            optimizer.step()
            recorder.step(loss)  # once per step, before the gradients are cleared
            optimizer.zero_grad()

    recorded = bnkern.probes.load(args.out)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    for layer in recorded.layers("activation_moments")[::2]:
        deviation = np.sqrt(recorded["activation_moments"][layer]["var"])  # [step, channel]
        size = recorded["gradient_channel_signs"][layer]["abs_sum"]
        left.plot(recorded.steps, np.median(deviation, axis=1), label=layer)
        right.plot(recorded.steps, np.median(size, axis=1))
    left.set(xlabel="step", title="standard deviation of the norm layer's input")
    right.set(xlabel="step", title="sum of |dL/dx|", yscale="log")
    figure.legend(loc="outside lower center", ncols=4)
    figure.savefig(args.out / "probes.png")
    print(f"records: {args.out}, figure: {args.out / 'probes.png'}")


if __name__ == "__main__":
    main()
