"""Batch norms in graphs that torch records and rewrites: jit.trace, export, fx's fusers and quantisation."""

import copy
import io
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from torch.ao import quantization
from torch.ao.quantization import quantize_fx
from torch.ao.quantization.fx.custom_config import PrepareCustomConfig
from torch.fx.experimental import optimization
from torch.fx.experimental.proxy_tensor import make_fx

import bnkern
from tests.nn.ecosystem import CLOSE, X, batches, conv_and_norm, pair


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trainable"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_jit_trace(training: bool, frozen: bool) -> None:
    """The trace contains the calls. For another input it gives that input's result, gradients and statistics."""
    ours, _ = pair()
    ours.train(training).requires_grad_(not frozen)
    state = copy.deepcopy(ours.state_dict())
    first, second = batches()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        traced = torch.jit.trace(copy.deepcopy(ours), first, check_trace=False)
    traced.load_state_dict(state)
    x, y = second.clone().requires_grad_(), second.clone().requires_grad_()
    traced_output, expected = traced(x), ours(y)
    torch.testing.assert_close(traced_output, expected, **CLOSE)
    torch.testing.assert_close(traced.state_dict(), dict(ours.state_dict()), **CLOSE)
    traced_output.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad, **CLOSE)


def test_jit_trace_of_the_other_modules() -> None:
    first, second = (torch.randn(2, 3, 6, 6) for _ in range(2))
    conv = bnkern.nn.Conv2d(3, 3, 3, padding=1).to(memory_format=torch.channels_last)
    model = nn.Sequential(bnkern.nn.Activation(), conv, bnkern.nn.SyncBatchNorm(3, act="relu").eval())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model, first.to(memory_format=torch.channels_last))
    second = second.to(memory_format=torch.channels_last)
    torch.testing.assert_close(traced(second), model(second))


def test_a_saved_trace_holds_the_call() -> None:
    """A loaded trace computes the same. torch.jit's passes that fold batch norms do not change bnkern's operator."""
    model, file = conv_and_norm(), io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(model, X), file)
        file.seek(0)
        loaded = torch.jit.load(file)
        optimized = torch.jit.optimize_for_inference(loaded)
    for traced in (loaded, optimized):
        torch.testing.assert_close(traced(X + 1), model(X + 1))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("function", "name"),
    [
        (lambda x: bnkern.channel_moments(x).mean, "channel_moments"),
        (lambda x: bnkern.conv2d_grad_signs(x, x, 1).sum, "conv2d_grad_signs"),
    ],
    ids=["channel_moments", "conv2d_grad_signs"],
)
def test_functions_that_a_trace_would_hold_as_constants_are_refused(function: Callable, name: str) -> None:
    with pytest.raises(RuntimeError, match=f"{name}: torch.jit.trace cannot record this call"):
        torch.jit.trace(function, (X,))


@pytest.mark.filterwarnings("ignore")
def test_jit_script_is_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"bnkern.nn.norms\.py"):
        torch.jit.script(conv_and_norm())


def gradient(model: Callable[..., Tensor], x: Tensor, residual: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    model(x, residual).square().sum().backward()
    return x.grad


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_gradients_of_a_graph_that_was_exported_without(strict: bool) -> None:
    """The mask of the ReLU is kept for a backward, although the exported graph was made without one."""
    norm = bnkern.nn.BatchNorm2d(4, act="relu").eval().requires_grad_(False)
    x, residual = torch.randn(2, 3, 4, 5, 5, generator=torch.Generator().manual_seed(4)).unbind(0)
    exported = torch.export.export(norm, (x, residual), strict=strict).module()
    torch.testing.assert_close(gradient(exported, x, residual), gradient(norm, x, residual))


def test_gradients_of_a_graph_without_a_mask_are_refused() -> None:
    norm = bnkern.nn.BatchNorm2d(4, act="relu").eval().requires_grad_(False)
    x, residual = torch.randn(2, 3, 4, 5, 5, generator=torch.Generator().manual_seed(4)).unbind(0)
    graph = make_fx(norm)(x, residual)
    assert torch.equal(graph(x, residual), norm(x, residual))
    with pytest.raises(RuntimeError, match="recorded where no gradient was needed and keeps no activation mask"):
        gradient(graph, x, residual)


class LeafTracer(fx.Tracer):
    """Records calls of bnkern's modules as module calls."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return type(module).__module__ == "bnkern.nn" or super().is_leaf_module(module, name)


@pytest.mark.parametrize("act", [None, "relu"])
def test_fx_fuser_leaves_it_alone(act: str | None) -> None:
    """torch.fx.experimental.optimization compares exact classes, so it folds only torch's own batch norms."""
    model = nn.Sequential(conv_and_norm(act), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)).eval()
    fused = optimization.fuse(fx.GraphModule(model, LeafTracer().trace(model)), no_trace=True)
    kinds = {type(module) for module in fused.modules()}
    assert bnkern.nn.BatchNorm2d in kinds and nn.BatchNorm2d not in kinds
    torch.testing.assert_close(fused(X), model(X), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("names", [["0", "1"], ["0", "1", "2"], ["1", "2"]], ids=str)
@pytest.mark.parametrize("training", [False, True], ids=["fuse_modules", "fuse_modules_qat"])
def test_fuse_modules_refuses(names: list[str], training: bool) -> None:
    """torch.ao.quantization names the classes for which it has no fuser."""
    model = nn.Sequential(*conv_and_norm(), nn.ReLU()).train(training)
    fuse = quantization.fuse_modules_qat if training else quantization.fuse_modules
    with pytest.raises((AssertionError, NotImplementedError), match=r"bnkern\.nn\.BatchNorm2d"):
        fuse(model, names)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("act", [None, "relu"])
def test_eager_quantisation_refuses(act: str | None) -> None:
    """Conversion finds no quantised class and keeps the batch norm, which then refuses the quantised tensor."""
    model = nn.Sequential(quantization.QuantStub(), *conv_and_norm(act), quantization.DeQuantStub()).eval()
    model.qconfig = quantization.get_default_qconfig(torch.backends.quantized.engine)
    prepared = quantization.prepare(model)
    prepared(X)
    converted = quantization.convert(prepared)
    with pytest.raises(TypeError, match=r"batch_norm: input must be float32, .*, got torch\.qu"):
        converted(X)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("act", [None, "relu"])
def test_fx_quantisation_keeps_it_in_floating_point(act: str | None) -> None:
    """The class is not traced, so it remains a float module between quantised convolutions, with its activation."""
    model = nn.Sequential(*conv_and_norm(act), nn.Conv2d(8, 4, 1)).eval()
    custom = PrepareCustomConfig().set_non_traceable_module_classes([bnkern.nn.BatchNorm2d])
    mapping = quantization.get_default_qconfig_mapping(torch.backends.quantized.engine)
    prepared = quantize_fx.prepare_fx(copy.deepcopy(model), mapping, (X,), prepare_custom_config=custom)
    prepared(X)
    converted = quantize_fx.convert_fx(prepared)
    norm = converted.get_submodule("1")
    assert type(norm) is bnkern.nn.BatchNorm2d and norm.act == act
    expected = model(X)
    assert (converted(X) - expected).abs().max() < 0.05 * (expected.max() - expected.min())
