"""The CIFAR ResNet: its shape, its numbering, and the same network on bnkern's kernels and on torch's."""

import pytest
import torch
import torch.nn.functional as F

from bnkern.train.resnet import ResNet, layers

NETS = [(norm, shortcut) for norm in ("batch", "none") for shortcut in ("projection", "padding")]


def build(seed: int = 0, **options: object) -> ResNet:
    torch.manual_seed(seed)
    return ResNet(**options)


@pytest.mark.parametrize(
    ("norm", "shortcut", "count"),
    [
        ("batch", "padding", 1_727_962),
        ("batch", "projection", 1_730_714),
        ("none", "padding", 1_719_866),
        ("none", "projection", 1_722_426),
    ],
)
def test_resnet_110_has_the_parameters_of_the_paper(norm: str, shortcut: str, count: int) -> None:
    model = ResNet(110, norm, shortcut)
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_layers_are_numbered_as_in_the_paper() -> None:
    model = ResNet(110)
    numbered = layers(model)
    assert list(numbered) == list(range(1, 111))
    assert numbered[1] is model.conv and numbered[110] is model.fc
    assert numbered[54] is model.blocks[26].conv1 and numbered[55] is model.blocks[26].conv2
    # stages: 2-37 on 16 channels, 38-73 on 32, 74-109 on 64; each begins with a stride
    widths = {first: numbered[first].out_channels for first in (2, 37, 38, 73, 74, 109)}
    assert widths == {2: 16, 37: 16, 38: 32, 73: 32, 74: 64, 109: 64}
    assert [n for n in range(1, 110) if numbered[n].stride == (2, 2)] == [38, 74]


@pytest.mark.parametrize(("norm", "shortcut"), NETS)
def test_both_kernels_are_the_same_network(norm: str, shortcut: str) -> None:
    """float64, where only the order of sums differs: outputs, gradients and running statistics to 1e-9."""
    ours, torchs = (
        build(depth=14, norm=norm, shortcut=shortcut, kernels=kernels).double() for kernels in ("bnkern", "torch")
    )
    assert ours.state_dict().keys() == torchs.state_dict().keys()
    for name, value in ours.state_dict().items():
        assert torch.equal(value, torchs.state_dict()[name]), name
    torch.manual_seed(1)
    images, labels = torch.randn(6, 3, 32, 32, dtype=torch.float64), torch.arange(6)
    for model in (ours, torchs):
        F.cross_entropy(model(images), labels).backward()
    for (name, parameter), other in zip(ours.named_parameters(), torchs.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
    for name, value in torchs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(ours.eval()(images), torchs.eval()(images), rtol=1e-9, atol=1e-12)
    torchs.load_state_dict(ours.state_dict())


def test_same_seed_same_weights_with_and_without_norm() -> None:
    normed, plain = (build(seed=3, depth=14, norm=norm) for norm in ("batch", "none"))
    for name, value in plain.state_dict().items():
        assert torch.equal(value, normed.state_dict()[name]), name
    assert not torch.equal(plain.conv.weight, build(seed=4, depth=14, norm="none").conv.weight)


def test_convolutions_are_xavier_normal() -> None:
    weight = layers(ResNet(110))[90].weight
    assert weight.std().item() == pytest.approx((2 / (9 * 64 + 9 * 64)) ** 0.5, rel=0.03)  # 36,864 draws


def test_padding_shortcut_takes_every_second_pixel_between_zeros() -> None:
    shortcut = ResNet(8, shortcut="padding").blocks[1].shortcut
    x = torch.randn(2, 16, 4, 4)
    y = shortcut(x)
    assert y.shape == (2, 32, 2, 2)
    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2]) and not y[:, :8].any() and not y[:, 24:].any()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"depth": 100}, "depth must be 6n"),
        ({"depth": 2}, "depth must be 6n"),
        ({"norm": "bach"}, "norm must be one of batch, none; got 'bach'"),
        ({"shortcut": "A"}, "shortcut must be"),
        ({"kernels": "cudnn"}, "kernels must be"),
    ],
)
def test_bad_options_are_named(options: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        ResNet(**options)
