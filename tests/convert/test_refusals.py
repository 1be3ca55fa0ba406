"""bnkern.convert: layers that it leaves unchanged, and why; fused blocks that later use their own forward."""

import copy
import random
import warnings
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
    C,
    Net,
    assert_same_model,
    branch,
    image,
    net,
    outcomes,
    replaced,
    run,
    seeded,
    unfused_reason,
)

# ------------------------------------------------------------------------------------------- what is left, and why


class OwnNorm(nn.BatchNorm2d):
    """Another library's batch norm with an activation."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).sigmoid()


def writes_into_x(self: Net, y: Tensor, x: Tensor) -> Tensor:
    z = x * 1
    same = z.view_as(z)
    z += y
    return F.relu(z) + same


def uses_the_output_again(self: Net, y: Tensor, x: Tensor) -> Tensor:
    return F.relu(y) * y


def uses_the_sum_again(self: Net, y: Tensor, x: Tensor) -> Tensor:
    y = y + x
    return F.relu(y) * y


def reads_the_mode(self: Net, y: Tensor, x: Tensor) -> Tensor:
    return F.dropout(F.relu(y), 0.5, self.training)


def reads_the_mode_of_another_module(self: Net, y: Tensor, x: Tensor) -> Tensor:
    return F.relu(y) * (2 if self.conv.training else 3)


def sets_an_attribute(self: Net, y: Tensor, x: Tensor) -> Tensor:
    self.count = 1
    return F.relu(y)


def without_gradient(self: Net, y: Tensor, x: Tensor) -> Tensor:
    with torch.no_grad():
        scale = F.relu(y) + 1
    return scale * y


def reads_whether_gradients_are_enabled(self: Net, y: Tensor, x: Tensor) -> Tensor:
    return F.relu(y) * (2 if torch.is_grad_enabled() else 3)


def draws(self: Net, y: Tensor, x: Tensor) -> Tensor:
    return F.relu(y) * (1.5 + 0 * random.random())


def draws_a_tensor(self: Net, y: Tensor, x: Tensor) -> Tensor:
    return F.relu(y) * torch.rand(()).add(1).to(x.dtype)


def depends_on_data(self: Net, y: Tensor, x: Tensor) -> Tensor:
    return F.relu(y) if x.shape[0] > 2 else y


def checkpoints(self: Net, y: Tensor, x: Tensor) -> Tensor:
    return checkpoint(F.relu, y, use_reentrant=False)


def reads_a_dict(self: Net, y: Tensor, x: Tensor) -> Tensor:
    return F.relu(y) * self.table.setdefault("scale", 2)


REFUSED = {
    "relu6": (net(lambda self, y, x: self.act(y), act=nn.ReLU6()), "ReLU6 follows"),
    "silu": (net(lambda self, y, x: F.silu(y)), "silu follows"),
    "scaled": (net(lambda self, y, x: F.relu(torch.add(y, x, alpha=2))), "add follows"),
    "number": (net(lambda self, y, x: F.relu(y + 1)), "add follows"),
    "in place": (net(writes_into_x), "added in place to a tensor that may be used elsewhere"),
    "used again": (net(uses_the_output_again), "its output is used by others than the ReLU"),
    "sum used again": (net(uses_the_sum_again), "add follows"),
    "itself": (net(lambda self, y, x: F.relu(y + y)), "used by others than the addition"),
    "its mode": (net(reads_the_mode), "Net.forward reads self.training"),
    "another's mode": (net(reads_the_mode_of_another_module), "does something else in eval mode"),
    "remembers": (net(sets_an_attribute), "Net.forward sets self.count"),
    "no_grad": (net(without_gradient), "enters a context"),
    "is_grad_enabled": (
        net(reads_whether_gradients_are_enabled),
        "does something else in eval mode, without gradients",
    ),
    "draws": (net(draws), "draws random numbers"),
    "draws a tensor": (net(draws_a_tensor), "makes a new tensor"),
    "data": (net(depends_on_data), "cannot be traced"),
    "checkpoint": (net(checkpoints), "Net.forward"),
    "nothing": (net(lambda self, y, x: y), "no ReLU follows"),
    "twice": (net(lambda self, y, x: F.relu(self.bn(y))), "it is called more than once"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_left_unfused_with_a_reason(case: str) -> None:
    before, reason = REFUSED[case]
    generators = random.getstate(), torch.get_rng_state()
    after = bnkern.convert(copy.deepcopy(before))
    assert random.getstate() == generators[0] and torch.equal(torch.get_rng_state(), generators[1])
    assert outcomes(after) == {"bn": PLAIN} and reason in unfused_reason(after)
    assert type(after.bn) is bnkern.nn.BatchNorm2d and after.bn.act is None and not replaced(after)
    assert "count" not in vars(after)  # tracing leaves no attribute behind
    assert_same_model(before, after, image())


def test_attributes_that_may_change_without_detection() -> None:
    before = net(reads_a_dict)
    before.table = {"scale": 3}
    after = bnkern.convert(copy.deepcopy(before))
    assert "reads self.table, a dict, which may change" in unfused_reason(after)
    assert_same_model(before, after, image())


def test_batch_norms_of_other_libraries() -> None:
    after = nn.Sequential(OwnNorm(C), nn.ReLU(), nn.LazyBatchNorm2d(), nn.InstanceNorm2d(C))
    before = [type(m) for m in after]
    bnkern.convert(after)
    assert [type(m) for m in after] == before
    assert outcomes(after) == {"0": LEFT, "2": LEFT}
    assert "OwnNorm" in str(bnkern.convert.summary(after)) and "LazyBatchNorm2d" in str(bnkern.convert.summary(after))


def test_shared_batch_norm() -> None:
    bn = nn.BatchNorm2d(C)
    before = seeded(lambda: nn.Sequential(nn.Sequential(bn, nn.ReLU()), nn.Sequential(bn, nn.Sigmoid())))
    after = bnkern.convert(copy.deepcopy(before))
    assert after[0][0] is after[1][0] and unfused_reason(after) == "the model holds it in 2 places"
    assert_same_model(before, after, image())


def test_shared_relu() -> None:
    """A ReLU that others also call keeps working: as a function in the block, and as a module elsewhere."""
    relu = nn.ReLU()
    before = seeded(lambda: nn.Sequential(nn.Sequential(nn.BatchNorm2d(C), relu), nn.Conv2d(C, C, 1), relu))
    after = bnkern.convert(copy.deepcopy(before))
    assert outcomes(after) == {"0.0": RELU} and type(after[2]) is nn.ReLU and after[2] is after[0][1]
    assert_same_model(before, after, image())
    assert (after.eval()(image()) >= 0).all()


class CallsInnerLayers(nn.Module):
    """Calls its submodule, and by paths through it the batch norm and the ReLU of the submodule."""

    def __init__(self, mode: str = "") -> None:
        super().__init__()
        self.body, self.mode = net(lambda self, y, x: self.relu(y), relu=nn.ReLU()), mode
        self.tail = nn.Sequential(nn.BatchNorm2d(C), nn.ReLU())
        self.bn, self.relu = nn.BatchNorm2d(C), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.tail(self.body(x)) - 1
        if self.mode == "branches" and y.sum() > 1e9:
            return y
        return self.steps(self.relu(self.bn(self.body.bn(self.body.relu(y) - 1))))

    def steps(self, x: Tensor) -> Tensor:
        for layer in self.tail:
            x = layer(x) - 0.5
        return x


@pytest.mark.parametrize("mode", ["", "branches"])
def test_calls_of_layers_inside_a_submodule(mode: str) -> None:
    """Such calls would change. They are found by tracing, or in the source of a forward that cannot be traced."""
    before = seeded(lambda: CallsInnerLayers(mode))
    after = bnkern.convert(copy.deepcopy(before))
    layers = {layer.name: layer for layer in bnkern.convert.summary(after)}
    assert type(after.body.relu) is type(after.tail[1]) is nn.ReLU
    for name in ("body.bn", "tail.0"):
        assert (layers[name].outcome, layers[name].why) == (PLAIN, "it is called from outside the module that holds it")
    assert layers["bn"].outcome == (PLAIN if mode else RELU)
    assert_same_model(before, after, image())


def test_a_plain_call_in_an_untraceable_forward_prevents_no_fusion() -> None:
    """With self.body(x), its attributes, and "is not None" the layers of the submodule are still fused."""

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.Sequential(nn.BatchNorm2d(C), nn.ReLU()) for _ in range(2)])
            self.body = nn.Sequential(nn.BatchNorm2d(C), nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            if self.body is not None and x.sum() > -1e9 and self.body.training in (True, False):
                x = self.body(self.blocks[0](x))
            for block in self.blocks:
                x = block(x)
            return x

    before = seeded(Branches)
    after = bnkern.convert(copy.deepcopy(before))
    assert set(outcomes(after).values()) == {RELU}
    assert_same_model(before, after, image())


@pytest.mark.parametrize(
    "make", [torch.jit.script, lambda m: torch.jit.trace(m.eval(), image())], ids=["script", "trace"]
)
def test_modules_of_torch_jit(make: Callable) -> None:
    """They run compiled code, so they are left unchanged, while layers beside them are converted."""
    inner = seeded(lambda: nn.Sequential(nn.Conv2d(C, C, 1), nn.BatchNorm2d(C), nn.ReLU()))
    before = nn.Sequential(make(inner), nn.BatchNorm2d(C), nn.ReLU())
    after = nn.Sequential(make(inner), copy.deepcopy(before[1]), nn.ReLU())
    bnkern.convert(after)
    assert outcomes(after) == {"0.1": LEFT, "1": RELU}
    assert "0.1  left alone: it is part of a torch.jit module" in str(bnkern.convert.summary(after))
    torch.testing.assert_close(after.eval()(image()), before.eval()(image()), rtol=1e-5, atol=1e-5)


def test_relu_called_twice() -> None:
    before = net(lambda self, y, x: self.relu(self.conv(self.relu(y))), relu=nn.ReLU())
    after = bnkern.convert(copy.deepcopy(before))
    assert outcomes(after) == {"bn": RELU} and type(after.relu) is nn.ReLU
    assert_same_model(before, after, image())


@pytest.mark.parametrize("place", ["bn", "relu", "body"])
def test_hooks_are_kept(place: str) -> None:
    """Hooks get the same arguments. Batch norms and ReLUs with hooks are left, and so is a module around them."""
    before = seeded(
        lambda: net(
            lambda self, y, x: F.relu(self.body(self.relu(y)) + x), relu=nn.ReLU(), body=nn.Sequential(branch())
        )
    )
    recorded: list[Tensor] = []
    before.get_submodule(place).register_forward_hook(
        lambda module, args, output: recorded.append(output.detach().clone())
    )
    after = bnkern.convert(copy.deepcopy(before))
    assert outcomes(after) == {"bn": RELU if place == "body" else PLAIN, "body.0.1": PLAIN if place == "body" else ADD}
    if place != "body":
        assert f"{place} has a hook" in unfused_reason(after)
    x = image()
    after.eval()(x)
    before.eval()(x)
    assert len(recorded) == 2
    torch.testing.assert_close(recorded[0], recorded[1], rtol=1e-5, atol=1e-5)
    assert_same_model(before, after, x)


def test_dropout_keeps_its_mode() -> None:
    """A dropout module in a replaced forward is active in training and not in eval mode."""
    before = net(lambda self, y, x: self.drop(F.relu(y)), drop=nn.Dropout(0.5))
    after = bnkern.convert(copy.deepcopy(before).eval())
    assert replaced(after) == [""]
    assert_same_model(before, after, image())
    dropped_in_training, dropped_in_eval = (
        (run(after.train(mode), image())["output"] == 0).float().mean() for mode in (True, False)
    )
    assert dropped_in_training > dropped_in_eval + 0.3


class Optional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn, self.relu, self.scale = nn.BatchNorm2d(C), nn.ReLU(), 1

    def forward(self, x: Tensor, other: Tensor | None = None, *, last: bool = True) -> Tensor:
        y = self.bn(x) if other is None else self.bn(x) + other
        return self.relu(y) * self.scale if last else y


def call_with_warnings(model: nn.Module, *args: object, **kwargs: object) -> tuple[Tensor, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        y = model(*args, **kwargs)
    return y, [str(w.message) for w in caught]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m, x: m(x, x), "it was called with optional arguments"),
        (lambda m, x: m(x, last=False), "it was called with optional arguments"),
        (lambda m, x: setattr(m, "scale", 2), "scale was 1 when it was converted"),
        (lambda m, x: m.relu.register_forward_hook(lambda *_: None), "a hook was placed on relu"),
        (lambda m, x: setattr(m, "relu", nn.ReLU6()), "relu is another module"),
        (lambda m, x: setattr(m, "bn", nn.GroupNorm(2, C)), "bn is another module"),
    ],
)
def test_a_block_that_changed_runs_its_own_forward_again(change: Callable, message: str) -> None:
    """A trace is valid for its conditions only.

    In other cases the block warns and uses its own forward from that call on.
    """
    before = seeded(Optional).eval()
    after = bnkern.convert(copy.deepcopy(before))
    assert outcomes(after) == {"bn": RELU} and replaced(after) == [""]
    x = image() * 5
    torch.testing.assert_close(after(x=x), before(x=x))
    torch.manual_seed(0)
    expected = change(before, x)
    result, warned = call_with_warnings(change, after, x)
    if not isinstance(expected, Tensor):
        expected = before(x)
        result, warned = call_with_warnings(after, x)
    assert len(warned) == 1 and message in warned[0]
    torch.testing.assert_close(result, expected)
    if "bn is" not in message:
        assert outcomes(after) == {"bn": PLAIN} and message in unfused_reason(after)
    assert call_with_warnings(after, x)[1] == []
    torch.testing.assert_close(after(x), before(x))
    bnkern.convert(after)
    torch.testing.assert_close(after(x), before(x))
    assert type(bnkern.revert(after)) is Optional


def test_an_input_changed_in_between() -> None:
    """The batch norm must not be delayed until the addition if its input is overwritten before."""

    def rest(self: Net, y: Tensor, x: Tensor) -> Tensor:
        z = self.conv(x)
        y = self.other(z)
        z.mul_(0)
        return F.relu(y + x)

    before = net(rest, other=nn.BatchNorm2d(C))
    after = bnkern.convert(copy.deepcopy(before))
    layers = {layer.name: layer for layer in bnkern.convert.summary(after)}
    assert layers["other"].why == "something in between may change its input in place"
    x = image()
    torch.testing.assert_close(after.eval()(x), before.eval()(x))


ADDITIONS = {
    "broadcast": lambda self, y, x: F.relu(y + x[:, :, :1, :1]),
    "broadcast in place": lambda self, y, x: F.relu(y.add_(x[:, :, :1])),
    "input broadcast": lambda self, y, x: F.relu(x.unsqueeze(0).expand(2, 4, C, 8, 8) + y),
    "promoted": lambda self, y, x: F.relu(y + x.double()),
    "rounded in place": lambda self, y, x: F.relu(y.add_(x.double())),
}


@pytest.mark.parametrize("form", ADDITIONS.values(), ids=ADDITIONS)
def test_additions_that_torch_must_compute(form: Callable[[Net, Tensor, Tensor], Tensor]) -> None:
    """bnkern.batch_norm refuses such a residual. A converted block adds it in torch, and the summary says so."""
    before = net(form)
    after = bnkern.convert(copy.deepcopy(before))
    assert outcomes(after) == {"bn": ADD}
    x = image()
    for training in (True, False):
        ours, theirs = run(after.train(training), x), run(before.train(training), x)
        assert ours.keys() == theirs.keys()
        for name, expected in theirs.items():
            assert ours[name].dtype == expected.dtype
            torch.testing.assert_close(ours[name], expected, rtol=1e-4, atol=1e-4)
    assert after.bn.num_batches_tracked == 1
    assert "torch added the residual in 2 calls" in str(bnkern.convert.summary(after))
    assert replaced(after) == [""]


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(x).relu()


class Middle(nn.Module):
    """Calls the batch norm of ``inner`` and not ``inner``."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.inner.bn(x) * 2)


class Outer(nn.Module):
    """Contains ``middle``, whose batch norm precedes an addition and a ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.middle = Middle()

    def forward(self, x: Tensor) -> Tensor:
        return (self.middle(x) + x).relu()


def test_a_batch_norm_called_by_a_forward_inside_another_one() -> None:
    """``middle`` is part of the fused forward of the outer module, and its own calls are only recorded there."""
    before = Outer()
    after = bnkern.convert(copy.deepcopy(before))
    x = torch.randn(4, 3, 5, 5)
    torch.testing.assert_close(after(x), before(x))
    outcomes = {layer.name: layer.outcome for layer in bnkern.convert.summary(after)}
    assert outcomes["middle.bn"] == "batch norm + add + ReLU"
    assert after.middle.inner.bn.act is None
