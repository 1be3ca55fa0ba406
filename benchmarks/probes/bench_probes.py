"""The cost of recording: a training step of ResNet-20 at batch 128 with probes, without, and with hooks in plain torch.

Every provider trains its own network. All start with the same parameters and images, channels_last, learning rate 0.
Recordings are written to files as usual. The hooks compute the numbers of ``activation_moments`` and
``gradient_channel_signs`` on torch's modules with one reduction after the other, as such hooks are usually written. The
identities compute the numbers of ``weight_gradient_signs`` on bnkern's modules with torch's weight-gradient
convolutions of transformed operands. ``test_recorded_graph`` is the step of the training loop as one CUDA graph with
its recording.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.cases.shapes import Case
from benchmarks.cases.steps import ACTIVATION_BYTES, loop_step
from bnkern import probes
from bnkern.probes import make
from bnkern.train import cifar10
from bnkern.train.config import Config
from bnkern.train.loop import numerics
from bnkern.train.resnet import ResNet

CHANNEL = ("activation_moments", "gradient_channel_signs", "affine_gradient_signs")
SIGNS = {
    "signs and counts": ("sign_sum", "nonzero"),
    "sum and abs_sum": ("sum", "abs_sum"),
    "all four sums": ("sum", "abs_sum", "sign_sum", "nonzero"),
}


class Hooks:
    """Per-channel statistics computed by forward and backward hooks. The last ones stay on the device."""

    def __init__(self, model: nn.Module) -> None:
        self.results: list[Tensor] = []
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.register_forward_hook(self.forward)

    def forward(self, module: nn.Module, args: tuple, y: Tensor) -> None:
        x, axes = args[0], (0, 2, 3)
        with torch.no_grad():
            mean = x.mean(axes, keepdim=True)
            delta = x - mean
            powers = [delta.pow(k).mean(axes) for k in (2, 3, 4)]
            extremes = [x.amin(axes), x.amax(axes), (y > 0).sum(axes)]
            self.results = [mean, *powers, *extremes]
        x.register_hook(self.backward)

    def backward(self, dx: Tensor) -> None:
        axes = (0, 2, 3)
        sums = [dx.sum(axes), dx.abs().sum(axes), dx.square().sum(axes)]
        self.results = [*sums, (dx > 0).sum(axes), (dx < 0).sum(axes), (dx == 0).sum(axes)]


class Identities:
    """The four sums of every convolution by torch's weight gradient, which runs three more times for each of them."""

    def __init__(self, model: nn.Module, sums: tuple[str, ...]) -> None:
        self.sums, self.results = sums, []
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(self.forward)

    def forward(self, module: nn.Conv2d, args: tuple, y: Tensor) -> None:
        x = args[0].detach()
        y.register_hook(lambda dy: self.backward(module, x, dy))

    def backward(self, module: nn.Conv2d, x: Tensor, dy: Tensor) -> None:
        def total(x: Tensor, dy: Tensor) -> Tensor:
            return nn.grad.conv2d_weight(x, module.weight.shape, dy, module.stride, module.padding)

        operands = {
            "abs_sum": lambda: (x.abs(), dy.abs()),
            "sign_sum": lambda: (x.sign(), dy.sign()),
            "nonzero": lambda: ((x != 0).float(), (dy != 0).float()),
        }
        self.results = [total(*operands[name]()) for name in self.sums if name != "sum"]


def step_of(model: nn.Module) -> Callable:
    model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9, weight_decay=5e-4)

    def step(batch: tuple[Tensor, Tensor], end_step: Callable = lambda loss: None) -> None:
        images, labels = batch
        loss = F.cross_entropy(model(images.contiguous(memory_format=torch.channels_last)), labels)
        loss.backward()
        optimizer.step()
        end_step(loss)
        optimizer.zero_grad()

    return step


@pytest.fixture
def recordings(tmp_path: Path) -> Iterator[Callable]:
    """recordings(model, quantities) returns a step that records the quantities until the end of the test."""
    with ExitStack() as stack:

        def recorded(model: nn.Module, *quantities: str | probes.Quantity) -> Callable:
            out = tmp_path / str(len(list(tmp_path.iterdir())))
            rec = stack.enter_context(probes.record(model, quantities, out=out))
            return partial(step_of(model), end_step=rec.step)

        yield recorded


@pytest.fixture
def network(device: torch.device, quick: bool) -> Callable[..., nn.Module]:
    def build(**options: str) -> nn.Module:
        torch.manual_seed(0)
        return ResNet(8 if quick else 20, **options).to(device)

    return build


@pytest.fixture
def images(device: torch.device, quick: bool) -> tuple[Case, tuple[Tensor, Tensor]]:
    case = Case("few_images" if quick else "images", "channels_last", "fp32")
    return case, (torch.randn(case.size, device=device), torch.randint(10, case.size[:1], device=device))


def test_channel_quantities(compare, network: Callable, images: tuple, recordings: Callable) -> None:
    case, batch = images
    hooked = network(kernels="torch")
    Hooks(hooked)
    compare(
        "channel quantities",
        case,
        {
            "unprobed": step_of(network()),
            "recorded": recordings(network(), *CHANNEL),
            "unprobed torch": step_of(network(kernels="torch")),
            "hooks on torch": step_of(hooked),
        },
        make_data=lambda: batch,
        nbytes=ACTIVATION_BYTES,
        budget_s=40,
    )


def test_norm_gradient_noise(compare, network: Callable, images: tuple, recordings: Callable) -> None:
    """The noise of the samples' gradients, against a step without it."""
    case, batch = images
    compare(
        "norm gradient noise",
        case,
        {"unprobed": step_of(network()), "recorded: norm_gradient_noise": recordings(network(), "norm_gradient_noise")},
        make_data=lambda: batch,
        nbytes=ACTIVATION_BYTES,
        budget_s=40,
    )


def test_flight_recorder(compare, network: Callable, images: tuple, tmp_path: Path) -> None:
    case, batch = images
    flown = network()
    with probes.flight_recorder(flown, out=tmp_path / "flight") as flight:
        compare(
            "flight recorder",
            case,
            {
                "unprobed": step_of(network()),
                "recorded: flight recorder": partial(step_of(flown), end_step=flight.step),
            },
            make_data=lambda: batch,
            nbytes=ACTIVATION_BYTES,
            budget_s=40,
        )


def test_weight_gradient_signs(compare, network: Callable, images: tuple, recordings: Callable) -> None:
    case, batch = images
    recorded = {
        f"recorded: {name}": recordings(network(), make("weight_gradient_signs", sums=sums))
        for name, sums in SIGNS.items()
    }
    identities = {}
    for name, sums in SIGNS.items():
        model = network()
        Identities(model, sums)
        identities[f"identities: {name}"] = step_of(model)
    compare(
        "weight gradient signs",
        case,
        {"unprobed": step_of(network()), **recorded, **identities},
        make_data=lambda: batch,
        nbytes=ACTIVATION_BYTES,
        budget_s=60,
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("depth", [20, 110])
def test_recorded_graph(depth: int, precision: str, compare, device: torch.device, quick: bool, tmp_path: Path) -> None:
    """Every measurement is of a replay. The schedule runs on the device, and files are written as usual."""
    config = Config(
        name="graph", depth=8 if quick else depth, precision=precision, data="synthetic", channels_last=True
    )
    data = cifar10.synthetic()
    recorded = {
        "recorded": CHANNEL,
        **{f"recorded: {name}": [make("weight_gradient_signs", sums=sums)] for name, sums in SIGNS.items()},
    }
    with ExitStack() as stack, numerics(config, device):

        def stepper(name: str) -> Callable[[object], None]:
            def recording(network: nn.Module) -> probes.recorder.Recorder:
                out = tmp_path / name.replace(":", "").replace(" ", "-")
                return stack.enter_context(probes.record(network, recorded[name], out=out, on_device=True))

            return loop_step(config, data, device, graph=True, recording=recording if name in recorded else None)

        compare(
            f"resnet{config.depth} in a graph",
            Case("images", "channels_last", precision),
            {name: stepper(name) for name in ("unprobed", *recorded)},
            make_data=lambda: None,
            nbytes=ACTIVATION_BYTES,
            budget_s=20,
        )
