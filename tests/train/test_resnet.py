"""The CIFAR ResNet: its shape, its numbering, and equality on bnkern's kernels and on torch's."""

import pytest
import torch
import torch.nn.functional as F

from bnkern.train.resnet import INITS, NORMS, SHORTCUTS, ResNet, layers

NETS = [(norm, shortcut, "xavier_normal") for norm in NORMS for shortcut in SHORTCUTS]
NETS += [("none", shortcut, "fixup") for shortcut in SHORTCUTS]


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
    # stages: layers 2-37 have 16 channels, 38-73 have 32, 74-109 have 64; each begins with a stride
    widths = {first: numbered[first].out_channels for first in (2, 37, 38, 73, 74, 109)}
    assert widths == {2: 16, 37: 16, 38: 32, 73: 32, 74: 64, 109: 64}
    assert [n for n in range(1, 110) if numbered[n].stride == (2, 2)] == [38, 74]


def perturb(model: ResNet) -> None:
    """Changes the weights from special values. Fixup starts with zeros, which block gradients."""
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize(("norm", "shortcut", "init"), NETS)
def test_both_kernels_are_the_same_network(norm: str, shortcut: str, init: str, channels_last: bool) -> None:
    """In float64 only the order of sums differs: outputs, gradients and running statistics agree to 1e-9."""
    ours, torchs = (
        build(depth=14, norm=norm, shortcut=shortcut, kernels=kernels, init=init).double()
        for kernels in ("bnkern", "torch")
    )
    assert ours.state_dict().keys() == torchs.state_dict().keys()
    for name, value in ours.state_dict().items():
        assert torch.equal(value, torchs.state_dict()[name]), name
    torch.manual_seed(1)
    images, labels = torch.randn(6, 3, 32, 32, dtype=torch.float64), torch.arange(6)
    if channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    for model in (ours, torchs):
        perturb(model)
        if channels_last:
            model.to(memory_format=torch.channels_last)
        F.cross_entropy(model(images), labels).backward()
    for (name, parameter), other in zip(ours.named_parameters(), torchs.parameters(), strict=True):
        assert other.grad.any(), name
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
    for name, value in torchs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(ours.eval()(images), torchs.eval()(images), rtol=1e-9, atol=1e-12)
    torchs.load_state_dict(ours.state_dict())


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("init", ["xavier_normal", "xavier_uniform", "kaiming"])
def test_same_seed_same_weights_whatever_the_norm(norm: str, init: str) -> None:
    normed, plain = (build(seed=3, depth=14, norm=n, init=init).state_dict() for n in (norm, "none"))
    for name, value in plain.items():
        assert torch.equal(value, normed[name]), name
    assert not torch.equal(plain["conv.weight"], build(seed=4, depth=14, init=init).conv.weight)


@pytest.mark.parametrize("norm", NORMS)
def test_each_norm_normalises_over_its_axes(norm: str) -> None:
    """The output of a block's first norm, without the ReLU, has mean zero and standard deviation one over these axes.

    float64; eps = 1e-5 beside variances near 1 and above causes the whole error.
    """
    model = build(depth=14, norm=norm).double()
    block = model.blocks[1]
    block.norm1.act = None
    recorded = {}
    block.norm1.register_forward_hook(lambda module, args, y: recorded.update(x=args[0], y=y))
    model(torch.randn(6, 3, 32, 32, dtype=torch.float64))
    if norm in ("none", "final", "affine"):
        assert torch.equal(recorded["x"], recorded["y"])
        if norm == "affine":
            assert all(norm.num_batches_tracked == 0 for norm in model.modules() if hasattr(norm, "running_mean"))
            return
        assert (model.final is not None) == (norm == "final")
        assert sum(isinstance(m, torch.nn.BatchNorm2d) for m in model.modules()) == (norm == "final")
        return
    y = recorded["y"].unflatten(1, (8, 2)) if norm == "group" else recorded["y"]
    axes = {"batch": (0, 2, 3), "layer": (1, 2, 3), "group": (2, 3, 4), "instance": (2, 3)}[norm]
    mean, var = y.mean(axes), y.var(axes, correction=0)
    torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-12)
    torch.testing.assert_close(var, torch.ones_like(var), rtol=0, atol=1e-3)


def test_final_norm_is_of_the_last_blocks_output() -> None:
    model = build(depth=8, norm="final").double()
    recorded = {}
    model.final.register_forward_hook(lambda module, args, y: recorded.update(x=args[0], y=y))
    model.blocks[-1].register_forward_hook(lambda module, args, y: recorded.update(last=y))
    logits = model(torch.randn(4, 3, 32, 32, dtype=torch.float64))
    assert recorded["x"] is recorded["last"] and (recorded["x"] >= 0).all() and (recorded["y"] < 0).any()
    torch.testing.assert_close(logits, model.fc(recorded["y"].mean((2, 3))))


def test_fixup() -> None:
    """Zhang et al.'s rules and their effect: every block starts as relu(shortcut), and the logits as zero."""
    model = build(depth=20, norm="none", init="fixup")
    last = [number for number in range(2, 20) if number % 2]
    zero = {number for number, layer in layers(model).items() if not layer.weight.any()}
    assert zero == {*last, 20} and not model.fc.bias.any()
    spread = layers(model)[14].weight.std().item()  # the first convolution of the seventh of 9 blocks
    assert spread == pytest.approx((2 / (9 * 64)) ** 0.5 * 9**-0.5, rel=0.05)  # 18,432 draws
    names = dict(model.named_parameters())
    scalars = [name for name, parameter in names.items() if parameter.numel() == 1]
    # per branch: two biases before convolutions, two after, and one multiplier; also the biases of the stem and the
    # classifier
    assert len(scalars) == 5 * 9 + 2
    assert {names[name].item() for name in scalars if name.endswith("scale")} == {1.0}
    assert not any(names[name].any() for name in scalars if not name.endswith("scale"))
    images = torch.randn(4, 3, 32, 32)
    recorded = {}
    model.blocks[1].register_forward_hook(lambda module, args, y: recorded.update(x=args[0], y=y))
    assert not model(images).any() and torch.equal(recorded["x"], recorded["y"])


@pytest.mark.parametrize("init", INITS[:3])
def test_inits(init: str) -> None:
    weight = layers(build(init=init))[74].weight  # 32 to 64 channels: fans 288 and 576, 18,432 draws
    variance = 2 / 576 if init == "kaiming" else 2 / (288 + 576)
    assert weight.std().item() == pytest.approx(variance**0.5, rel=0.03)
    edge = (3 * variance) ** 0.5
    assert (weight.abs().max().item() <= edge) == (init == "xavier_uniform")


def test_the_deepest_network() -> None:
    """ResNet-1202 of He et al. has 19.4 million parameters, and layer numbers up to 1202."""
    model = ResNet(1202, shortcut="padding")
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(19.4e6, rel=0.003)
    assert layers(model)[1202] is model.fc


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
    ("options", "message"),
    [
        ({"depth": 100}, "depth must be 6n"),
        ({"depth": 2}, "depth must be 6n"),
        ({"norm": "bach"}, "norm must be one of batch, none, .*; got 'bach'"),
        ({"shortcut": "A"}, "shortcut must be"),
        ({"kernels": "cudnn"}, "kernels must be"),
        ({"init": "he"}, "init must be one of xavier_normal, .*; got 'he'"),
        ({"init": "fixup"}, "fixup.* is for the un-normalised network"),
    ],
)
def test_bad_options_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ResNet(**options)
