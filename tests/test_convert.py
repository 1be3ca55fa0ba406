"""bnkern.convert: which forms are fused, which are left and why, and that nothing else about a model changes."""

import copy
import io
import pickle
import random
import warnings
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import bnkern

C = 6
RELU, ADD, PLAIN, LEFT = "batch norm + ReLU", "batch norm + add + ReLU", "batch norm", "left alone"


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """A module with random parameters and running statistics, batch norms' included."""
    torch.manual_seed(seed)
    module = make()
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if "running" in name or tensor.dim() == 1:
                tensor.copy_(torch.rand_like(tensor) + 0.5)
    return module


def image(*shape: int, seed: int = 1, **options: object) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape or (4, C, 8, 8), generator=generator).to(**options)


def run(model: nn.Module, *inputs: Tensor) -> dict[str, Tensor]:
    """Output, gradients of inputs and parameters, and the buffers afterwards. Dropout and the like see one seed."""
    inputs = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in inputs]
    model.zero_grad()
    torch.manual_seed(3)
    y = model(*[x * 1 for x in inputs])  # forwards that write into their input may not write into a leaf
    y = y if isinstance(y, Tensor) else y[0]
    weights = torch.linspace(-1, 2, y.numel(), dtype=torch.float64).reshape(y.shape).to(y.dtype)
    (y * weights).sum().backward()
    results = {"output": y, **{f"input {k}": x.grad for k, x in enumerate(inputs)}}
    results |= {f"grad {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: t.detach().clone() for name, t in (results | dict(model.named_buffers())).items()}


def assert_same_model(before: nn.Module, after: nn.Module, *inputs: Tensor, floor: float = 2e-6) -> None:
    """Outputs, gradients and buffers, in training and in eval, are those of the model that was converted.

    In float64 they agree but for rounding: 1e-9 of a tensor's size, far above a hundred layers' worth of 1e-16 and
    far below any mistake. As the model is, the error against float64 is at most twice torch's. Errors are root mean
    squares over a tensor. The floor is for tensors where torch happens to be nearly exact: 2e-6 of the tensor's own
    size (16 units in the last place of float32, which sums over a few hundred values explain), or of 1 where the
    exact result is zero, as a convolution's bias gradient is before batch norm.

    Every so often some ReLU of a deep network gets a value within rounding of zero, and its gradient is there or not:
    now torch's gradients are off by 1e-3, now ours. So a gradient that fails is tried again with two other inputs.
    """
    failed = _differences(before, after, inputs, floor)
    for seed in (11, 12):
        if failed:
            assert all("grad" in name or "input" in name for name in failed), failed
            others = [torch.empty_like(x).copy_(image(*x.shape, seed=seed)) for x in inputs]
            again = _differences(before, after, others, floor)
            failed = {name: failed[name] for name in failed.keys() & again.keys()}
    assert not failed, failed


def _differences(before: nn.Module, after: nn.Module, inputs: Sequence[Tensor], floor: float) -> dict[str, str]:
    exact, ours_exact = copy.deepcopy(before).double(), copy.deepcopy(after).double()
    ours_exact.load_state_dict(exact.state_dict())  # running statistics may have come apart in float32 by now
    failed = {}
    for training in (True, False):
        doubles = [x.double() for x in inputs]
        truth, in_double = (run(m.train(training), *doubles) for m in (exact, ours_exact))
        theirs, ours = (run(m.train(training), *inputs) for m in (before, after))
        assert ours.keys() == theirs.keys() == truth.keys() == in_double.keys()
        for name, true in truth.items():
            assert ours[name].dtype == theirs[name].dtype and ours[name].stride() == theirs[name].stride(), name
            values = (in_double[name], ours[name], theirs[name])
            double, error, accepted = ((v.double() - true).square().mean().sqrt().item() for v in values)
            scale = true.double().square().mean().sqrt().clamp(min=1).item()
            assert double <= 1e-9 * scale, f"{name}, training={training}: {double} in float64"
            if not error <= 2 * accepted + floor * scale:
                failed[f"{name}, training={training}"] = f"error {error} against {accepted}"
    return failed


def outcomes(model: nn.Module) -> dict[str, str]:
    return {layer.name: layer.outcome for layer in bnkern.convert.summary(model)}


def why(model: nn.Module) -> str:
    """The reason given for the only batch norm that was not fused."""
    (layer,) = (layer for layer in bnkern.convert.summary(model) if layer.outcome not in (RELU, ADD))
    return layer.why


def replaced(model: nn.Module) -> list[str]:
    """Names of the blocks whose forward is another one now."""
    return [name for name, m in model.named_modules() if "_recipe" in vars(m)]


class Net(nn.Module):
    """conv -> bn, and whatever the test makes of it: ``then(self, y, x)`` with y from the batch norm, x the input."""

    def __init__(self, then: Callable[["Net", Tensor, Tensor], Tensor] | None = None, **modules: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(C, C, 3, padding=1)
        self.bn = nn.BatchNorm2d(C)
        self.function = F.relu
        for name, module in modules.items():
            self.add_module(name, module)
        if then is not None:
            type(self).then = then  # each Net of a test is of its own class, see net()

    def forward(self, x: Tensor) -> Tensor:
        return self.then(self.bn(self.conv(x)), x)


def net(then: Callable[[Net, Tensor, Tensor], Tensor], **modules: nn.Module) -> Net:
    return seeded(lambda: type("Net", (Net,), {})(then, **modules))


def branch() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(C, C, 1), nn.BatchNorm2d(C))


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
    """The forward of this one block is replaced; a batch norm that gives the residual is none of its business."""
    outcome, then = FUNCTIONAL[form]
    before = net(then)
    after = bnkern.convert(copy.deepcopy(before))
    assert outcomes(after) == {"bn": outcome} and replaced(after) == [""]
    assert_same_model(before, after, image())


def test_modules_are_edited_in_place() -> None:
    """Sequential, nested Sequentials, and attributes called one after the other: no forward is replaced."""
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
    # Stepping through the children by hand gives the same.
    x = image()
    y = x
    for layer in after.eval():
        y = layer(y)
    torch.testing.assert_close(y, before.eval()(x))


class BasicBlock(nn.Module):
    """As torchvision and most others write it: one ReLU used twice, ``out += identity``."""

    def __init__(self, downsample: bool = False, inplace: bool = True) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(C, C, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(C)
        self.relu = nn.ReLU(inplace=inplace)
        self.conv2 = nn.Conv2d(C, C, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(C)
        self.downsample = branch() if downsample else None

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


def basic_net() -> nn.Module:
    return seeded(
        lambda: nn.Sequential(
            nn.Conv2d(3, C, 3), nn.BatchNorm2d(C), nn.ReLU(True), BasicBlock(), BasicBlock(True, False), nn.AvgPool2d(2)
        )
    )


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
    """relu(body(x) + shortcut(x)): the batch norm at the end of body, two modules down, takes the sum."""

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
    """Squeeze and excitation scales body's output, so that the shortcut's batch norm is the one next to the sum."""
    before = net(lambda self, y, x: F.relu(y * y.mean((2, 3), keepdim=True) + self.shortcut(x)), shortcut=branch())
    after = bnkern.convert(copy.deepcopy(before))
    assert outcomes(after) == {"bn": PLAIN, "shortcut.1": ADD}
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
    """Parameters in float32 under autocast, and all in bfloat16: floor is one unit in the last place of bfloat16."""
    before = basic_net()
    after = bnkern.convert(copy.deepcopy(before))
    x = image(4, 3, 10, 10)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = run(after, x), run(before, x)
    assert ours["output"].dtype == theirs["output"].dtype == torch.bfloat16
    assert replaced(after)  # no block fell back
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


# ------------------------------------------------------------------------------------------- what is left, and why


class OwnNorm(nn.BatchNorm2d):
    """Somebody's batch norm with an activation in it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).sigmoid()


def writes_into_x(self: Net, y: Tensor, x: Tensor) -> Tensor:
    z = x * 1
    same = z.view_as(z)
    z += y
    return F.relu(z) + same


def uses_it_again(self: Net, y: Tensor, x: Tensor) -> Tensor:
    return F.relu(y) * y


def uses_the_sum_again(self: Net, y: Tensor, x: Tensor) -> Tensor:
    y = y + x
    return F.relu(y) * y


def asks_for_the_mode(self: Net, y: Tensor, x: Tensor) -> Tensor:
    return F.dropout(F.relu(y), 0.5, self.training)


def asks_another_for_the_mode(self: Net, y: Tensor, x: Tensor) -> Tensor:
    return F.relu(y) * (2 if self.conv.training else 3)


def remembers(self: Net, y: Tensor, x: Tensor) -> Tensor:
    self.count = 1
    return F.relu(y)


def without_gradient(self: Net, y: Tensor, x: Tensor) -> Tensor:
    with torch.no_grad():
        scale = F.relu(y) + 1
    return scale * y


def asks_for_gradients(self: Net, y: Tensor, x: Tensor) -> Tensor:
    return F.relu(y) * (2 if torch.is_grad_enabled() else 3)


def draws(self: Net, y: Tensor, x: Tensor) -> Tensor:
    return F.relu(y) * (1.5 + 0 * random.random())


def draws_a_tensor(self: Net, y: Tensor, x: Tensor) -> Tensor:
    return F.relu(y) * torch.rand(()).add(1).to(x.dtype)


def depends_on_data(self: Net, y: Tensor, x: Tensor) -> Tensor:
    return F.relu(y) if x.shape[0] > 2 else y


def checkpoints(self: Net, y: Tensor, x: Tensor) -> Tensor:
    return checkpoint(F.relu, y, use_reentrant=False)


def looks_things_up(self: Net, y: Tensor, x: Tensor) -> Tensor:
    return F.relu(y) * self.table.setdefault("scale", 2)


REFUSED = {
    "relu6": (net(lambda self, y, x: self.act(y), act=nn.ReLU6()), "ReLU6 follows"),
    "silu": (net(lambda self, y, x: F.silu(y)), "silu follows"),
    "scaled": (net(lambda self, y, x: F.relu(torch.add(y, x, alpha=2))), "add follows"),
    "number": (net(lambda self, y, x: F.relu(y + 1)), "add follows"),
    "in place": (net(writes_into_x), "added in place to a tensor that others may see"),
    "used again": (net(uses_it_again), "its output is used by others than the ReLU"),
    "sum used again": (net(uses_the_sum_again), "add follows"),
    "itself": (net(lambda self, y, x: F.relu(y + y)), "used by others than the addition"),
    "its mode": (net(asks_for_the_mode), "Net.forward reads self.training"),
    "another's mode": (net(asks_another_for_the_mode), "does another thing in eval mode"),
    "remembers": (net(remembers), "Net.forward sets self.count"),
    "no_grad": (net(without_gradient), "works inside a context"),
    "is_grad_enabled": (net(asks_for_gradients), "does another thing in eval mode, without gradients"),
    "draws": (net(draws), "draws random numbers"),
    "draws a tensor": (net(draws_a_tensor), "makes a tensor of its own"),
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
    assert outcomes(after) == {"bn": PLAIN} and reason in why(after)
    assert type(after.bn) is bnkern.nn.BatchNorm2d and after.bn.act is None and not replaced(after)
    assert "count" not in vars(after)  # tracing leaves nothing behind
    assert_same_model(before, after, image())


def test_attributes_that_may_change_unseen() -> None:
    before = net(looks_things_up)
    before.table = {"scale": 3}
    after = bnkern.convert(copy.deepcopy(before))
    assert "reads self.table, a dict, which may change" in why(after)
    assert_same_model(before, after, image())


def test_batch_norms_of_others() -> None:
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
    assert after[0][0] is after[1][0] and why(after) == "the model holds it in 2 places"
    assert_same_model(before, after, image())


def test_shared_relu() -> None:
    """A ReLU that others call, too, goes on to work: in the block as a function would, elsewhere as itself."""
    relu = nn.ReLU()
    before = seeded(lambda: nn.Sequential(nn.Sequential(nn.BatchNorm2d(C), relu), nn.Conv2d(C, C, 1), relu))
    after = bnkern.convert(copy.deepcopy(before))
    assert outcomes(after) == {"0.0": RELU} and type(after[2]) is nn.ReLU and after[2] is after[0][1]
    assert_same_model(before, after, image())
    assert (after.eval()(image()) >= 0).all()


def test_relu_called_twice() -> None:
    before = net(lambda self, y, x: self.relu(self.conv(self.relu(y))), relu=nn.ReLU())
    after = bnkern.convert(copy.deepcopy(before))
    assert outcomes(after) == {"bn": RELU} and type(after.relu) is nn.ReLU
    assert_same_model(before, after, image())


@pytest.mark.parametrize("place", ["bn", "relu", "body"])
def test_hooks_are_kept(place: str) -> None:
    """A hook sees what it saw before: a batch norm or ReLU that has one stays, and so does a module around them."""
    before = seeded(
        lambda: net(
            lambda self, y, x: F.relu(self.body(self.relu(y)) + x), relu=nn.ReLU(), body=nn.Sequential(branch())
        )
    )
    seen: list[Tensor] = []
    before.get_submodule(place).register_forward_hook(lambda module, args, output: seen.append(output.detach().clone()))
    after = bnkern.convert(copy.deepcopy(before))
    assert outcomes(after) == {"bn": RELU if place == "body" else PLAIN, "body.0.1": PLAIN if place == "body" else ADD}
    if place != "body":
        assert f"a hook sits on {place}" in why(after)
    x = image()
    after.eval()(x)
    before.eval()(x)
    assert len(seen) == 2
    torch.testing.assert_close(seen[0], seen[1], rtol=1e-5, atol=1e-5)
    assert_same_model(before, after, x)


def test_dropout_keeps_its_mode() -> None:
    """Dropout as a module inside a replaced forward: active in training, absent in eval."""
    before = net(lambda self, y, x: self.drop(F.relu(y)), drop=nn.Dropout(0.5))
    after = bnkern.convert(copy.deepcopy(before).eval())
    assert replaced(after) == [""]
    assert_same_model(before, after, image())
    dropped, kept = ((run(after.train(mode), image())["output"] == 0).float().mean() for mode in (True, False))
    assert dropped > kept + 0.3


class Optional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn, self.relu, self.scale = nn.BatchNorm2d(C), nn.ReLU(), 1

    def forward(self, x: Tensor, other: Tensor | None = None, *, last: bool = True) -> Tensor:
        y = self.bn(x) if other is None else self.bn(x) + other
        return self.relu(y) * self.scale if last else y


def quietly(model: nn.Module, *args: object, **kwargs: object) -> tuple[Tensor, list[str]]:
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
    """A trace holds for what it saw. Anything else: the block's own forward, right from that call on, and a warning."""
    before = seeded(Optional).eval()
    after = bnkern.convert(copy.deepcopy(before))
    assert outcomes(after) == {"bn": RELU} and replaced(after) == [""]
    x = image() * 5
    torch.testing.assert_close(after(x=x), before(x=x))
    torch.manual_seed(0)
    expected = change(before, x)
    result, warned = quietly(change, after, x)
    if not isinstance(expected, Tensor):
        expected = before(x)
        result, warned = quietly(after, x)
    assert len(warned) == 1 and message in warned[0]
    torch.testing.assert_close(result, expected)
    if "bn is" not in message:
        assert outcomes(after) == {"bn": PLAIN} and message in why(after)
    assert quietly(after, x)[1] == []
    torch.testing.assert_close(after(x), before(x))
    bnkern.convert(after)
    torch.testing.assert_close(after(x), before(x))
    assert type(bnkern.revert(after)) is Optional


def test_an_input_changed_in_between() -> None:
    """The batch norm may not be put off until the addition when its input is overwritten before."""

    def then(self: Net, y: Tensor, x: Tensor) -> Tensor:
        z = self.conv(x)
        y = self.other(z)
        z.mul_(0)
        return F.relu(y + x)

    before = net(then, other=nn.BatchNorm2d(C))
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
    "other layout": lambda self, y, x: F.relu(y + x.to(memory_format=torch.channels_last)),
}


@pytest.mark.parametrize("form", ADDITIONS.values(), ids=ADDITIONS)
def test_additions_that_are_torchs(form: Callable[[Net, Tensor, Tensor], Tensor]) -> None:
    """bnkern.batch_norm refuses such a residual; a converted block does the addition in torch, and counts it."""
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
        now = dict(find())
        assert list(now) == list(old) and all(now[name] is old[name] for name in old)
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


def test_twice_is_once() -> None:
    model = bnkern.convert(basic_net())
    once = fingerprint(model)
    assert fingerprint(bnkern.convert(model)) == once
    assert any(recipe for *_, recipe in once)
    swapped = bnkern.convert(model, fuse=False)
    assert set(outcomes(swapped).values()) == {PLAIN} and not replaced(swapped)
    assert {layer.why for layer in bnkern.convert.summary(swapped)} == {"fuse=False"}
    assert fingerprint(bnkern.convert(model)) == once


def test_revert_gives_the_torch_model_back() -> None:
    """Bit for bit, down to the attributes of every module."""
    before = basic_net()
    after = bnkern.revert(bnkern.convert(copy.deepcopy(before)))
    for (name, one), (other_name, other) in zip(before.named_modules(), after.named_modules(), strict=True):
        assert name == other_name and type(one) is type(other) and vars(one).keys() == vars(other).keys()
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
    """nn.DataParallel copies a module's __dict__: a forward bound to the first device's module would stay with it."""
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
    """The whole graph, in training; residuals that broadcast included."""
    before = nn.Sequential(basic_net(), net(lambda self, y, x: F.relu(y + x[:, :, :1])))
    after = bnkern.convert(copy.deepcopy(before))
    x = image(4, 3, 12, 12)
    compiled = torch.compile(after, backend="aot_eager", fullgraph=True)
    ours, theirs = run(compiled, x), run(before, x)
    ours = {name.replace("_orig_mod.", ""): t for name, t in ours.items()}
    for name, expected in theirs.items():
        # Eager torch in float32 differs by as much from bnkern: sums over 400 values, through seven layers.
        torch.testing.assert_close(ours[name], expected, rtol=1e-3, atol=1e-3)


def test_checkpointing_and_two_calls_before_backward() -> None:
    before = basic_net()
    after = bnkern.convert(copy.deepcopy(before))
    x = image(4, 3, 10, 10)
    for model in (before, after):
        y = checkpoint(model, x.clone().requires_grad_(), use_reentrant=False)
        (y.square().sum() + model(x * 2).sum()).backward()
    for one, other in zip(after.parameters(), before.parameters(), strict=True):
        # Gradients of size up to 100, float32 through six layers.
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-3)


# ---------------------------------------------------------------------------------------------------- at the door


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


def test_our_own_modules_take_part() -> None:
    """bnkern.nn's own batch norms are fused as well, and given back as they were."""
    model = nn.Sequential(bnkern.nn.BatchNorm2d(C), nn.ReLU(), bnkern.nn.BatchNorm2d(C, act="relu"))
    bnkern.convert(model)
    assert outcomes(model) == {"0": RELU, "2": LEFT} and "act='relu'" in why(model)
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


def test_class_changed_by_others_since() -> None:
    """parametrize makes a class of its own out of ours: taking ours away under it would undo it in silence."""
    model = bnkern.convert(basic_net())
    torch.nn.utils.parametrize.register_parametrization(model[1], "weight", nn.Softplus())
    kept = fingerprint(model)
    with pytest.raises(RuntimeError, match="convert: 1 is a ParametrizedBatchNorm2d now"):
        bnkern.revert(model)
    assert fingerprint(model) == kept
