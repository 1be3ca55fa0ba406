"""The modules as replacements of torch.nn's, and their fused ReLU and residual."""

import copy
import inspect
import io
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import bnkern
from tests.nn.modules import EACH_KIND, inputs, pair
from tests.support.cases import CASE, FP32, Target

ARGUMENTS = [
    {},
    {"affine": False},
    {"track_running_stats": False},
    {"affine": False, "track_running_stats": False},
    {"momentum": None},
    {"momentum": 0.0},
    {"momentum": 1.0, "eps": 0.1},
    {"bias": False},
    {"dtype": torch.float64},
]
EACH_ARGUMENTS = pytest.mark.parametrize(
    "arguments", ARGUMENTS, ids=lambda a: ",".join(f"{k}={v}" for k, v in a.items())
)


def run(bn: nn.Module, xs: list[Tensor]) -> list[Tensor]:
    """Two training steps and one in eval mode: outputs, gradients, and the state after them."""
    results = []
    for k, x in enumerate(xs):
        x = x.clone().requires_grad_()
        y = bn.train(k < 2)(x)
        y.square().sum().backward()
        results += [y, x.grad]
    return results + [p.grad for p in bn.parameters()] + list(bn.state_dict().values())


@EACH_KIND
@EACH_ARGUMENTS
def test_equals_torch(target: Target, name: str, shape: tuple[int, ...], arguments: dict) -> None:
    ours, theirs = pair(name, target.device, **arguments)
    xs = inputs(shape, arguments.get("dtype", torch.float32), target.device)
    for actual, expected in zip(run(ours, xs), run(theirs, xs), strict=True):
        assert actual.dtype == expected.dtype
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("change", ["num_batches_tracked = None", "track_running_stats = False", "running_mean = None"])
def test_changed_after_construction(target: Target, change: str, momentum: float | None) -> None:
    """The counter removed, tracking switched off while the buffers remain, and the statistics removed."""
    results = []
    for bn in pair("BatchNorm2d", target.device, momentum=momentum):
        attribute, value = change.split(" = ")
        setattr(bn, attribute, {"None": None, "False": False}[value])
        if attribute == "running_mean":
            bn.running_var = None
        results.append(run(bn, inputs((6, 5, 4, 3), torch.float32, target.device)))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=2e-5)


@EACH_KIND
@EACH_ARGUMENTS
def test_state_dict_goes_both_ways(name: str, shape: tuple[int, ...], arguments: dict) -> None:
    ours, theirs = getattr(bnkern.nn, name)(5, **arguments), getattr(nn, name)(5, **arguments)
    for state in (ours.state_dict(), theirs.state_dict()):
        for module in (ours, theirs):
            module.load_state_dict(state, strict=True)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert ours.state_dict()._metadata == theirs.state_dict()._metadata
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    assert [n for n, _ in ours.named_buffers()] == [n for n, _ in theirs.named_buffers()]
    assert isinstance(ours, type(theirs))
    assert repr(ours) == repr(theirs)


def test_state_dict_without_the_counter() -> None:
    """Files from before the counter existed can be loaded, as in torch."""
    state = {k: v for k, v in nn.BatchNorm2d(5).state_dict().items() if k != "num_batches_tracked"}
    bn = bnkern.nn.BatchNorm2d(5)
    bn.load_state_dict(state, strict=True)
    assert bn.num_batches_tracked.item() == 0


@pytest.mark.parametrize("name", ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d"])
def test_constructor_takes_torch_arguments(name: str) -> None:
    """They are in the same order with the same defaults. ``act`` is a keyword argument."""
    ours = inspect.signature(getattr(bnkern.nn, name).__init__).parameters
    theirs = inspect.signature(getattr(nn, name).__init__).parameters
    positional = [p for p in theirs.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    for our_parameter, their_parameter in zip(ours.values(), positional, strict=False):
        assert (our_parameter.name, our_parameter.default) == (their_parameter.name, their_parameter.default)
    assert ours["act"].kind is inspect.Parameter.KEYWORD_ONLY


def test_repr_names_act() -> None:
    assert repr(bnkern.nn.BatchNorm2d(5, act="relu")) == repr(nn.BatchNorm2d(5))[:-1] + ", act='relu')"
    assert repr(bnkern.nn.Activation()) == "Activation(act='relu')"


@pytest.mark.parametrize(
    ("name", "shape"),
    [("BatchNorm1d", (3, 5, 2, 2)), ("BatchNorm1d", (5,)), ("BatchNorm2d", (3, 5)), ("BatchNorm2d", (3, 5, 4)),
     ("BatchNorm3d", (3, 5, 4, 4))],
)  # fmt: skip
def test_wrong_number_of_dimensions(name: str, shape: tuple[int, ...]) -> None:
    messages = []
    for module in (bnkern.nn, nn):
        with pytest.raises(ValueError, match="expected") as caught:
            getattr(module, name)(5)(torch.ones(shape))
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("kind", ["BatchNorm2d", "Activation"])
def test_unknown_act(kind: str) -> None:
    arguments = (5,) if kind == "BatchNorm2d" else ()
    with pytest.raises(ValueError, match="act must be None or \"relu\", got 'gelu'"):
        getattr(bnkern.nn, kind)(*arguments, act="gelu")


@EACH_KIND
@pytest.mark.parametrize("act", [None, "relu"])
@pytest.mark.parametrize("with_residual", [False, True], ids=["", "residual"])
def test_act_and_residual(target: Target, name: str, shape: tuple[int, ...], act: str | None, with_residual) -> None:
    ours, theirs = pair(name, target.device)
    ours.act = act
    results = []
    for bn in (ours, theirs):
        x, residual = (t.clone().requires_grad_() for t in inputs(shape, torch.float32, target.device, 2))
        if bn is ours:
            y = bn(x, residual) if with_residual else bn(x)
        else:
            y = bn(x) + (residual if with_residual else 0)
            y = y.relu() if act else y
        y.square().sum().backward()
        results.append([y, x.grad, residual.grad, bn.weight.grad, bn.bias.grad])
    for actual, expected in zip(*results, strict=True):
        assert (actual is None) == (expected is None)
        if actual is not None:
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("act", [None, "relu"])
def test_activation_module(target: Target, act: str | None) -> None:
    p = CASE["nhwc"].problem(FP32, target.device)
    module = bnkern.nn.Activation(act)
    assert not module.state_dict()
    expected = p.x + p.residual
    assert torch.equal(module(p.x, p.residual), expected.relu() if act else expected)
    assert torch.equal(module(p.x), p.x.relu() if act else p.x)


@pytest.mark.parametrize("method", ["deepcopy", "pickle", "torch.save"])
def test_copies(method: str) -> None:
    bn = bnkern.nn.BatchNorm2d(5, momentum=None, act="relu")
    bn(CASE["nhwc_c5_s49"].problem().x)
    if method == "deepcopy":
        twin = copy.deepcopy(bn)
    elif method == "pickle":
        twin = pickle.loads(pickle.dumps(bn))
    else:
        file = io.BytesIO()
        torch.save(bn, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert repr(twin) == repr(bn) and type(twin) is type(bn)
    x = CASE["sliced_batch"].problem().x
    assert torch.equal(twin(x), bn(x))
    for copied, original in zip(twin.state_dict().values(), bn.state_dict().values(), strict=True):
        assert torch.equal(copied, original) and copied.data_ptr() != original.data_ptr()


def test_hooks_receive_the_residual(target: Target) -> None:
    p = CASE["nhwc_c5_s49"].problem(FP32, target.device)
    bn, recorded = bnkern.nn.BatchNorm2d(5, act="relu", device=target.device), []
    bn.register_forward_pre_hook(lambda _, args: recorded.append(len(args)))
    bn.register_forward_hook(lambda _, args, out: recorded.append((len(args), out.shape)))
    bn.register_full_backward_hook(lambda _, grads_in, grads_out: recorded.append((len(grads_in), len(grads_out))))
    x = p.x.requires_grad_()
    bn(x, p.residual).sum().backward()
    assert recorded == [2, (2, x.shape), (2, 1)]


def test_called_twice_before_backward(target: Target) -> None:
    """Each call keeps its own statistics: a shared module, as in siamese networks."""
    first, second = (CASE[name].problem(FP32, target.device).x for name in ("nhwc_c5_s49", "nchw_s49"))
    results = []
    for bn in pair("BatchNorm2d", target.device):
        x, y = first.clone().requires_grad_(), second.clone().requires_grad_()
        (bn(x).square().sum() + bn(y).square().mul(2).sum()).backward()
        results.append([x.grad, y.grad, bn.weight.grad, bn.bias.grad, *bn.state_dict().values()])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(target: Target, reentrant: bool) -> None:
    """The recomputed forward gives the same gradients. It does not count its batch again, as torch's does."""
    p = CASE["nhwc_c5_s49"].problem(FP32, target.device)
    results = []
    for checkpointed in (False, True):
        bn, _ = pair("BatchNorm2d", target.device)
        bn.act = "relu"
        x, residual = p.x.clone().requires_grad_(), p.residual.clone().requires_grad_()
        y = checkpoint(bn, x, residual, use_reentrant=reentrant) if checkpointed else bn(x, residual)
        y.backward(p.dy)
        results.append([y, x.grad, residual.grad, bn.weight.grad, bn.bias.grad])
        assert bn.num_batches_tracked.item() == 1
    for actual, expected in zip(*results, strict=True):
        assert torch.equal(actual, expected)


def test_functional_call(target: Target) -> None:
    """The given parameters and statistics are used and updated."""
    x = CASE["nhwc_c5_s49"].problem(FP32, target.device).x
    bn, _ = pair("BatchNorm2d", target.device)
    before = copy.deepcopy(bn.state_dict())
    state = {k: v + 1 for k, v in bn.state_dict().items()}
    y = functional_call(bn, state, x)
    for key, value in bn.state_dict().items():
        assert torch.equal(value, before[key])
    assert state["num_batches_tracked"].item() == 2
    twin, _ = pair("BatchNorm2d", target.device)
    twin.load_state_dict({k: v + 1 for k, v in before.items()})
    assert torch.equal(twin(x), y)
    assert torch.equal(twin.running_var, state["running_var"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(target: Target, dtype: torch.dtype) -> None:
    """As in torch, batch norm keeps the dtype of its input, here the half precision of the convolution, with fp32
    parameters.
    """
    model = nn.Sequential(nn.Conv2d(3, 5, 3), bnkern.nn.BatchNorm2d(5, act="relu")).to(target.device)
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)).to(target.device)
    with torch.autocast(target.device, dtype):
        half = model(x)
        assert bnkern.batch_norm(x, None, None, training=True).dtype == torch.float32
    assert half.dtype == dtype
    half.sum().backward()
    assert model[1].weight.grad.dtype == torch.float32
    assert model[1].running_mean.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_module_cast_as_a_whole(target: Target, dtype: torch.dtype) -> None:
    bn = bnkern.nn.BatchNorm2d(5, act="relu", device=target.device).to(dtype)
    x = CASE["nhwc_c5_s49"].problem(FP32, target.device).x.to(dtype).requires_grad_()
    y = bn(x)
    y.sum().backward()
    assert {t.dtype for t in (y, x.grad, bn.weight.grad, bn.bias.grad, bn.running_mean, bn.running_var)} == {dtype}
    assert bn.num_batches_tracked.dtype == torch.int64


def test_frozen_batch_norm(target: Target) -> None:
    """A module in eval mode in a network that trains: only the input gets a gradient, and statistics do not change."""
    bn, _ = pair("BatchNorm2d", target.device)
    bn.eval().requires_grad_(False)
    before = copy.deepcopy(bn.state_dict())
    x = CASE["nhwc_c5_s49"].problem(FP32, target.device).x.requires_grad_()
    bn(x).sum().backward()
    scale = bn.weight / (bn.running_var + bn.eps).sqrt()
    torch.testing.assert_close(x.grad, scale.view(1, -1, 1, 1).expand_as(x))
    assert all(torch.equal(value, before[key]) for key, value in bn.state_dict().items())


def test_trains_like_torch(target: Target) -> None:
    """After twenty steps of SGD the weights of a small network are the same."""
    results = []
    for kind in (bnkern.nn, nn):
        generator = torch.Generator().manual_seed(7)
        convs = [nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)]
        for conv in convs:
            for p in conv.parameters():
                p.data = 0.2 * torch.randn(p.shape, generator=generator)
        first = kind.BatchNorm2d(8, act="relu") if kind is bnkern.nn else nn.Sequential(nn.BatchNorm2d(8), nn.ReLU())
        model = nn.Sequential(convs[0], first, convs[1], kind.BatchNorm2d(8)).to(target.device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for _ in range(20):
            x = torch.randn(4, 3, 8, 8, generator=generator).to(target.device)
            loss = (model(x) - x.mean()).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        results.append([t for t in model.state_dict().values()])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)
