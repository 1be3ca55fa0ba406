"""The adapters to the kernels of other packages, compared with eager.

Fakes of the public interfaces replace the packages. A fake computes with torch what the package documents, through the
same calls. The subject of the tests is the adapter.
"""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.cases import peers
from benchmarks.cases.norms import differentiate, relative_errors
from benchmarks.cases.shapes import Case, Inputs
from benchmarks.tools import memory

CPU = torch.device("cpu")
FUSED = {"bn": None, "bn_add_relu": "relu"}


class InPlace(torch.autograd.Function):
    """Batch norm that overwrites its input, and whose backward inverts the output, as inplace_abn's does."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y, mean, invstd = torch.native_batch_norm(x, weight, bias, None, None, True, 0.1, 1e-5)
        ctx.mark_dirty(x)
        x.copy_(y)
        ctx.save_for_backward(x, weight, bias, mean, invstd)
        return x

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, ...]:
        y, weight, bias, mean, invstd = ctx.saved_tensors
        as_channels = (1, -1, 1, 1)
        x = (y - bias.view(as_channels)) / weight.view(as_channels) / invstd.view(as_channels) + mean.view(as_channels)
        return torch.ops.aten.native_batch_norm_backward(
            dy, x, weight, None, None, mean, invstd, True, 1e-5, [True, True, True]
        )


class FakeABN(nn.Module):
    def __init__(self, channels: int, activation: str) -> None:
        super().__init__()
        assert activation == "identity"
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return InPlace.apply(x, self.weight, self.bias)


class FakeAttorch(nn.BatchNorm2d):
    def __init__(self, channels: int, act_func: str | None = None) -> None:
        super().__init__(channels)
        self.act_func = act_func

    def forward(self, x: Tensor, pre_act_add: Tensor | None = None) -> Tensor:
        y = super().forward(x)
        y = y if pre_act_add is None else y + pre_act_add
        return F.relu(y) if self.act_func else y


class FakeGroupBN(nn.BatchNorm2d):
    """Takes [N, H, W, C]. A residual requires the ReLU."""

    def __init__(self, channels: int, fuse_relu: bool = False) -> None:
        super().__init__(channels)
        self.fuse_relu = fuse_relu

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        assert x.is_contiguous() and (z is None or self.fuse_relu)
        y = super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        y = y if z is None else y + z
        return F.relu(y) if self.fuse_relu else y


def gems_batch_norm(x, weight, bias, running_mean, running_var, training, momentum, eps):
    return torch.native_batch_norm(x, weight, bias, running_mean, running_var, training, momentum, eps)


FAKES = {
    "inplace_abn": {"inplace_abn": {"InPlaceABN": FakeABN}},
    "attorch": {"attorch": {"BatchNorm2d": FakeAttorch}},
    "FlagGems": {
        "flag_gems": {
            "batch_norm": gems_batch_norm,
            "batch_norm_backward": torch.ops.aten.native_batch_norm_backward,
        }
    },
    "Apex groupbn": {"apex.contrib.groupbn.batch_norm": {"BatchNorm2d_NHWC": FakeGroupBN}},
}


@pytest.fixture
def fake(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Replaces the package of a peer by its fake."""
    for name, members in FAKES[request.param].items():
        parts = name.split(".")
        for k in range(1, len(parts) + 1):
            module = ModuleType(".".join(parts[:k]))
            monkeypatch.setitem(sys.modules, module.__name__, module)
        vars(module).update(members)
    return request.param


@pytest.mark.parametrize("op", FUSED)
@pytest.mark.parametrize("fake", FAKES, indirect=True)
def test_adapters_agree_with_eager(fake: str, op: str) -> None:
    case = Case("tiny", "channels_last", "fp16" if fake == "Apex groupbn" else "fp32")
    torch.manual_seed(0)
    inputs = Inputs.random(case, CPU)
    inputs = inputs if op == "bn_add_relu" else inputs._replace(residual=None)
    eager = peers.Eager(16, FUSED[op])
    nn.init.uniform_(eager.weight, 0.5, 1.5)
    nn.init.normal_(eager.bias)
    module = peers._like(peers.OTHERS[fake](16, FUSED[op]), eager)
    errors = relative_errors(differentiate(module, inputs.clone().requiring_grad()), eager, inputs)
    # fp16 rounds three times, to 1e-3 of a value. Inverting y in fp32 loses a few digits of 1e-7.
    assert max(errors.values()) < (4e-3 if fake == "Apex groupbn" else 1e-5)


@pytest.mark.parametrize("fake", ["Apex groupbn"], indirect=True)
def test_groupbn_names_its_limits(fake: str) -> None:
    module = peers.OTHERS[fake](16, None)
    with pytest.raises(peers.Missing, match="fp16 in channels_last only"):
        module(torch.randn(2, 16, 4, 4))


@pytest.mark.parametrize("name", peers.OTHERS)
def test_a_package_that_is_not_installed_is_missing_with_instructions(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in FAKES[name]:
        monkeypatch.setitem(sys.modules, package.partition(".")[0], None)
    with pytest.raises(peers.Missing, match="ModuleNotFoundError"):
        peers.OTHERS[name](16, None)


def test_every_peer_is_measured_or_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("inplace_abn", "attorch", "flag_gems", "apex"):
        monkeypatch.setitem(sys.modules, package, None)
    ours = peers.Eager(16, "relu")
    all_peers = {*peers.COMPILED, *peers.OTHERS}
    modules, missing = peers.others(ours, CPU)
    assert modules == {} and missing.keys() == all_peers
    # On a GPU all peers are tried.
    gpu = SimpleNamespace(type="cuda")
    monkeypatch.setattr(nn.Module, "to", lambda module, device: module)
    modules, missing = peers.others(ours, gpu, "--no-compile")
    assert list(modules) == ["bnkern in Triton", "eager without cuDNN"]
    assert missing.keys() == all_peers
    assert missing["compile cooperative"] == "left out by --no-compile"
    assert missing["attorch"].startswith("not on PyPI")
    modules, missing = peers.others(ours, gpu)
    assert {"compile max-autotune", "compile cooperative"} <= modules.keys()


def test_saved_bytes_count_a_block_of_memory_once() -> None:
    x = torch.randn(1000, requires_grad=True)
    weight = torch.randn(1000, requires_grad=True)
    saved, _ = memory.saved_bytes(lambda: ((x * weight) * x).sum(), [weight])
    assert saved == 2 * 4000  # x once, although two products keep it, and x * weight, but not the weight


def test_memory_of_a_step_is_measured() -> None:
    """In a network eager's ReLU and the next convolution keep the same y, so bnkern keeps only a little less."""
    results = {provider: memory.of_step("resnet20", provider, CPU) for provider in ("bnkern", "eager")}
    x = 16 * 16 * 32 * 32 * 4  # bytes of an activation of the first stage; six layers keep one or two of them
    assert 6 * x < results["bnkern"]["saved_bytes"] <= results["eager"]["saved_bytes"]
    assert all(numbers["peak_bytes"] >= 0 for numbers in results.values())
