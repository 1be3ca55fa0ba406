"""A whole training step of a ResNet on CIFAR-sized images, batch 128, fp32: forward, loss, backward, SGD.

``test_step`` gets its batches ready-made. ``test_inference`` is the forward alone, in eval mode without gradients.
``test_loop`` is the step of ``python -m bnkern.train``, which also makes its batch, computes metrics, and checks for
divergence; its provider "ready batch" is the step of ``test_step``.
``test_graph`` is the step of the loop as one CUDA graph, for ResNet-20 and ResNet-110 in fp32 and bf16 autocast.
``test_compiled_graph`` has torch.compile among the peers, which takes up to minutes to compile, so it is a test of its
own.
``test_replicas`` runs several such graphs on one GPU.

The step without normalisation ("no norm", which keeps ReLU and the residual addition) bounds the gain from a faster
batch norm. The learning rate is 0, which takes the same time, so that every step is of the same network.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import pytest
import torch

import bnkern
from benchmarks.cases import peers
from benchmarks.cases.shapes import LAYOUTS, Case
from benchmarks.cases.steps import ACTIVATION_BYTES, folded, inference, loop_step, networks, training_step
from bnkern.train import cifar10
from bnkern.train.config import Config
from bnkern.train.loop import numerics
from bnkern.train.resnet import ResNet


class CompileMode(NamedTuple):
    name: str  # of the provider
    options: dict[str, object]  # of torch.compile


COMPILE_MODES = {
    "default": CompileMode("compile", {}),
    "max-autotune": CompileMode("compile max-autotune", peers.COMPILED["compile max-autotune"]),
}


@pytest.mark.parametrize("depth", [20, 110])
def test_step(depth: int, compare, device: torch.device, quick: bool, without_compile: str | None) -> None:
    """ResNet-110 runs only in channels_last, the better layout of every provider, and uncompiled, to save minutes."""
    deep = depth > 20
    depth, case = (8, Case("few_images", "both", "fp32")) if quick else (depth, Case("images", "both", "fp32"))
    layouts, without_compile = (["channels_last"], "its depth") if deep else (LAYOUTS, without_compile)
    batch = torch.randn(case.size, device=device), torch.randint(10, case.size[:1], device=device)
    compare(
        f"resnet{depth}",
        case,
        {
            f"{name} {layout}": training_step(build().to(device), layout)
            for name, build in networks(depth, without_compile).items()
            for layout in layouts
        },
        make_data=lambda: batch,
        missing={"compile": f"left out by {without_compile}"} if without_compile else {},
        nbytes=ACTIVATION_BYTES,
        budget_s=40,
    )


@pytest.mark.parametrize("depth", [20, 110])
def test_inference(depth: int, compare, device: torch.device, quick: bool, without_compile: str | None) -> None:
    """The network in eval mode without gradients, channels_last. "folded" has the batch norms in the convolutions."""
    deep = depth > 20
    depth, case = (8, Case("few_images", "both", "fp32")) if quick else (depth, Case("images", "both", "fp32"))
    without_compile = "its depth" if deep else without_compile
    images = torch.randn(case.size, device=device).contiguous(memory_format=torch.channels_last)
    builders = networks(depth, without_compile) | {
        "eager folded": lambda: folded(ResNet(depth, kernels="torch").eval()),
    }
    del builders["no norm"]
    compare(
        f"resnet{depth} inference",
        case,
        {name: inference(build().to(device)) for name, build in builders.items()},
        make_data=lambda: images,
        missing={"compile": f"left out by {without_compile}"} if without_compile else {},
        nbytes=ACTIVATION_BYTES,
        budget_s=30,
    )


def test_loop(compare, device: torch.device, quick: bool) -> None:
    depth, case = (8, Case("few_images", "both", "fp32")) if quick else (20, Case("images", "both", "fp32"))
    images, graphs = case.size[0], [False, True] if device.type == "cuda" else [False]
    data = cifar10.synthetic()
    batch = torch.randn(case.size, device=device), torch.randint(10, case.size[:1], device=device)

    def stepper(kernels: str, graph: bool) -> Callable[[object], None]:
        options = {"depth": depth, "batch": images, "data": "synthetic", "channels_last": True}
        return loop_step(Config(name=kernels, kernels=kernels, **options), data, device, graph)

    compare(
        f"resnet{depth}",
        case,
        {
            f"{name}{' in a graph' if graph else ''}": stepper(kernels, graph)
            for graph in graphs
            for name, kernels in {"bnkern": "bnkern", "eager": "torch"}.items()
        }
        | {"ready batch": training_step(ResNet(depth).to(device), "channels_last")},
        make_data=lambda: batch,
        nbytes=ACTIVATION_BYTES,
        budget_s=20,
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("depth", [20, 110])
def test_graph(depth: int, precision: str, compare, device: torch.device, quick: bool) -> None:
    """Every measurement is of a replay. The kernels were chosen at the capture."""
    compare_graphs(compare, device, 8 if quick else depth, precision, {
        "bnkern": {},
        "bnkern in Triton": {},
        "bnkern nchw": {"channels_last": False},
        "eager": {"kernels": "torch"},
        "eager nchw": {"kernels": "torch", "channels_last": False},
        "no norm": {"norm": "none"},
    })  # fmt: skip


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")
@pytest.mark.parametrize("tuning", COMPILE_MODES)
@pytest.mark.parametrize("depth", [20, 110])
def test_compiled_graph(
    tuning: str, depth: int, compare, device: torch.device, quick: bool, without_compile: str | None
) -> None:
    """The compiled network within the step's own graph. The mode therefore makes no graph of its own."""
    if without_compile:
        pytest.skip(f"left out by {without_compile}")
    compiled = {"kernels": "torch", "compile": True}
    settings = {"bnkern": {}, "eager": {"kernels": "torch"}, COMPILE_MODES[tuning].name: compiled}
    compare_graphs(compare, device, depth, "bf16", settings, COMPILE_MODES[tuning].options)


def compare_graphs(
    compare: Callable,
    device: torch.device,
    depth: int,
    precision: str,
    settings: dict[str, dict],
    compile_options: dict[str, object] | None = None,
) -> None:
    data = cifar10.synthetic()
    common = {"depth": depth, "precision": precision, "data": "synthetic", "channels_last": True}

    def stepper(name: str) -> Callable[[object], None]:
        config = Config(name="graph", **common | settings[name])
        with bnkern.use_backend("triton") if "Triton" in name else nullcontext():
            return loop_step(config, data, device, graph=True, compile_options=compile_options)

    with numerics(Config(name="graph", **common), device):
        compare(
            f"resnet{depth}",
            Case("images", "channels_last", precision),
            {name: stepper(name) for name in settings},
            make_data=lambda: None,
            check=lambda _: {"images": 128},
            nbytes=ACTIVATION_BYTES,
            budget_s=20,
        )


def side_by_side(steps: list[Callable]) -> Callable[[object], int]:
    """All steps at the same time, each on its own stream; returns their number."""
    streams = [torch.cuda.Stream() for _ in steps]

    def run_all(data: object) -> int:
        current = torch.cuda.current_stream()
        for stream, step in zip(streams, steps, strict=True):
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                step(data)
        for stream in streams:
            current.wait_stream(stream)
        return len(steps)

    return run_all


def in_turn(steps: list[Callable]) -> Callable[[object], int]:
    def run_all(data: object) -> int:
        for step in steps:
            step(data)
        return len(steps)

    return run_all


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")
@pytest.mark.parametrize("depth", [20, 110])
def test_replicas(depth: int, compare, device: torch.device, quick: bool) -> None:
    """Captured steps of several seeds on one GPU, side by side on several streams, or one after the other.

    The training loop should support this if four replicas give at least 1.5 times the images a second.
    """
    data = cifar10.synthetic()
    common = {"depth": 8 if quick else depth, "precision": "bf16", "data": "synthetic", "channels_last": True}
    steps = [loop_step(Config(name="replica", seed=seed, **common), data, device, graph=True) for seed in range(4)]
    compare(
        f"resnet{common['depth']}",
        Case("images", "channels_last", "bf16"),
        {
            "bnkern, four side by side": side_by_side(steps),
            "bnkern, two side by side": side_by_side(steps[:2]),
            "bnkern, four in turn": in_turn(steps),
            "bnkern, one": in_turn(steps[:1]),
        },
        make_data=lambda: None,
        check=lambda replicas: {"images": 128 * replicas},
        nbytes=ACTIVATION_BYTES,
        budget_s=20,
    )
