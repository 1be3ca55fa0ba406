"""The same network on bnkern and on torch trains alike: gradients against float64, and losses step by step."""

import pytest
import torch
import torch.nn.functional as F

from bnkern.train import cifar10
from bnkern.train.loop import build
from tests.training import stepper, tiny


@pytest.mark.parametrize("norm", ["batch", "none", "final"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
def test_gradients_are_as_good_as_torchs(norm: str, channels_last: bool) -> None:
    """Error of a float32 ResNet-20's gradients against float64, over all parameters, at most twice torch's.

    The same parameters and images; the convolutions, which both share, make most of either error.
    """
    torch.manual_seed(3)
    data = cifar10.synthetic(train=32, test=1)
    images, labels = data.normalise(data.train.images), data.train.labels

    def gradients(kernels: str, precision: str) -> torch.Tensor:
        torch.manual_seed(0)
        config = tiny(depth=20, norm=norm, kernels=kernels, precision=precision, channels_last=channels_last)
        network = build(config)
        x = images.double() if precision == "fp64" else images
        x = x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        F.cross_entropy(network(x), labels).backward()
        return torch.cat([parameter.grad.flatten().double() for parameter in network.parameters()])

    truth = gradients("torch", "fp64")
    ours, torchs = ((gradients(kernels, "fp32") - truth).norm() for kernels in ("bnkern", "torch"))
    assert 0 < ours <= 2 * torchs
    assert torchs < 0.01 * truth.norm()  # else both are wrong; a ReLU that rounding flips costs 0.1 % and more


@pytest.mark.slow
def test_losses_stay_as_close_to_torch_as_torchs_layouts_do() -> None:
    """Over 50 steps bnkern is at most twice as far from torch NCHW as torch channels_last is; median of 3 seeds.

    Training is chaotic: a last bit grows to 1e-3 within 10 steps. Distance is the largest so far, since the two
    losses of a step can agree by chance. 4 float32 roundings of a loss near 2.3 are allowed on top, for the first
    steps, where torch's layouts can agree exactly.
    """
    data = cifar10.synthetic(train=50 * 32, test=1)

    def losses(seed: int, kernels: str, channels_last: bool) -> torch.Tensor:
        config = tiny(seed=seed, batch=32, log_every=50, kernels=kernels, channels_last=channels_last)
        step = stepper(config, data)
        for _ in range(50):
            step()
        return step.ring[:, 0]

    ours, torchs = [], []
    for seed in range(3):
        truth = losses(seed, "torch", False)
        ours.append((losses(seed, "bnkern", False) - truth).abs().cummax(0).values)
        torchs.append((losses(seed, "torch", True) - truth).abs().cummax(0).values)
    ours, torchs = (torch.stack(rows).median(0).values for rows in (ours, torchs))
    assert (ours <= 2 * torchs + 4 * 2**-23 * 2.3).all(), (ours / torchs).tolist()
    assert ours[-1] > 1e-6, "two runs that never part are the same kernels"
