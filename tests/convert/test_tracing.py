"""Converted models and bnkern.nn under other tracers: torch.fx, torch.jit.trace, torch.export and torch.onnx."""

import copy
import io
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._decomp import get_decompositions

import bnkern
from tests.convert.converting import C, FusedResidual, assert_same_model, basic_net, branch, image, net, seeded

OP = torch.ops.bnkern.batch_norm_forward.default

MODELS = {
    "basic blocks": (basic_net, (4, 3, 10, 10)),
    "fused residual": (lambda: seeded(FusedResidual), (4, C, 8, 8)),
    "function": (lambda: net(lambda self, y, x: F.relu(y)), (4, C, 8, 8)),
    "broadcast": (lambda: net(lambda self, y, x: F.relu(y + x[:, :, :1])), (4, C, 8, 8)),
    "rounded in place": (lambda: net(lambda self, y, x: F.relu(y.add_(x.double()))), (4, C, 8, 8)),
    "tail": (lambda: net(lambda self, y, x: F.relu(self.body(y) + x), body=branch()), (4, C, 8, 8)),
    "linear": (lambda: seeded(lambda: nn.Sequential(nn.Linear(5, C), nn.BatchNorm1d(C), nn.ReLU())), (8, 5)),
    "no affine": (lambda: nn.Sequential(nn.BatchNorm2d(C, affine=False), nn.ReLU()), (4, C, 8, 8)),
}
EACH = pytest.mark.parametrize("name", MODELS)


def pair(name: str) -> tuple[nn.Module, nn.Module, Tensor]:
    make, shape = MODELS[name]
    before = make()
    return before, bnkern.convert(copy.deepcopy(before)), image(*shape)


# ------------------------------------------------------------------------------------------------------ torch.fx


@EACH
def test_symbolic_trace(name: str) -> None:
    """The traced model computes the same in both modes and shares the batch norms. The model does not change."""
    before, after, x = pair(name)
    summary = str(bnkern.convert.summary(after))
    traced = fx.symbolic_trace(copy.deepcopy(after))
    assert list(traced.state_dict().keys() ^ before.state_dict().keys()) == []
    assert str(bnkern.convert.summary(after)) == summary
    assert_same_model(copy.deepcopy(before), after, x)
    assert_same_model(before, traced, x)


@EACH
def test_revert_after_symbolic_trace(name: str) -> None:
    """A trace shares the model's modules, and computes the same after the model was reverted or converted again."""
    before, after, x = pair(name)
    traced = fx.symbolic_trace(after)
    bnkern.revert(after)
    assert_same_model(copy.deepcopy(before), copy.deepcopy(traced), x)
    bnkern.convert(traced)
    assert_same_model(copy.deepcopy(before), copy.deepcopy(traced), x)
    assert_same_model(before, bnkern.revert(traced), x)


def test_traces_are_pickled() -> None:
    _, after, x = pair("basic blocks")
    traced = fx.symbolic_trace(after).eval()
    assert torch.equal(pickle.loads(pickle.dumps(traced))(x), traced(x))


def test_modules_are_leaves() -> None:
    """bnkern's modules have nodes with their names, as torch's do.

    Feature extractors and quantisers select by these.
    """
    model = nn.ModuleDict(
        {
            "conv": bnkern.nn.Conv2d(C, C, 1),
            "bn": bnkern.nn.BatchNorm2d(C, act="relu"),
            "sync": bnkern.nn.SyncBatchNorm(C),
            "act": bnkern.nn.Activation(),
        }
    )

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = model

        def forward(self, x: Tensor) -> Tensor:
            y = self.layers["conv"](x)
            return self.layers["act"](self.layers["sync"](self.layers["bn"](y, x)), y)

    before = seeded(Model)
    traced = fx.symbolic_trace(copy.deepcopy(before))
    targets = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert targets == ["layers.conv", "layers.bn", "layers.sync", "layers.act"]
    assert_same_model(before, traced, image())


def test_functions_are_nodes() -> None:
    """A module that is the root of the trace, and a forward that calls the functions."""
    bn = seeded(lambda: bnkern.nn.BatchNorm2d(C, act="relu"))
    x = image()
    for training in (True, False):
        traced = fx.symbolic_trace(copy.deepcopy(bn).train(training))
        torch.testing.assert_close(traced(x), bn.train(training)(x), rtol=0, atol=0)

    class Calls(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.rand(C))

        def forward(self, x: Tensor) -> Tensor:
            y = bnkern.batch_norm(x, None, None, self.weight, training=True, residual=x, act="relu")
            return bnkern.add_act(y, x)

    traced = fx.symbolic_trace(Calls())
    torch.testing.assert_close(traced(x), Calls.forward(traced, x), rtol=0, atol=0)


# ----------------------------------------------------------------------------------------------- torch.jit.trace


@EACH
@pytest.mark.parametrize("grad", [True, False])
def test_jit_trace(name: str, grad: bool) -> None:
    """The trace has only torch's operators, so it can be loaded without bnkern, and is valid for other batch sizes."""
    before, after, x = pair(name)
    with warnings.catch_warnings(), torch.set_grad_enabled(grad):
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("error", category=torch.jit.TracerWarning)
        traced = torch.jit.trace(after.eval(), (x,))
        file = io.BytesIO()
        torch.jit.save(traced, file)
        file.seek(0)
        loaded = torch.jit.load(file)
        kinds = {node.kind() for node in traced.inlined_graph.nodes()}
        assert all(kind.startswith(("aten::", "prim::")) for kind in kinds) and "prim::PythonOp" not in kinds
        for inputs in (x, torch.cat([x, x + 1])):
            torch.testing.assert_close(loaded(inputs), before.eval()(inputs), rtol=1e-5, atol=1e-5)


# --------------------------------------------------------------------------------------- torch.export, torch.onnx


@EACH
def test_decomposition(name: str) -> None:
    """On request the exported operator is decomposed into torch's operators, in eval mode."""
    before, after, x = pair(name)
    program = torch.export.export(after.eval(), (x,))
    assert any(node.target is OP for node in program.graph.nodes)
    decomposed = program.run_decompositions(get_decompositions([OP]))
    assert not any("bnkern" in str(node.target) for node in decomposed.graph.nodes)
    torch.testing.assert_close(decomposed.module()(x), before.eval()(x), rtol=1e-5, atol=1e-5)


def test_decomposition_in_training_is_left_out() -> None:
    _, after, x = pair("function")
    program = torch.export.export(after, (x,)).run_decompositions(get_decompositions([OP]))
    assert any(node.target is OP for node in program.graph.nodes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("act", [None, "relu"])
def test_decomposition_is_the_op(dtype: torch.dtype, with_residual: bool, act: str | None) -> None:
    """All results of the operator in eval mode, with mask and saved statistics.

    5 channels leave a partial byte of the mask.
    """
    x, residual = image(2, 5, 3, 3, dtype=dtype), image(2, 5, 3, 3, seed=2, dtype=dtype) if with_residual else None
    mean, var, weight, bias = (torch.rand(5).to(dtype if dtype is torch.float64 else torch.float32) for _ in range(4))
    arguments = (x, weight, bias, residual, mean, var, None, False, 0.1, 1e-5, act, True, None, None, "")
    for ours, expected in zip(get_decompositions([OP])[OP](*arguments), OP(*arguments), strict=True):
        assert ours.dtype == expected.dtype and ours.shape == expected.shape
        # One unit in the last place of bfloat16, because the two may round differently. In float32 the error is 1e-6.
        torch.testing.assert_close(ours, expected, rtol=2**-7 if dtype is torch.bfloat16 else 1e-5, atol=1e-6)


@EACH
def test_onnx_export(name: str) -> None:
    pytest.importorskip("onnxscript")
    reference = pytest.importorskip("onnx.reference")
    before, after, x = pair(name)
    program = torch.onnx.export(after.eval(), (x,), dynamo=True, dynamic_shapes=[{0: torch.export.Dim("batch")}])
    evaluator = reference.ReferenceEvaluator(program.model_proto)
    (key,) = evaluator.input_names
    with torch.no_grad():
        for inputs in (x, torch.cat([x, x + 1])):
            (y,) = evaluator.run(None, {key: inputs.numpy()})
            torch.testing.assert_close(torch.from_numpy(y), before.eval()(inputs), rtol=1e-4, atol=1e-5)
    assert {node.domain for node in program.model_proto.graph.node} == {""}
