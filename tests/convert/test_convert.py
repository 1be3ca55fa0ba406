"""bnkern.convert: the forms that are fused, and that the rest of a model does not change."""

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import bnkern
from tests.convert.converting import (
    ADD,
    LEFT,
    PLAIN,
    RELU,
    BasicBlock,
    C,
    FusedResidual,
    Net,
    assert_same_model,
    basic_net,
    branch,
    image,
    net,
    outcomes,
    replaced,
    run,
    seeded,
    unfused_reason,
)

# ----------------------------------------------------------------------------------------------- what is fused


def in_place_statements(self: Net, y: Tensor, x: Tensor) -> Tensor:
    y.add_(x)
    y.relu_()
    return y


def plus_equals(self: Net, y: Tensor, x: Tensor) -> Tensor:
    y += x
    return F.relu(y)


FUNCTIONAL = {
    "F.relu": (RELU, lambda self, y, x: F.relu(y)),
    "F.relu in place": (RELU, lambda self, y, x: F.relu(y, inplace=True)),
    "F.relu_": (RELU, lambda self, y, x: F.relu_(y)),
    "torch.relu": (RELU, lambda self, y, x: torch.relu(y)),
    "torch.relu_": (RELU, lambda self, y, x: torch.relu_(y)),
    "x.relu": (RELU, lambda self, y, x: y.relu()),
    "x.relu_": (RELU, lambda self, y, x: y.relu_()),
    "y + x": (ADD, lambda self, y, x: F.relu(y + x)),
    "x + y": (ADD, lambda self, y, x: torch.relu(x + y)),
    "torch.add": (ADD, lambda self, y, x: torch.add(y, x).relu_()),
    "y.add": (ADD, lambda self, y, x: y.add(x).relu()),
    "y.add_": (ADD, lambda self, y, x: F.relu_(y.add_(x))),
    "y += x": (ADD, plus_equals),
    "attribute": (ADD, lambda self, y, x: self.function(y + x)),
    "statements": (ADD, in_place_statements),
}


@pytest.mark.parametrize("form", FUNCTIONAL)
def test_functional_forms(form: str) -> None:
    """The forward of this one block is replaced. A batch norm that computes the residual does not matter."""
    outcome, rest = FUNCTIONAL[form]
    before = net(rest)
    after = bnkern.convert(copy.deepcopy(before))
    assert outcomes(after) == {"bn": outcome} and replaced(after) == [""]
    assert_same_model(before, after, image())


def test_modules_are_edited_in_place() -> None:
    """In Sequential, nested Sequentials, and for attributes called one after the other no forward is replaced."""
    before = seeded(
        lambda: nn.Sequential(
            nn.Sequential(nn.Conv2d(C, C, 1), nn.BatchNorm2d(C), nn.ReLU()),
            nn.Sequential(nn.Sequential(nn.Conv2d(C, C, 1), nn.BatchNorm2d(C)), nn.Identity(), nn.ReLU(inplace=True)),
            net(lambda self, y, x: self.relu(y), relu=nn.ReLU()),
        )
    )
    after = bnkern.convert(copy.deepcopy(before))
    assert set(outcomes(after).values()) == {RELU} and len(outcomes(after)) == 3 and not replaced(after)
    assert_same_model(before, after, image())
    # Calling the children one by one gives the same result.
    x = image()
    y = x
    for layer in after.eval():
        y = layer(y)
    torch.testing.assert_close(y, before.eval()(x))


def test_basic_blocks() -> None:
    before = basic_net()
    after = bnkern.convert(copy.deepcopy(before))
    assert outcomes(after) == {
        "1": RELU,
        "3.bn1": RELU,
        "3.bn2": ADD,
        "4.bn1": RELU,
        "4.bn2": ADD,
        "4.downsample.1": PLAIN,
    }
    assert replaced(after) == ["3", "4"]
    assert_same_model(before, after, image(4, 3, 10, 10))


def test_bottom_of_a_submodule() -> None:
    """relu(body(x) + shortcut(x)): the batch norm at the end of body, two modules below, takes the sum."""

    class Unit(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(net(lambda self, y, x: y.relu()), nn.Sequential(branch(), nn.Identity()))
            self.shortcut = branch()

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.body(x) + self.shortcut(x))

    before = seeded(Unit)
    after = bnkern.convert(copy.deepcopy(before))
    assert outcomes(after) == {"body.0.bn": RELU, "body.1.0.1": ADD, "shortcut.1": PLAIN}
    assert replaced(after) == ["", "body.0"]
    assert_same_model(before, after, image())


def test_the_other_side_takes_the_sum() -> None:
    """Squeeze and excitation scales body's output, so that only the shortcut's batch norm is next to the sum."""
    before = net(lambda self, y, x: F.relu(y * y.mean((2, 3), keepdim=True) + self.shortcut(x)), shortcut=branch())
    after = bnkern.convert(copy.deepcopy(before))
    assert outcomes(after) == {"bn": PLAIN, "shortcut.1": ADD}
    assert_same_model(before, after, image())


def test_residual_from_a_fused_pair() -> None:
    before = seeded(FusedResidual)
    after = bnkern.convert(copy.deepcopy(before))
    assert outcomes(after) == {"b1": RELU, "b2": ADD}
    assert_same_model(before, after, image())


def test_both_sides_are_batch_norms() -> None:
    before = net(lambda self, y, x: torch.relu(y + self.other(x)), other=nn.BatchNorm2d(C))
    after = bnkern.convert(copy.deepcopy(before))
    assert sorted(outcomes(after).values()) == [PLAIN, ADD]
    assert_same_model(before, after, image())


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.Sequential(nn.Linear(5, C), nn.BatchNorm1d(C), nn.ReLU()), (16, 5)),
        (lambda: nn.Sequential(nn.Conv1d(5, C, 3), nn.BatchNorm1d(C), nn.ReLU()), (4, 5, 9)),
        (lambda: nn.Sequential(nn.Conv3d(5, C, 3), nn.BatchNorm3d(C), nn.ReLU()), (2, 5, 4, 5, 6)),
    ],
)
def test_other_dimensions(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    before = seeded(make)
    after = bnkern.convert(copy.deepcopy(before))
    assert outcomes(after) == {"1": RELU}
    assert_same_model(before, after, image(*shape))


def test_channels_last() -> None:
    before = basic_net().to(memory_format=torch.channels_last)
    after = bnkern.convert(copy.deepcopy(before))
    assert_same_model(before, after, image(4, 3, 10, 10).to(memory_format=torch.channels_last))


def test_bfloat16() -> None:
    """Float32 parameters under autocast, and everything in bfloat16.

    The floor is one unit in the last place of bfloat16.
    """
    before = basic_net()
    after = bnkern.convert(copy.deepcopy(before))
    x = image(4, 3, 10, 10)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = run(after, x), run(before, x)
    assert ours["output"].dtype == theirs["output"].dtype == torch.bfloat16
    assert replaced(after)  # no block uses its original forward
    assert_same_model(before.bfloat16(), after.bfloat16(), x.bfloat16(), floor=2**-8)


def test_frozen_parameters_and_eval() -> None:
    before = basic_net()
    before[3].requires_grad_(False)
    before[1].weight.requires_grad_(False)
    before[4].eval()
    after = bnkern.convert(copy.deepcopy(before))
    assert [m.training for m in after.modules()] == [m.training for m in before.modules()]
    assert [p.requires_grad for p in after.parameters()] == [p.requires_grad for p in before.parameters()]
    x = image(4, 3, 10, 10)
    ours, theirs = run(after, x), run(before, x)
    assert ours.keys() == theirs.keys() and "grad 3.bn1.weight" not in ours
    assert_same_model(before, after, x)


# ------------------------------------------------------------------------------------------ nothing else changes


def fingerprint(model: nn.Module) -> list[object]:
    return [
        (name, type(m), m.training, getattr(m, "act", None), vars(m).get("_recipe") and m._recipe.source)
        for name, m in model.named_modules()
    ]


def test_the_same_objects() -> None:
    model = basic_net()
    calls: list[str] = []
    model[3].conv1.register_forward_hook(lambda *_: calls.append("conv1"))
    model[3].register_forward_pre_hook(lambda *_: calls.append("block"))
    modules, parameters, buffers = (
        dict(find()) for find in (model.named_modules, model.named_parameters, model.named_buffers)
    )
    state = {name: t.clone() for name, t in model.state_dict().items()}
    assert bnkern.convert(model) is model
    for find, old in (
        (model.named_modules, modules),
        (model.named_parameters, parameters),
        (model.named_buffers, buffers),
    ):
        current = dict(find())
        assert list(current) == list(old) and all(current[name] is old[name] for name in old)
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert isinstance(model[3], BasicBlock) and isinstance(model[1], nn.BatchNorm2d) and isinstance(model[2], nn.ReLU)
    assert type(model[3]).__name__ == "BasicBlock" and "act='relu'" in repr(model)
    model(image(4, 3, 10, 10))
    assert calls == ["block", "conv1"]


def test_state_dict_goes_both_ways() -> None:
    before, other = basic_net(), seeded(basic_net, seed=9)
    after = bnkern.convert(copy.deepcopy(other))
    after.load_state_dict(before.state_dict())
    x = image(4, 3, 10, 10)
    torch.testing.assert_close(after.eval()(x), before.eval()(x), rtol=1e-5, atol=1e-5)
    run(after.train(), x)
    before.load_state_dict(after.state_dict())
    torch.testing.assert_close(before.eval()(x), after.eval()(x), rtol=1e-5, atol=1e-5)


def test_converting_twice_is_converting_once() -> None:
    model = bnkern.convert(basic_net())
    once = fingerprint(model)
    assert fingerprint(bnkern.convert(model)) == once
    assert any(recipe for *_, recipe in once)
    swapped = bnkern.convert(model, fuse=False)
    assert set(outcomes(swapped).values()) == {PLAIN} and not replaced(swapped)
    assert {layer.why for layer in bnkern.convert.summary(swapped)} == {"fuse=False"}
    assert fingerprint(bnkern.convert(model)) == once


def test_revert_gives_the_torch_model_back() -> None:
    """The bits are the same, and so are the attributes of every module."""
    before = basic_net()
    after = bnkern.revert(bnkern.convert(copy.deepcopy(before)))
    for (name, original), (restored_name, restored) in zip(before.named_modules(), after.named_modules(), strict=True):
        assert (
            name == restored_name
            and type(original) is type(restored)
            and vars(original).keys() == vars(restored).keys()
        )
    assert repr(after) == repr(before)
    x = image(4, 3, 10, 10)
    for training in (True, False):
        theirs, ours = run(before.train(training), x), run(after.train(training), x)
        assert all(torch.equal(ours[name], t) for name, t in theirs.items())
    assert fingerprint(bnkern.revert(after)) == fingerprint(before)


def saved_and_loaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved_and_loaded],
    ids=["copy", "pickle", "save"],
)
def test_copies(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    model = bnkern.convert(basic_net())
    twin = duplicate(model)
    assert fingerprint(twin) == fingerprint(model) and len(replaced(twin)) == 2
    x = image(4, 3, 10, 10)
    theirs, ours = run(model, x), run(twin, x)
    assert all(torch.equal(ours[name], t) for name, t in theirs.items())
    with torch.no_grad():
        twin[3].conv1.weight.zero_()
    assert torch.equal(run(model.eval(), x)["output"], run(model, x)["output"])
    assert not torch.equal(run(twin.eval(), x)["output"], run(model, x)["output"])
    assert type(bnkern.revert(twin)[3]) is BasicBlock and replaced(model)


def test_replicas_run_on_their_own_parameters() -> None:
    """nn.DataParallel copies a module's __dict__. A bound forward would keep using the module of the first device."""
    model = bnkern.convert(net(lambda self, y, x: F.relu(y + x))).eval()
    replica = model._replicate_for_data_parallel()
    replica._modules = {name: copy.deepcopy(child) for name, child in model._modules.items()}
    with torch.no_grad():
        replica._modules["conv"].weight.zero_()
    assert not torch.equal(replica(image()), model(image()))


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict: bool) -> None:
    before = basic_net().eval()
    after = bnkern.convert(copy.deepcopy(before))
    x = image(4, 3, 10, 10)
    program = torch.export.export(after, (x,), strict=strict)
    calls = [node for node in program.graph.nodes if node.target is torch.ops.bnkern.batch_norm_forward.default]
    assert len(calls) == 6 and not any("relu" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(x), before(x), rtol=1e-5, atol=1e-5)


def test_compile() -> None:
    """The whole graph in training, including residuals that broadcast."""
    before = nn.Sequential(basic_net(), net(lambda self, y, x: F.relu(y + x[:, :, :1])))
    after = bnkern.convert(copy.deepcopy(before))
    x = image(4, 3, 12, 12)
    compiled = torch.compile(after, backend="aot_eager", fullgraph=True)
    ours, theirs = run(compiled, x), run(before, x)
    ours = {name.replace("_orig_mod.", ""): t for name, t in ours.items()}
    for name, expected in theirs.items():
        # Eager torch in float32 differs from bnkern by as much: sums over 400 values, through seven layers.
        torch.testing.assert_close(ours[name], expected, rtol=1e-3, atol=1e-3)


def test_checkpointing_and_two_calls_before_backward() -> None:
    before = basic_net()
    after = bnkern.convert(copy.deepcopy(before))
    x = image(4, 3, 10, 10)
    for model in (before, after):
        y = checkpoint(model, x.clone().requires_grad_(), use_reentrant=False)
        (y.square().sum() + model(x * 2).sum()).backward()
    for ours, theirs in zip(after.parameters(), before.parameters(), strict=True):
        # Gradients of size up to 100, float32 through six layers.
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-3)


# ----------------------------------------------------------------------- arguments, results and errors of convert


def test_summary_names_every_layer() -> None:
    text = str(bnkern.convert.summary(bnkern.convert(basic_net())))
    assert text.splitlines()[0].split() == ["1", "batch", "norm", "+", "ReLU"]
    assert text.endswith("6 batch norms: 3 batch norm + ReLU, 2 batch norm + add + ReLU, 1 batch norm")
    assert str(bnkern.convert.summary(nn.ReLU())) == "no batch norms"
    assert "1  left alone: not converted" in str(bnkern.convert.summary(basic_net()))


def test_a_batch_norm_by_itself() -> None:
    bn = nn.BatchNorm2d(C)
    assert bnkern.convert(bn) is bn and type(bn) is bnkern.nn.BatchNorm2d
    assert bnkern.revert(bn) is bn and type(bn) is nn.BatchNorm2d


def test_our_own_modules_are_fused_too() -> None:
    """bnkern.nn's own batch norms are fused too, and restored."""
    model = nn.Sequential(bnkern.nn.BatchNorm2d(C), nn.ReLU(), bnkern.nn.BatchNorm2d(C, act="relu"))
    bnkern.convert(model)
    assert outcomes(model) == {"0": RELU, "2": LEFT} and "act='relu'" in unfused_reason(model)
    bnkern.revert(model)
    assert [type(m) for m in model] == [bnkern.nn.BatchNorm2d, nn.ReLU, bnkern.nn.BatchNorm2d]
    assert model[0].act is None and model[2].act == "relu"


def test_sync_batch_norm() -> None:
    model = nn.Sequential(nn.SyncBatchNorm(C), nn.ReLU())
    bnkern.convert(model)
    assert type(model[0]) is bnkern.nn.SyncBatchNorm and outcomes(model) == {"0": RELU}
    assert type(bnkern.revert(model)[0]) is nn.SyncBatchNorm


@pytest.mark.parametrize("call", [bnkern.convert, bnkern.revert])
def test_not_a_module(call: Callable) -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got dict"):
        call({})


def test_class_changed_by_other_code_after_conversion() -> None:
    """parametrize makes its own class from ours. Restoring the original class would silently undo it."""
    model = bnkern.convert(basic_net())
    torch.nn.utils.parametrize.register_parametrization(model[1], "weight", nn.Softplus())
    expected = fingerprint(model)
    with pytest.raises(RuntimeError, match="convert: 1 is a ParametrizedBatchNorm2d now"):
        bnkern.revert(model)
    assert fingerprint(model) == expected
