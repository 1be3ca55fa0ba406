"""Statistics of a network before its first step, each recorded by a probe."""

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from bnkern.probes import load, record
from bnkern.probes.files import Recording
from bnkern.probes.quantities import Quantity, make
from bnkern.train.cifar10 import Cifar10, batches
from bnkern.train.resnet import ResNet, layers

from . import Arrays, Tick, build

Names = dict[int, str]  # of modules, by the paper's number of the layer


def measure(config: dict, data: Cifar10, device: torch.device, folder: Path, tick: Tick) -> dict[str, Arrays]:
    """The configured quantities at the configured layers of a fresh network, on batches of training images.

    The seed fixes the network and the batches, ``options["batches"]`` of them (default 1), each a step of the
    recording. The loss is the mean cross-entropy; nothing is updated, and images are not augmented. Quantities that
    need no gradient cost no backward pass.
    """
    model, options = build(config).to(device), config["options"]
    wanted = {name: STATISTICS[name] for name in config["quantities"]}
    names = layer_names(model, config["layers"])
    probes = [probe for statistic in wanted.values() for probe in statistic.probes(names, options)]
    with_gradients = any(statistic.gradients for statistic in wanted.values())
    count = options.get("batches", 1)
    with TemporaryDirectory() as out, torch.set_grad_enabled(with_gradients):
        with record(model, probes, out=out) as recording:
            for k, chosen in zip(range(count), batches(data.train, config["batch"], config["seed"]), strict=False):
                tick(k / count, f"forward {k + 1} of {count}")
                images, labels = data.normalise(chosen.images.to(device)), chosen.labels.to(device)
                loss = F.cross_entropy(model(images), labels)
                if with_gradients:
                    tick((k + 0.3) / count, f"backward {k + 1} of {count}")
                    loss.backward()
                recording.step(loss)
                model.zero_grad()
        recorded = load(out)
    return {name: statistic.arrays(recorded, names) for name, statistic in wanted.items()}


def layer_names(model: ResNet, numbers: list[int]) -> Names:
    """The names of the layers with these numbers."""
    known = {module: name for name, module in model.named_modules()}
    return {number: known[layers(model)[number]] for number in numbers}


# ------------------------------------------------------------------------------------------------ what can be measured


class Statistic(NamedTuple):
    """Which probes to record for it at these layers under these options, and what to make of the recording."""

    probes: Callable[[Names, dict], list[Quantity]]
    arrays: Callable[[Recording, Names], Arrays]
    gradients: bool = True


def _moments_probes(names: Names, options: dict) -> list[Quantity]:
    convolutions = [_norm_of(name) for name in names.values() if name != "fc"]
    found = [make("activation_moments", layers=convolutions)] if convolutions else []
    return found + ([make("output_moments", layers="fc")] if "fc" in names.values() else [])


def _log_moments(recorded: Recording, names: Names) -> Arrays:
    """ln |mean| and ln std of each channel of a layer's output [C]; -inf for one that is exactly zero."""
    arrays: Arrays = {}
    for number, name in names.items():
        probe, layer = ("output_moments", "fc") if name == "fc" else ("activation_moments", _norm_of(name))
        moments = recorded[probe][layer]
        with np.errstate(divide="ignore"):
            arrays[f"ln_abs_mean/{number}"] = np.log(np.abs(moments["mean"][0]))
            arrays[f"ln_std/{number}"] = np.log(moments["var"][0]) / 2
    return arrays


def _signs_probes(names: Names, options: dict) -> list[Quantity]:
    # The moments ride along for their count, the number of summands.
    return [
        make("weight_gradient_signs", layers=names.values(), centred=options.get("centred") or None),
        make("activation_moments", layers=[_norm_of(name) for name in names.values()]),
    ]


def _gradient_signs(recorded: Recording, names: Names) -> Arrays:
    """a = mean over weights of sum |d| / N, b = mean of |sum d| / N, their ratios, and the sums weight by weight."""
    arrays: Arrays = {}
    for number, name in names.items():
        count = recorded["activation_moments"][_norm_of(name)]["count"][0, 0]
        sums = {row: values[0] for row, values in recorded["weight_gradient_signs"][name].items()}
        a, b = (np.abs(sums[row]).mean() / count for row in ("abs_sum", "sum"))
        found = {
            "a": a,
            "b": b,
            "a/b": a / b if b else np.inf,
            "a/(b sqrt N)": a / b / count**0.5 if b else np.inf,
            "median a/b of single weights": np.nanmedian(sums.pop("ratio")),  # 0/0 between dead channels: left out
            "sign agreement": np.nanmean(sums.pop("agreement")),
            "count": count,
            **{row: values.astype(np.float32) for row, values in sums.items()},
        }
        arrays |= {f"{row}/{number}": np.asarray(value) for row, value in found.items()}
    return arrays


def _channel_probes(names: Names, options: dict) -> list[Quantity]:
    return [
        make("weight_gradient_signs", layers=names.values(), form="channels"),
        make("output_moments", layers=[_before(name) for name in names.values()]),
    ]


def _channel_gradients(recorded: Recording, names: Names) -> Arrays:
    """M[o, i] = sum over x', y' of |sum d|, how uneven it is, and how it goes with the |mean| of input channel i."""
    arrays: Arrays = {}
    for number, name in names.items():
        matrix = recorded["weight_gradient_signs"][name]["abs_of_sum"][0]
        means = np.abs(recorded["output_moments"][_before(name)]["mean"][0])
        residual = matrix / matrix.sum() - np.outer(matrix.sum(1), matrix.sum(0)) / matrix.sum() ** 2
        found = {
            "M": matrix.astype(np.float32),
            "input means": means,
            "variation": matrix.std() / matrix.mean(),
            "variation of rows": matrix.mean(1).std() / matrix.mean(),
            "variation of columns": matrix.mean(0).std() / matrix.mean(),
            "explained by rows and columns": 1 - (residual**2).sum() / ((matrix / matrix.sum()) ** 2).sum(),
            "rank correlation": _rank_correlation(means, matrix.sum(0)),
        }
        arrays |= {f"{row}/{number}": np.asarray(value) for row, value in found.items()}
    return arrays


def _rank_correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's, for values that are all different."""
    first, second = (values.argsort().argsort() for values in (x, y))
    return float(np.corrcoef(first, second)[0, 1])


def _output_gradients(recorded: Recording, names: Names) -> Arrays:
    """dL/dlogits [B, classes] and what is uneven in it. The loss is a mean: B dL/dlogits = softmax - label's one."""
    gradient = recorded["output_gradient"][""]["gradient"][0]
    scaled = gradient * len(gradient)
    shares = np.clip(np.where(scaled < 0, scaled + 1, scaled), 0, 1)  # the softmax: only the label's entry is below 0
    with np.errstate(divide="ignore", invalid="ignore"):
        entropy = -np.where(shares > 0, shares * np.log(shares), 0).sum(1)
    lengths = np.linalg.norm(scaled, axis=1)
    rows = scaled[lengths > 0] / lengths[lengths > 0, None]  # an image that is surely right has no gradient
    pairs = len(rows) * (len(rows) - 1)
    return {
        "gradient": gradient.astype(np.float32),
        "largest column mean": np.asarray(scaled.mean(0).max()),
        "entropy": np.asarray(entropy.mean()),
        "cosine": np.asarray((np.square(rows.sum(0)).sum() - len(rows)) / pairs if pairs else np.nan),
    }


def _histogram_probes(names: Names, options: dict) -> list[Quantity]:
    return [make("parameter_gradient_histogram", layers=[f"{name}.weight" for name in names.values()])]


def _gradient_histogram(recorded: Recording, names: Names) -> Arrays:
    """The entries of a weight's gradient, those of all batches together: histogram, standard deviation, kurtosis."""
    arrays: Arrays = {}
    for number, name in names.items():
        steps = recorded["parameter_gradient_histogram"][f"{name}.weight"]
        mean, var, third, fourth = (steps[row] for row in ("mean", "var", "third", "fourth"))
        shift = mean - mean.mean()  # batches have as many entries each
        second = (var + shift**2).mean()
        fourth = (fourth + 4 * shift * third + 6 * shift**2 * var + shift**4).mean()
        found = {
            "sd": second**0.5,
            "excess kurtosis": fourth / second**2 - 3,
            "largest": np.maximum(-steps["min"], steps["max"]).max(),
            "histogram": steps["histogram"].sum(0),
            "edges": steps["edges"][0],
        }
        arrays |= {f"{row}/{number}": np.asarray(value) for row, value in found.items()}
    return arrays


def _propagation(recorded: Recording, names: Names) -> Arrays:
    """How activations grow along the blocks: rows of the probe ``signal_propagation``, at a block's last layer."""
    arrays: Arrays = {}
    for k, block in enumerate(recorded["signal_propagation"].values()):
        branch, skip = block["branch_variance"][0], block["skip_variance"][0]
        found = {"mean square": block["mean_square"][0], "variance": block["variance"][0]}
        found["branch over skip"] = branch / skip
        arrays |= {f"{row}/{3 + 2 * k}": np.asarray(value) for row, value in found.items()}
    return arrays


def _norm_of(conv: str) -> str:
    """The norm layer that reads a convolution's output: of the same number in its block, or after the stem."""
    return conv.replace("conv", "norm")


def _before(conv: str) -> str:
    """The norm layer whose output a block's second convolution reads."""
    if not conv.endswith("conv2"):
        raise ValueError(f"{conv} is not a block's second convolution, the only one that reads a norm layer's output")
    return conv.replace("conv2", "norm1")


STATISTICS = {
    "log_moments": Statistic(_moments_probes, _log_moments, gradients=False),
    "gradient_signs": Statistic(_signs_probes, _gradient_signs),
    "channel_gradients": Statistic(_channel_probes, _channel_gradients),
    "output_gradients": Statistic(lambda names, options: [make("output_gradient")], _output_gradients),
    "gradient_histogram": Statistic(_histogram_probes, _gradient_histogram),
    "propagation": Statistic(lambda names, options: [make("signal_propagation")], _propagation, gradients=False),
}
