"""Training steps of ResNets on CIFAR-sized images, with bnkern's modules and with torch's."""

from collections.abc import Callable
from functools import partial
from itertools import count, cycle

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.cases import peers
from benchmarks.cases.shapes import LAYOUTS
from bnkern.probes.recorder import Recorder
from bnkern.train import cifar10
from bnkern.train.config import Config
from bnkern.train.loop import batches_of, build
from bnkern.train.resnet import ResNet
from bnkern.train.step import Step

ACTIVATION_BYTES = 100e6  # a step works on more memory than any cache holds


def in_place(model: nn.Module) -> nn.Module:
    """Changes the torch model to ``out += residual`` and ``relu_(out)``, as torchvision's ResNet has them."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.__class__ = peers.EagerInPlace  # the same parameters and ``act``, another forward
    return model


def folded(model: ResNet) -> ResNet:
    """Multiplies each batch norm of the torch model in eval mode into its convolution. What is left acts in place."""
    model.conv, model.norm = _folded(model.conv, model.norm)
    for block in model.blocks:
        block.conv1, block.norm1 = _folded(block.conv1, block.norm1)
        block.conv2, block.norm2 = _folded(block.conv2, block.norm2)
        if isinstance(block.shortcut, nn.Sequential):
            block.shortcut = nn.Sequential(*_folded(*block.shortcut))
    return model


def _folded(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[nn.Conv2d, nn.Module]:
    return torch.nn.utils.fusion.fuse_conv_bn_eval(conv, norm), _ActInPlace(norm.act)


class _ActInPlace(nn.Module):
    """``act(x + residual)``, written to the memory of x."""

    def __init__(self, act: str | None) -> None:
        super().__init__()
        self.act = act

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        x = x if residual is None else x.add_(residual)
        return F.relu_(x) if self.act else x


def inference(model: nn.Module) -> Callable[[Tensor], Tensor]:
    model.eval().to(memory_format=torch.channels_last)

    @torch.inference_mode()
    def infer(images: Tensor) -> Tensor:
        return model(images)

    return infer


def networks(depth: int, without_compile: str | None) -> dict[str, Callable[[], nn.Module]]:
    torch_model = partial(ResNet, depth, kernels="torch")
    builders = {
        "bnkern": partial(ResNet, depth),
        "eager": torch_model,
        "eager in place": lambda: in_place(torch_model()),
        "no norm": partial(ResNet, depth, norm="none"),
    }
    return builders if without_compile else builders | {"compile": lambda: peers.compiled(torch_model())}


def training_step(model: nn.Module, layout: str) -> Callable[[tuple[Tensor, Tensor]], None]:
    model.to(memory_format=LAYOUTS[layout])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9, weight_decay=5e-4)

    def step(batch: tuple[Tensor, Tensor]) -> None:
        images, labels = batch
        optimizer.zero_grad()
        F.cross_entropy(model(images.contiguous(memory_format=LAYOUTS[layout])), labels).backward()
        optimizer.step()

    return step


def loop_step(
    config: Config,
    data: cifar10.Cifar10,
    device: torch.device,
    graph: bool,
    recording: Callable[[nn.Module], Recorder] | None = None,
    compile_options: dict[str, object] | None = None,
) -> Callable[[object], None]:
    """The step of the training loop, which takes the batches of an epoch in turn, at learning rate 0.

    ``recording`` makes a recorder whose schedule runs on the device. It is flushed as in the training loop.
    ``compile_options`` are arguments of torch.compile for a config that compiles.
    """
    torch.manual_seed(config.seed)
    network = build(config, device)
    data = data.to(device)
    batches = batches_of(config, data.train, data)
    batches.start(0)
    recorder = recording and recording(network)
    model = peers.compiled(network, **compile_options or {}) if config.compile else network
    step = Step(model, network, batches, config, [recorder.step] if recorder else [])
    if graph:
        step.record()
        if recorder:
            recorder.rewind(0)

    indices, steps = cycle(range(len(batches))), count(1)

    def run_step(_: object) -> None:
        step.index.fill_(next(indices))
        step()
        if recorder and next(steps) % config.log_every == 0:
            recorder.flush()

    return run_step
