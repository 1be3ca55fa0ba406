"""bnkern.convert on networks of pytorchcv, transformers, timm and torchvision, without weights.

If a package is not installed, or cannot be imported with this torch, its tests are skipped with the reason.
"""

import copy
import pickle
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

import bnkern
from tests.convert.converting import ADD, PLAIN, RELU, assert_same_model, image, package, pytorchcv, replaced


def transformers(name: str, **options: object) -> nn.Module:
    module = package("transformers")
    return getattr(module, f"{name}Model")(getattr(module, f"{name}Config")(**options))


def timm(name: str) -> nn.Module:
    return package("timm").create_model(name)


def torchvision(name: str) -> nn.Module:
    return getattr(package("torchvision.models"), name)()


class Case(NamedTuple):
    """A model, the number of batch norms per outcome, and the size of its input."""

    make: Callable[[], nn.Module]
    fused: int
    fused_with_add: int
    swapped: int
    size: int = 64


SMALL = {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [2, 2]}
CASES = {
    "resnet": Case(lambda: pytorchcv("resnet", "resnet10"), 5, 4, 3),
    "resnet bottleneck": Case(lambda: pytorchcv("resnet", "resnetbc14b"), 9, 4, 4),
    "preresnet": Case(lambda: pytorchcv("preresnet", "preresnet10"), 10, 0, 0),
    "densenet": Case(lambda: pytorchcv("densenet_cifar", "densenet40_k12_cifar10"), 39, 0, 0, 16),
    "mobilenet": Case(lambda: pytorchcv("mobilenet", "mobilenet_wd4"), 27, 0, 0),
    "mobilenetv2": Case(lambda: pytorchcv("mobilenetv2", "mobilenetv2_wd4"), 0, 0, 53),
    "efficientnet": Case(lambda: pytorchcv("efficientnet", "efficientnet_b0"), 0, 0, 49),
    "seresnet": Case(lambda: pytorchcv("seresnet", "seresnet10"), 5, 3, 4),
    "resnext": Case(lambda: pytorchcv("resnext", "resnext14_32x4d"), 9, 4, 4),
    "seresnext": Case(lambda: pytorchcv("seresnext", "seresnext50_32x4d"), 33, 4, 16),
    "resnet, transformers": Case(lambda: transformers("ResNet", **SMALL), 9, 4, 1),
    "resnet basic, transformers": Case(lambda: transformers("ResNet", layer_type="basic", **SMALL), 5, 4, 1),
    "regnet, transformers": Case(lambda: transformers("RegNet", groups_width=8, **SMALL), 9, 4, 2),
    "regnet x, transformers": Case(lambda: transformers("RegNet", groups_width=8, layer_type="x", **SMALL), 9, 4, 2),
    "resnet, timm": Case(lambda: timm("resnet18"), 9, 8, 3),
    "resnet, torchvision": Case(lambda: torchvision("resnet18"), 9, 8, 3),
    "densenet, torchvision": Case(lambda: torchvision("densenet121"), 121, 0, 0),
    "mobilenet_v2, torchvision": Case(lambda: torchvision("mobilenet_v2"), 0, 0, 52),
}
# These take two seconds or more each.
HEAVY = {"efficientnet", "seresnext", "densenet, torchvision", "resnet, timm", "resnet, torchvision"}
EACH = pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in HEAVY)) for n in CASES])


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    y = model(x)
    return y if isinstance(y, Tensor) else y.last_hidden_state


@EACH
def test_the_same_network(name: str) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    before = case.make()
    for module in before.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # float32 and float64 draw different masks
    x = image(4, 3, case.size, case.size)
    before.train()
    with torch.no_grad():
        # sets plausible running statistics, because activations of an initialised network explode in eval mode
        outputs(before, x)
        outputs(before, x)
    after = bnkern.convert(copy.deepcopy(before))
    summary = bnkern.convert.summary(after)
    counts = [sum(layer.outcome == outcome for layer in summary) for outcome in (RELU, ADD, PLAIN)]
    assert counts == [case.fused, case.fused_with_add, case.swapped], str(summary)
    assert all(layer.why for layer in summary if layer.outcome == PLAIN)

    assert list(after.state_dict()) == list(before.state_dict())
    copies = [copy.deepcopy(after), pickle.loads(pickle.dumps(after))]
    assert_same_model(before, after, x)
    assert [bool(m._recipe) for m in after.modules() if "_recipe" in vars(m)] == [True] * len(replaced(after))
    before.load_state_dict(after.state_dict())
    for duplicate in copies:
        duplicate.load_state_dict(before.state_dict())
        assert torch.equal(outputs(duplicate.eval(), x), outputs(after.eval(), x))

    bnkern.revert(after)
    assert [type(m) for m in after.modules()] == [type(m) for m in before.modules()]
    assert torch.equal(outputs(after.eval(), x), outputs(before.eval(), x))


@pytest.mark.parametrize(
    "name",
    [
        "resnet",
        pytest.param("densenet", marks=pytest.mark.slow),
        pytest.param("seresnet", marks=pytest.mark.slow),
        "resnet basic, transformers",
        pytest.param("regnet, transformers", marks=pytest.mark.slow),
    ],
)
def test_still_exports(name: str) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    before = case.make().eval()
    after = bnkern.convert(copy.deepcopy(before))
    x = image(2, 3, case.size, case.size)
    torch.export.export(before, (x,))  # torch itself must be able to export the original
    program = torch.export.export(after, (x,))
    calls = [node for node in program.graph.nodes if node.target is torch.ops.bnkern.batch_norm_forward.default]
    assert len(calls) == case.fused + case.fused_with_add + case.swapped
    torch.testing.assert_close(outputs(program.module(), x), outputs(before, x), rtol=1e-4, atol=1e-4)
