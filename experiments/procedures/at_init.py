"""Statistics of a network before its first step. Probes record each of them."""

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

Names = dict[int, str]  # names of modules, by the number that the paper gives the layer


def measure(config: dict, data: Cifar10, device: torch.device, folder: Path, tick: Tick) -> dict[str, Arrays]:
    """The configured quantities at the configured layers of a fresh network, on batches of training images.

    The seed determines the network and the batches. There are ``options["batches"]`` batches (default 1), and each is
    one step of the recording. The loss is the mean cross-entropy. Nothing is updated, and images are not augmented. If
    no quantity needs a gradient, there is no backward pass.
    """
    model, options = build(config).to(device), config["options"]
    statistics = {name: STATISTICS[name] for name in config["quantities"]}
    names = layer_names(model, config["layers"])
    probes = [probe for statistic in statistics.values() for probe in statistic.probes(names, options)]
    with_gradients = any(statistic.gradients for statistic in statistics.values())
    count = options.get("batches", 1)
    with TemporaryDirectory() as out, torch.set_grad_enabled(with_gradients):
        with record(model, probes, out=out) as recording:
            for k, batch in zip(range(count), batches(data.train, config["batch"], config["seed"]), strict=False):
                tick(k / count, f"forward {k + 1} of {count}")
                images, labels = data.normalise(batch.images.to(device)), batch.labels.to(device)
                loss = F.cross_entropy(model(images), labels)
                if with_gradients:
                    tick((k + 0.3) / count, f"backward {k + 1} of {count}")
                    loss.backward()
                recording.step(loss)
                model.zero_grad()
        recorded = load(out)
    return {name: statistic.arrays(recorded, names) for name, statistic in statistics.items()}


def layer_names(model: ResNet, numbers: list[int]) -> Names:
    """The module names of the layers with these numbers."""
    names = {module: name for name, module in model.named_modules()}
    return {number: names[layers(model)[number]] for number in numbers}


# ------------------------------------------------------------------------------------------------ statistics


class Statistic(NamedTuple):
    """One statistic: a function that makes its probes for some layers and options, and one that reads the recording."""

    probes: Callable[[Names, dict], list[Quantity]]
    arrays: Callable[[Recording, Names], Arrays]
    gradients: bool = True


def _moments_probes(names: Names, options: dict) -> list[Quantity]:
    convolutions = [_norm_of(name) for name in names.values() if name != "fc"]
    probes = [make("activation_moments", layers=convolutions)] if convolutions else []
    return probes + ([make("output_moments", layers="fc")] if "fc" in names.values() else [])


def _log_moments(recorded: Recording, names: Names) -> Arrays:
    """ln |mean| and ln std of each channel of a layer's output [C]. Both are -inf for a value of exactly zero."""
    arrays: Arrays = {}
    for number, name in names.items():
        probe, layer = ("output_moments", "fc") if name == "fc" else ("activation_moments", _norm_of(name))
        moments = recorded[probe][layer]
        with np.errstate(divide="ignore"):
            arrays[f"ln_abs_mean/{number}"] = np.log(np.abs(moments["mean"][0]))
            arrays[f"ln_std/{number}"] = np.log(moments["var"][0]) / 2
    return arrays


def _signs_probes(names: Names, options: dict) -> list[Quantity]:
    # The moments are recorded for their count, which is the number of summands.
    return [
        make("weight_gradient_signs", layers=names.values(), centred=options.get("centred") or None),
        make("activation_moments", layers=[_norm_of(name) for name in names.values()]),
    ]


def _gradient_signs(recorded: Recording, names: Names) -> Arrays:
    """a = mean over weights of sum |d| / N, b = mean of |sum d| / N, their ratios, and the sums of each weight."""
    arrays: Arrays = {}
    for number, name in names.items():
        count = recorded["activation_moments"][_norm_of(name)]["count"][0, 0]
        sums = {row: steps[0] for row, steps in recorded["weight_gradient_signs"][name].items()}
        a, b = (np.abs(sums[row]).mean() / count for row in ("abs_sum", "sum"))
        values = {
            "a": a,
            "b": b,
            "a/b": a / b if b else np.inf,
            "a/(b sqrt N)": a / b / count**0.5 if b else np.inf,
            "median a/b of single weights": np.nanmedian(sums.pop("ratio")),  # without 0/0 between dead channels
            "sign agreement": np.nanmean(sums.pop("agreement")),
            "count": count,
            **{row: sum_of_weights.astype(np.float32) for row, sum_of_weights in sums.items()},
        }
        arrays |= {f"{row}/{number}": np.asarray(value) for row, value in values.items()}
    return arrays


def _channel_probes(names: Names, options: dict) -> list[Quantity]:
    return [
        make("weight_gradient_signs", layers=names.values(), form="channels"),
        make("output_moments", layers=[_before(name) for name in names.values()]),
    ]


def _channel_gradients(recorded: Recording, names: Names) -> Arrays:
    """M[o, i] = sum over x', y' of |sum d|, its variation, and its correlation with the |mean| of input channel i."""
    arrays: Arrays = {}
    for number, name in names.items():
        matrix = recorded["weight_gradient_signs"][name]["abs_of_sum"][0]
        means = np.abs(recorded["output_moments"][_before(name)]["mean"][0])
        residual = matrix / matrix.sum() - np.outer(matrix.sum(1), matrix.sum(0)) / matrix.sum() ** 2
        values = {
            "M": matrix.astype(np.float32),
            "input means": means,
            "variation": matrix.std() / matrix.mean(),
            "variation of rows": matrix.mean(1).std() / matrix.mean(),
            "variation of columns": matrix.mean(0).std() / matrix.mean(),
            "explained by rows and columns": 1 - (residual**2).sum() / ((matrix / matrix.sum()) ** 2).sum(),
            "rank correlation": _rank_correlation(means, matrix.sum(0)),
        }
        arrays |= {f"{row}/{number}": np.asarray(value) for row, value in values.items()}
    return arrays


def _rank_correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's rank correlation, for values that are all different."""
    ranks_x, ranks_y = (values.argsort().argsort() for values in (x, y))
    return float(np.corrcoef(ranks_x, ranks_y)[0, 1])


def _output_gradients(recorded: Recording, names: Names) -> Arrays:
    """dL/dlogits [B, classes] and its statistics. The loss is a mean, so B dL/dlogits = softmax - one-hot label."""
    gradient = recorded["output_gradient"][""]["gradient"][0]
    scaled = gradient * len(gradient)
    softmax = np.clip(np.where(scaled < 0, scaled + 1, scaled), 0, 1)  # only the entry of the label is below 0
    with np.errstate(divide="ignore", invalid="ignore"):
        entropy = -np.where(softmax > 0, softmax * np.log(softmax), 0).sum(1)
    norms = np.linalg.norm(scaled, axis=1)
    rows = scaled[norms > 0] / norms[norms > 0, None]  # the gradient is zero if the label's probability is 1
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
    """Histogram, standard deviation and kurtosis of the entries of a weight's gradient, over all batches together."""
    arrays: Arrays = {}
    for number, name in names.items():
        steps = recorded["parameter_gradient_histogram"][f"{name}.weight"]
        mean, var, third, fourth = (steps[row] for row in ("mean", "var", "third", "fourth"))
        shift = mean - mean.mean()  # all batches have the same number of entries
        second = (var + shift**2).mean()
        fourth = (fourth + 4 * shift * third + 6 * shift**2 * var + shift**4).mean()
        values = {
            "sd": second**0.5,
            "excess kurtosis": fourth / second**2 - 3,
            "largest": np.maximum(-steps["min"], steps["max"]).max(),
            "histogram": steps["histogram"].sum(0),
            "edges": steps["edges"][0],
        }
        arrays |= {f"{row}/{number}": np.asarray(value) for row, value in values.items()}
    return arrays


def _propagation(recorded: Recording, names: Names) -> Arrays:
    """The growth of activations along the blocks: rows of the probe ``signal_propagation``, at a block's last layer."""
    arrays: Arrays = {}
    for k, block in enumerate(recorded["signal_propagation"].values()):
        branch, skip = block["branch_variance"][0], block["skip_variance"][0]
        values = {"mean square": block["mean_square"][0], "variance": block["variance"][0]}
        values["branch over skip"] = branch / skip
        arrays |= {f"{row}/{3 + 2 * k}": np.asarray(value) for row, value in values.items()}
    return arrays


def _norm_of(conv: str) -> str:
    """The norm layer that reads a convolution's output. It has the same number in its block, or follows the stem."""
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
