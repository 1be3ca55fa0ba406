"""Convert a model of another library, check that it still computes the same, and measure a training step of both.

    pip install 'bnkern[models]'  # transformers, which has the model
    python examples/convert_model.py --rounds 10

The ResNet of transformers is built with random weights, so nothing is downloaded.
"""

import argparse
import copy
import statistics
import time

import torch
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetForImageClassification

import bnkern


def train_once(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """One forward and backward pass; the time in milliseconds."""
    model.zero_grad()
    start = time.perf_counter()
    model(pixel_values=images, labels=labels).loss.backward()
    return 1e3 * (time.perf_counter() - start)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=64, help="height and width of the images")
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    widths = {"embedding_size": 64, "hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2]}  # a ResNet-18
    original = ResNetForImageClassification(ResNetConfig(layer_type="basic", num_labels=10, **widths))
    converted = bnkern.convert(copy.deepcopy(original))  # it converts in place, so it gets a copy
    print(bnkern.convert.summary(converted))

    images = torch.randn(args.batch, 3, args.size, args.size)
    labels = torch.randint(10, (args.batch,))
    models = {"original": original, "converted": converted}
    losses = {name: model(pixel_values=images, labels=labels).loss.item() for name, model in models.items()}
    print(f"loss: {losses['original']:.6f} before the conversion, {losses['converted']:.6f} after it")

    times = {name: [] for name in models}
    for _ in range(args.rounds):  # both models run in every round, so that a busy machine slows both
        for name, model in models.items():
            times[name].append(train_once(model, images, labels))
    for name, elapsed in times.items():
        print(f"{name}: {statistics.median(elapsed):.1f} ms for a forward and backward pass (median of {args.rounds})")


if __name__ == "__main__":
    main()
