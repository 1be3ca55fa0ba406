"""Control of running statistics: frozen ones, exact ones of a whole set, and one update under checkpointing."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from torch.utils.checkpoint import checkpoint

import bnkern
from bnkern import recompute_statistics
from bnkern.nn import BatchNorm2d, freeze_statistics, skip_nonfinite
from tests.support.ranks import Ranks


def network(kind: type[nn.Module] = BatchNorm2d, **arguments: object) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), kind(6, **arguments), nn.ReLU(), nn.Conv2d(6, 4, 3), kind(4))


def batches(sizes: tuple[int, ...] = (8, 5, 1)) -> list[Tensor]:
    """Batches of different size and mean."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, 3, 8, 8, generator=generator) * (1 + k) + 3 * k for k, size in enumerate(sizes)]


def copied(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_unchanged(model: nn.Module, state: dict[str, Tensor]) -> None:
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


# ------------------------------------------------------------------------------------------------ frozen


def test_frozen_layers_train_as_in_eval_mode() -> None:
    model, x = network(), batches()[0]
    for batch in batches():
        model(batch)
    reference = copy.deepcopy(model).eval()
    freeze_statistics(model)
    before = copied(model)
    for variant in (model.train(), reference):
        variant(x).square().sum().backward()
    assert_unchanged(model, before)
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
    assert torch.equal(model(x), reference(x)) and model.training


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
def test_freezing_lasts_until_it_is_undone(duplicate: Callable) -> None:
    model, x = network(), batches()[0]
    freeze_statistics(model)
    assert set(model.state_dict()) == set(network(nn.BatchNorm2d).state_dict())
    for variant in (model, duplicate(model)):
        before = copied(variant)
        variant.eval()
        variant.train()(x)
        assert_unchanged(variant, before)
    freeze_statistics(model, False)
    model(x)
    assert model[1].num_batches_tracked == 1 and not torch.equal(model[1].running_mean, before["1.running_mean"])


def test_freezing_under_compile() -> None:
    torch._dynamo.reset()
    model, x = network(), batches()[0]
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(x)
    freeze_statistics(model)
    before = copied(model)
    assert torch.equal(compiled(x), copy.deepcopy(model).eval()(x))
    assert_unchanged(model, before)
    freeze_statistics(model, False)
    compiled(x)
    assert model[1].num_batches_tracked == 2


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.BatchNorm2d(4), "2 is a torch.nn.modules.batchnorm.BatchNorm2d; call bnkern.convert first"),
        (BatchNorm2d(4, track_running_stats=False), "2 has no running statistics"),
    ],
)
def test_layers_that_cannot_be_frozen_are_errors(layer: nn.Module, message: str) -> None:
    model = nn.Sequential(BatchNorm2d(3), nn.InstanceNorm2d(3), layer)
    with pytest.raises(ValueError, match=f"^freeze_statistics: {message}$"):
        freeze_statistics(model)
    assert not model[0].statistics_frozen


# ------------------------------------------------------------------------------------------------ skipped

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("value", [torch.inf, torch.nan, 1e30], ids=["inf", "nan", "overflow"])
def test_skipped_batches_leave_the_statistics(
    value: float, compiled: bool, momentum: float | None, memory_format: torch.memory_format
) -> None:
    """The statistics are those of torch's layer in float64 that never had the batch.

    One value of one channel is not finite. The variance of 1e30 overflows float32, although the values are finite.
    """
    torch._dynamo.reset()
    ours, theirs = BatchNorm2d(8, momentum=momentum, skip_nonfinite=True), nn.BatchNorm2d(8, momentum=momentum).double()
    forward = torch.compile(ours, backend="aot_eager", fullgraph=True) if compiled else ours
    for step in range(4):
        x = torch.randn(4, 8, 5, 5, generator=torch.Generator().manual_seed(step)).to(memory_format=memory_format)
        if step in (0, 2):
            x[1, 3, 2, 2] = value
            plain = BatchNorm2d(8)(x)
            torch.testing.assert_close(forward(x), plain, equal_nan=True)
        else:
            theirs(x.double()), forward(x)
    assert ours.num_batches_skipped == 2 and ours.num_batches_tracked == 2
    torch.testing.assert_close(ours.running_mean.double(), theirs.running_mean, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(ours.running_var.double(), theirs.running_var, rtol=1e-6, atol=1e-7)


def test_skipping_is_set_and_undone() -> None:
    model, bad = network(), torch.full((4, 3, 8, 8), torch.nan)
    skip_nonfinite(model)
    model(batches()[0])
    skip_nonfinite(model)  # the counters stay
    before = copied(model)
    assert set(before) == set(network(nn.BatchNorm2d).state_dict())
    for variant in (model, copy.deepcopy(model), pickled(model)):
        variant(bad)
        assert_unchanged(variant, before)
        assert [variant[k].num_batches_skipped.item() for k in (1, 4)] == [1, 1]
        assert "skip_nonfinite=True" in repr(variant[1])
    model.eval()(bad)
    assert model[1].num_batches_skipped == 1
    skip_nonfinite(model.train(), False)
    assert not dict(model.named_buffers()).keys() & {"1.num_batches_skipped"} and "skip" not in repr(model)
    model(bad)
    assert model[1].running_mean.isnan().all() and model[1].num_batches_tracked == 2


def test_skipping_by_recomputation_counts_once() -> None:
    model, x = network(skip_nonfinite=True), batches()[0]
    x[0, 0, 0, 0] = torch.nan
    checkpoint(model, x.requires_grad_(), use_reentrant=False).sum().backward()
    assert [model[k].num_batches_skipped.item() for k in (1,)] == [1]


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_last_channel_decides_for_all(threads: int) -> None:
    """The channels of a batch are computed in several groups and by several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for memory_format in FORMATS.values():
            norm, x = BatchNorm2d(600, skip_nonfinite=True), torch.randn(4, 600, 6, 6).to(memory_format=memory_format)
            x[3, 599, 5, 5] = -torch.inf
            norm(x)
            assert norm.num_batches_skipped == 1 and not norm.running_mean.any() and (norm.running_var == 1).all()
    finally:
        torch.set_num_threads(before)


def skip_rank(x: Tensor, group) -> list[Tensor]:
    norm = bnkern.nn.SyncBatchNorm(3, process_group=group, skip_nonfinite=True)
    norm(x), norm(x.nan_to_num(0.5))
    return [norm.num_batches_skipped, norm.num_batches_tracked, norm.running_mean]


def test_all_ranks_skip_the_same_batch(ranks: Ranks) -> None:
    x = batches((4,))[0]
    x[3, 2, 1, 1] = torch.nan  # on the second rank
    results = ranks.run(skip_rank, [(x[:2],), (x[2:],)])
    for skipped, tracked, mean in results:
        assert skipped == 1 and tracked == 1
        torch.testing.assert_close(mean, 0.1 * x.nan_to_num(0.5).mean((0, 2, 3)))


def test_layers_that_cannot_skip_are_errors() -> None:
    with pytest.raises(ValueError, match=r"^skip_nonfinite: BatchNorm2d has no running statistics$"):
        BatchNorm2d(4, track_running_stats=False, skip_nonfinite=True)
    with pytest.raises(ValueError, match=r"^skip_nonfinite: 1 is a torch.*BatchNorm2d; call bnkern.convert first$"):
        skip_nonfinite(nn.Sequential(BatchNorm2d(3), nn.BatchNorm2d(4)))
    norm, x = BatchNorm2d(3, skip_nonfinite=True), batches()[0]
    with pytest.raises(RuntimeError, match="do not support num_batches_skipped"):
        torch.func.grad(lambda x: norm(x).sum())(x)
    norm.eval()
    torch.func.grad(lambda x: norm(x).sum())(x)
    for wrong, message in ((torch.tensor(0.0), "an int64 tensor"), (torch.zeros(2, dtype=torch.int64), "one element")):
        with pytest.raises(TypeError, match=f"num_batches_skipped must be .*{message}"):
            bnkern.batch_norm(x, None, None, training=True, num_batches_skipped=wrong)


# ------------------------------------------------------------------------------------------------ recomputed


def oracle(model: nn.Module, xs: list[Tensor]) -> dict[str, Tensor]:
    """Mean and unbiased variance of all inputs of the two layers, which normalise by their batch, in float64."""
    model = copy.deepcopy(model).double().train()
    inputs: dict[str, list[Tensor]] = {"1": [], "4": []}
    for x in (x.double() for x in xs):
        for name, layer in model.named_children():
            if name in inputs:
                inputs[name].append(x.detach().transpose(0, 1).flatten(1))
            x = layer(x)
    joined = {name: torch.cat(values, 1) for name, values in inputs.items()}
    return {f"{name}.running_mean": values.mean(1) for name, values in joined.items()} | {
        f"{name}.running_var": values.var(1) for name, values in joined.items()
    }


@pytest.mark.parametrize("kind", [BatchNorm2d, nn.BatchNorm2d], ids=["ours", "torch"])
@pytest.mark.parametrize("training", [True, False])
def test_recomputed_statistics_are_those_of_the_whole_set(kind: type[nn.Module], training: bool) -> None:
    model, xs = network(kind).train(training), batches()
    loader = [(x, torch.zeros(len(x))) for x in xs]
    expected, before = oracle(model, xs), copied(model)
    recompute_statistics(model, loader)
    state = model.state_dict()
    for name, value in expected.items():
        torch.testing.assert_close(state[name].double(), value, rtol=1e-5, atol=1e-5)
    assert all(module.training is training for module in model.modules())
    assert model[1].num_batches_tracked == 3 and model[1].track_running_stats
    for name, value in model.named_parameters():
        assert torch.equal(value, before[name]) and value.grad is None
    update_bn(loader, model)
    averaged = model.state_dict()["1.running_var"].double()
    assert not torch.allclose(averaged, expected["1.running_var"], rtol=0.1), "the batches differ in their means"


def test_large_means_are_exact() -> None:
    model = nn.Sequential(BatchNorm2d(3))
    xs = [x.double() + 1e6 for x in batches()]
    recompute_statistics(model.double(), xs)
    values = torch.cat([x.transpose(0, 1).flatten(1) for x in xs], 1)
    torch.testing.assert_close(model[0].running_var, values.var(1), rtol=1e-9, atol=0)


def test_layers_that_stay_as_they_are() -> None:
    model, xs = network(), batches()
    model.add_module("5", nn.Dropout(0.5))
    model.unused = nn.ModuleList([BatchNorm2d(4)])
    model.forward = lambda x: nn.Sequential(*list(model.children())[:6])(x)
    freeze_statistics(model[4])
    before = copied(model)
    recompute_statistics(model, xs)
    state = model.state_dict()
    for name in before:
        changed = name.startswith("1.") and "weight" not in name and "bias" not in name
        assert torch.equal(state[name], before[name]) is not changed, name


def test_a_failed_batch_leaves_the_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network()
    before = copied(model)
    with pytest.raises(RuntimeError):
        recompute_statistics(model, [*batches(), torch.zeros(1, 2, 8, 8)])
    assert_unchanged(model, before)
    assert all(module.training for module in model.modules()) and model[1].track_running_stats
    assert not model[1]._forward_pre_hooks
    with pytest.raises(ValueError, match=r"^recompute_statistics: there are no batches$"):
        recompute_statistics(model, [])


def test_a_converted_model() -> None:
    model, xs = network(nn.BatchNorm2d), batches()
    expected = oracle(model, xs)
    converted = bnkern.convert(model)
    recompute_statistics(converted, xs)
    for name, value in expected.items():
        torch.testing.assert_close(converted.state_dict()[name].double(), value, rtol=1e-5, atol=1e-5)


def recompute_rank(xs: list[Tensor], synchronized: bool, group) -> dict[str, Tensor]:
    model = network()
    if synchronized:
        model = bnkern.nn.convert_sync_batchnorm(model, group)
    recompute_statistics(model, xs, process_group=group)
    return model.state_dict()


@pytest.mark.parametrize("split", [([0, 1], [2]), ([0, 1, 2], [])], ids=["two ranks", "one without batches"])
def test_processes_join_their_batches(ranks: Ranks, split: tuple[list[int], ...]) -> None:
    xs = batches()
    results = ranks.run(recompute_rank, [([xs[k] for k in part], False) for part in split])
    for name, value in oracle(network(), xs).items():
        for result in results:
            torch.testing.assert_close(result[name].double(), value, rtol=1e-5, atol=1e-5)
            assert torch.equal(result[name], results[0][name])


def test_processes_with_synchronized_layers(ranks: Ranks) -> None:
    """The layers normalise by the joint batch, so the second layer's inputs are those of one process."""
    xs = batches((4, 4))
    halves = [[x[:2] for x in xs], [x[2:] for x in xs]]
    results = ranks.run(recompute_rank, [(half, True) for half in halves])
    for name, value in oracle(network(), xs).items():
        torch.testing.assert_close(results[0][name].double(), value, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------ checkpointing


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_updates_once(reentrant: bool, momentum: float | None) -> None:
    plain, checked, x = network(momentum=momentum), network(momentum=momentum), batches()[0].requires_grad_()
    plain(x).square().sum().backward()
    expected, x.grad = x.grad, None
    checkpoint(checked, x, use_reentrant=reentrant).square().sum().backward()
    assert torch.equal(x.grad, expected)
    assert_unchanged(checked, copied(plain))
    for ours, theirs in zip(checked.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
    assert checked[1].num_batches_tracked == 1


def test_recomputation_under_compile_updates_once() -> None:
    torch._dynamo.reset()
    plain, checked, x = network(), network(), batches()[0].requires_grad_()
    plain(x).square().sum().backward()
    compiled = torch.compile(lambda x: checkpoint(checked, x, use_reentrant=False), backend="aot_eager", fullgraph=True)
    compiled(x).square().sum().backward()
    for name, value in checked.state_dict().items():
        torch.testing.assert_close(value, plain.state_dict()[name])


def checkpoint_rank(x: Tensor, reentrant: bool, group) -> dict[str, Tensor]:
    model = bnkern.nn.convert_sync_batchnorm(network(), group)
    checkpoint(model, x.requires_grad_(), use_reentrant=reentrant).square().sum().backward()
    return model.state_dict()


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_of_synchronized_layers_updates_once(ranks: Ranks, reentrant: bool) -> None:
    x, plain = batches((4,))[0], network()
    results = ranks.run(checkpoint_rank, [(x[:2], reentrant), (x[2:], reentrant)])
    plain(x)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(results[0][name], value, rtol=1e-5, atol=1e-5)
