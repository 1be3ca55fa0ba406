"""Common uses of torch.nn.BatchNorm around a training run give the same numbers with bnkern's modules."""

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import bnkern
from tests.nn.modules import EACH_KIND, inputs, pair
from tests.support.cases import Target

# bnkern's and torch's results differ by the order of float32 sums over at most some hundred values.
CLOSE = {"rtol": 1e-5, "atol": 2e-5}


def networks(device: str, **arguments: object) -> tuple[nn.Module, nn.Module]:
    """The same small network twice, with bnkern's batch norms and with torch's."""
    built = []
    for kind in (bnkern.nn, nn):
        torch.manual_seed(0)
        built.append(
            nn.Sequential(
                nn.Conv2d(3, 6, 3, bias=False),
                kind.BatchNorm2d(6, **arguments),
                nn.ReLU(),
                nn.Flatten(2),
                kind.BatchNorm1d(6, **arguments),
            ).to(device)
        )
    return tuple(built)


def batches(device: str, count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(4 + k, 3, 6, 6, generator=generator) + k).to(device) for k in range(count)]


def assert_states_close(ours: nn.Module, theirs: nn.Module) -> None:
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, **CLOSE)


# -------------------------------------------------------------------------------------------- parameters and state


@EACH_KIND
def test_reset(target: Target, name: str, shape: tuple[int, ...]) -> None:
    """reset_running_stats keeps the parameters, and reset_parameters resets both.

    The tensors remain the same objects.
    """
    for function_name in ("reset_running_stats", "reset_parameters"):
        ours, theirs = pair(name, target.device)
        tensors = list(ours.state_dict(keep_vars=True).values())
        for bn in (ours, theirs):
            bn(inputs(shape, torch.float32, target.device)[0])
            getattr(bn, function_name)()
        assert [t.data_ptr() for t in ours.state_dict().values()] == [t.data_ptr() for t in tensors]
        assert all(map(torch.equal, ours.state_dict().values(), theirs.state_dict().values()))
        assert ours.num_batches_tracked.item() == 0


@pytest.mark.parametrize("version", [None, 1, 2])
def test_state_dict_of_an_old_version(version: int | None) -> None:
    """Before version 2 there was no counter, so it starts at 0.

    In version 2 a missing counter is an error, as in torch.
    """
    messages = []
    for kind in (bnkern.nn, nn):
        model = nn.Sequential(kind.BatchNorm2d(5))
        state = nn.Sequential(nn.BatchNorm2d(5)).state_dict()
        del state["0.num_batches_tracked"]
        state["0.running_mean"] += 3
        if version is None:
            del state._metadata
        else:
            state._metadata["0"]["version"] = version
        if version == 2:
            with pytest.raises(RuntimeError, match="num_batches_tracked") as caught:
                model.load_state_dict(state)
            messages.append(str(caught.value))
        else:
            model.load_state_dict(state)
            assert model[0].num_batches_tracked.item() == 0
        assert model[0].running_mean.tolist() == [3.0] * 5
    assert messages[:1] == messages[1:]


def test_made_on_meta_and_initialised_later(target: Target) -> None:
    """Large models are made like this: first without memory, then with to_empty and reset."""
    bn = bnkern.nn.BatchNorm2d(5, act="relu", device="meta")
    assert all(t.is_meta for t in bn.state_dict().values())
    bn.to_empty(device=target.device).reset_parameters()
    fresh = bnkern.nn.BatchNorm2d(5, act="relu", device=target.device)
    x = inputs((6, 5, 4, 3), torch.float32, target.device)[0]
    assert torch.equal(bn(x), fresh(x))
    assert all(map(torch.equal, bn.state_dict().values(), fresh.state_dict().values()))


def test_one_value_per_channel_of_a_module(target: Target) -> None:
    """It raises torch's error with the same message, and counts no batch."""
    messages = []
    for bn in pair("BatchNorm2d", target.device):
        with pytest.raises(ValueError, match="more than 1 value per channel") as caught:
            bn(torch.ones(1, 5, 1, 1, device=target.device))
        messages.append(str(caught.value).replace("torch.Size(", "").rstrip(")"))
        bn.eval()(torch.ones(1, 5, 1, 1, device=target.device))
    assert messages[0] == messages[1]


# ---------------------------------------------------------------------------------------------------- memory format

FORMATS: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "contiguous": ((4, 5, 6, 3), lambda x: x),
    "channels_last": ((4, 5, 6, 3), lambda x: x.contiguous(memory_format=torch.channels_last)),
    "channels_last_3d": ((2, 5, 3, 2, 3), lambda x: x.contiguous(memory_format=torch.channels_last_3d)),
    "channels_last of N x C x L": ((4, 5, 6), lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)),
    "N x C": ((8, 5), lambda x: x),
}


@pytest.mark.parametrize("act", [None, "relu"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("name", FORMATS)
def test_memory_format_stays(target: Target, name: str, training: bool, act: str | None) -> None:
    """The output and every gradient keep the format, whatever the format of the output's gradient."""
    shape, arrange = FORMATS[name]
    x, residual, dy = (arrange(t) for t in inputs(shape, torch.float32, target.device))
    bn = getattr(bnkern.nn, f"BatchNorm{max(x.dim() - 2, 1)}d")(5, act=act, device=target.device).train(training)
    for incoming in (dy, dy.contiguous(), torch.ones((), device=target.device).expand(shape)):
        leaves = [t.detach().requires_grad_() for t in (x, residual)]
        y = bn(*leaves)
        assert y.stride() == x.stride()
        assert all(g.stride() == x.stride() for g in torch.autograd.grad(y, leaves, incoming))


# --------------------------------------------------------------------------------------- what is built around modules


def test_parametrization(target: Target) -> None:
    """The weight is computed from another tensor, as in weight normalisation and positivity constraints."""
    results = []
    for bn in pair("BatchNorm2d", target.device):
        parametrize.register_parametrization(bn, "weight", nn.Softplus(), unsafe=True)
        parametrize.register_parametrization(bn, "bias", nn.Tanh(), unsafe=True)
        assert isinstance(bn, nn.BatchNorm2d)
        x = inputs((6, 5, 4, 3), torch.float32, target.device)[0].requires_grad_()
        y = bn(x)
        y.square().sum().backward()
        results.append([y, x.grad, *(p.grad for p in bn.parameters()), *bn.state_dict().values()])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, **CLOSE)
    # the output, three gradients, and five of the state, in which weight and bias are called originals
    assert len(results[0]) == 9


@pytest.mark.parametrize("momentum", [0.1, None], ids=["momentum", "cumulative"])
def test_update_bn(target: Target, momentum: float | None) -> None:
    """After stochastic weight averaging the statistics are computed again, as a cumulative mean."""
    ours, theirs = networks(target.device, momentum=momentum)
    for model in (ours, theirs):
        for x in batches(target.device):
            model(5 * x)
        update_bn([(x,) for x in batches(target.device)], model)
        assert model[1].momentum == momentum
        assert model[1].num_batches_tracked.item() == 3
    assert_states_close(ours, theirs)


@pytest.mark.parametrize("use_buffers", [True, False], ids=["buffers averaged", "buffers copied"])
def test_averaged_models(target: Target, use_buffers: bool) -> None:
    """An exponential moving average of the weights, and optionally of the statistics, during training."""
    averages = []
    for model in networks(target.device):
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.7), use_buffers=use_buffers)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for x in batches(target.device):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
            average.update_parameters(model)
        averages.append(average)
    assert_states_close(*averages)
    x = batches(target.device)[0]
    torch.testing.assert_close(averages[0].eval()(x), averages[1].eval()(x), **CLOSE)


@pytest.fixture
def deterministic() -> Iterator[None]:
    """torch refuses nondeterministic operations for the duration of the test."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


def test_deterministic_algorithms(target: Target, deterministic: None) -> None:
    """No operation is refused, and two runs have the same bits."""
    results = []
    for _ in range(2):
        model, _ = networks(target.device)
        x = batches(target.device)[0].requires_grad_()
        y = model(x)
        y.square().sum().backward()
        results.append([y, x.grad, *(p.grad for p in model.parameters()), *model.state_dict().values()])
    assert all(map(torch.equal, *results))


# --------------------------------------------------------------------------------------------------------- ensembles


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("shared_input", [True, False], ids=["one input", "an input each"])
def test_ensemble_by_vmap(target: Target, training: bool, shared_input: bool) -> None:
    """Stacked parameters and gradients of each member, as in torch.func's ensembles.

    Training is without running statistics.
    """
    members = []
    for seed in range(3):
        torch.manual_seed(seed)
        member = nn.Sequential(
            nn.Linear(7, 5),
            bnkern.nn.BatchNorm1d(5, track_running_stats=not training, act="relu"),
            nn.Linear(5, 2),
        )
        for p in member[1].parameters():
            nn.init.uniform_(p, 0.5, 1.5)
        members.append(member.double().to(target.device).train(training))
    generator = torch.Generator().manual_seed(5)
    xs = torch.randn(3, 8, 7, generator=generator, dtype=torch.float64).to(target.device)
    parameters, buffers = stack_module_state(members)

    def loss(parameters: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(members[0], (parameters, buffers), x).square().sum()

    axes = (0, 0, None if shared_input else 0)
    grads, losses = torch.vmap(torch.func.grad_and_value(loss), axes)(
        parameters, buffers, xs[0] if shared_input else xs
    )
    for k, member in enumerate(members):
        member.zero_grad()
        value = member(xs[0 if shared_input else k]).square().sum()
        value.backward()
        torch.testing.assert_close(losses[k], value.detach(), rtol=1e-10, atol=1e-10)
        for name, p in member.named_parameters():
            torch.testing.assert_close(grads[name][k], p.grad, rtol=1e-10, atol=1e-10)


def test_ensemble_refuses_to_update_shared_statistics(target: Target) -> None:
    """vmap cannot write the statistics of several members to one tensor.

    As in torch this is an error and writes nothing.
    """
    bn, _ = pair("BatchNorm1d", target.device)
    before = copy.deepcopy(bn.state_dict())
    xs = torch.randn(3, 8, 5, generator=torch.Generator().manual_seed(0)).to(target.device)
    calls = (bn, torch.func.grad(lambda x: bn(x).sum()))
    for call in calls:
        with pytest.raises(RuntimeError, match="make the module with track_running_stats=False, or call it in eval"):
            torch.vmap(call)(xs)
    assert all(torch.equal(value, before[name]) for name, value in bn.state_dict().items())
    bn.eval()
    for call in calls:
        torch.vmap(call)(xs)


# ----------------------------------------------------------------------------------------------- compile and graphs


@pytest.mark.slow
def test_inductor_with_a_dynamic_batch(target: Target) -> None:
    """fullgraph training under inductor, momentum None, with more batch sizes than graphs."""
    torch._dynamo.reset()
    results = []
    for compiled in (True, False):
        model, _ = networks(target.device, momentum=None)
        call = torch.compile(model, fullgraph=True) if compiled else model
        result = []
        with torch._dynamo.config.patch(error_on_recompile=False, recompile_limit=2):
            for x in batches(target.device, 5):
                x.requires_grad_()
                model.zero_grad()
                y = call(x)
                y.square().sum().backward()
                result += [y.detach(), x.grad, *(p.grad for p in model.parameters())]
        results.append([*result, *model.state_dict().values()])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_graphed_callables() -> None:
    """make_graphed_callables of a network in training gives eager's outputs, gradients and statistics."""
    models = []
    for _ in range(2):
        model, _ = networks("cuda", momentum=None)
        models.append(model)
    eager, graphed = models
    sample = batches("cuda")[0].requires_grad_()
    before = copy.deepcopy(graphed.state_dict())
    call = torch.cuda.make_graphed_callables(graphed, (sample,))
    graphed.load_state_dict(before)  # the warm-up has changed the statistics
    for k in range(3):
        leaves = [(sample.detach() + k).requires_grad_() for _ in range(2)]
        outputs = []
        for model, f, x in ((eager, eager, leaves[0]), (graphed, call, leaves[1])):
            model.zero_grad()
            y = f(x)
            y.square().sum().backward()
            outputs.append([y.clone(), x.grad.clone(), *(p.grad.clone() for p in model.parameters())])
        for actual, expected in zip(*outputs, strict=True):
            torch.testing.assert_close(actual, expected, **CLOSE)
    assert_states_close(eager, graphed)
