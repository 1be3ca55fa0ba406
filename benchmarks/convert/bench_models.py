"""``bnkern.convert`` on networks of pytorchcv. docs/use_in_your_model.md has the results.

"Swapped" is ``convert(model, fuse=False)``. "training" is forward, sum of squares and backward; the gradients are
dropped between steps. "eval" is a forward without gradients. Nothing is compiled.
"""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

import bnkern
from benchmarks.cases.shapes import LAYOUTS, Case
from benchmarks.cases.steps import ACTIVATION_BYTES

# The module of the model, the model, the batch and the size of images. pytorchcv's index of models would import
# torchvision, so the module is imported directly.
MODELS = (("densenet_cifar", "densenet40_k12_cifar10", 16, 32), ("resnet", "resnet18", 8, 112))


def network(family: str, name: str) -> nn.Module:
    models = pytest.importorskip(f"pytorchcv.models.{family}", reason="pytorchcv is not installed")
    torch.manual_seed(0)
    model = getattr(models, name)()
    model.features.final_pool = nn.AdaptiveAvgPool2d(1)  # replaces a pooling of 7x7, which is for images of 224
    return model


def trained(model: nn.Module) -> Callable[[torch.Tensor], None]:
    def step(images: torch.Tensor) -> None:
        model.zero_grad()
        model(images).square().sum().backward()

    return step


def evaluated(model: nn.Module) -> Callable[[torch.Tensor], None]:
    def step(images: torch.Tensor) -> None:
        with torch.no_grad():
            model(images)

    return step


@pytest.mark.parametrize("model_mode", ["training", "eval"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model", MODELS, ids=lambda model: model[1])
def test_models(model: tuple, layout: str, model_mode: str, compare, device: torch.device, quick: bool) -> None:
    family, name, batch, size = model
    original = network(family, name).to(device, memory_format=LAYOUTS[layout])
    providers = {
        "bnkern": bnkern.convert(copy.deepcopy(original)),
        "eager": original,
        "swapped": bnkern.convert(copy.deepcopy(original), fuse=False),
    }
    step = trained if model_mode == "training" else evaluated
    images = torch.randn(2 if quick else batch, 3, 32 if quick else size, 32 if quick else size, device=device)
    images = images.contiguous(memory_format=LAYOUTS[layout])
    compare(
        f"{name} {layout} {model_mode}",
        Case("images", layout, "fp32"),
        {name: step(m.train(model_mode == "training")) for name, m in providers.items()},
        make_data=lambda: images,
        nbytes=ACTIVATION_BYTES,
        budget_s=12,
    )
