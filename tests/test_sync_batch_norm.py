"""SyncBatchNorm: several processes over gloo compute what one computes over their joint batch. Also DDP and FSDP2."""

import copy
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize

import bnkern
from bnkern import distributed
from tests.cases import BF16, FP32, FP64, Precision, ulp
from tests.ranks import GROUPS, Ranks

WORLD = 3
# How a batch of 8 is dealt out: 2 and 3 ranks; even, uneven, one of a single value, one or more of none.
SPLITS = [(4, 4), (1, 7), (8, 0), (0, 8), (3, 3, 2), (1, 6, 1), (0, 8, 0), (5, 0, 3)]
EACH_SPLIT = pytest.mark.parametrize("split", SPLITS, ids=lambda s: "+".join(map(str, s)))


@pytest.fixture(scope="module")
def pool() -> Iterator[list[Ranks]]:
    running: list[Ranks] = []
    yield running
    for ranks in running:
        ranks.end()


@pytest.fixture
def ranks(pool: list[Ranks]) -> Ranks:
    """Three processes, started at the first use and again where a test broke them."""
    if not pool or not pool[-1].alive:
        pool.append(Ranks(WORLD))
    return pool[-1]


def dealt(tensors: list[Tensor | None], split: tuple[int, ...]) -> list[list[Tensor | None]]:
    """For each rank its part of each tensor, in the memory format of the whole."""
    parts = [[None] * len(split) if t is None else [p.clone() for p in t.split(split)] for t in tensors]
    return [list(of_rank) for of_rank in zip(*parts, strict=True)]


def random_tensors(
    shape: tuple[int, ...], precision: Precision, memory_format: torch.memory_format = torch.contiguous_format
) -> list[Tensor]:
    """Input, residual and gradient."""
    generator = torch.Generator().manual_seed(len(shape))
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3)]
    tensors[0] = 2 * tensors[0] + torch.arange(shape[1]).view(1, -1, *[1] * (len(shape) - 2))
    return [t.to(precision.dtype).contiguous(memory_format=memory_format) for t in tensors]


def parameters_of(channels: int, arguments: dict) -> dict[str, Tensor]:
    bn = bnkern.nn.SyncBatchNorm(channels, **arguments)
    generator = torch.Generator().manual_seed(3)
    return {
        k: torch.rand(v.shape, generator=generator).to(v.dtype) + 0.5 if v.is_floating_point() else v
        for k, v in bn.state_dict().items()
    }


def step(bn: nn.Module, x: Tensor, residual: Tensor | None, dy: Tensor) -> dict[str, Tensor]:
    """A training step: output, gradients, and what the state has become."""
    x = x.clone().requires_grad_()
    residual = None if residual is None else residual.clone().requires_grad_()
    y = bn(x, residual)
    y.backward(dy)
    of_rank = {"y": y.detach(), "dx": x.grad, "dresidual": None if residual is None else residual.grad}
    sums = {f"d{name}": p.grad for name, p in bn.named_parameters()}
    return {"of rank": of_rank, "sums": sums, "state": dict(bn.state_dict())}


def layer(arguments: dict, state: dict, x: Tensor, residual: Tensor | None, dy: Tensor, group) -> dict:
    """On a rank: one step of a SyncBatchNorm of this group."""
    bn = bnkern.nn.SyncBatchNorm(x.shape[1], process_group=group, **arguments)
    bn.load_state_dict(state)
    return step(bn, x, residual, dy)


def joint_layer(arguments: dict, state: dict, x: Tensor, residual: Tensor | None, dy: Tensor) -> dict:
    """In this process: the same step of a plain batch norm of all the ranks' batches."""
    bn = bnkern.nn.SyncBatchNorm(x.shape[1], **arguments)
    bn.load_state_dict(state)
    return step(bn, x, residual, dy)


def compare(results: list[dict], joint: dict, tolerance: float) -> None:
    """Outputs and gradients put together again, parameters' gradients added up; the state on each rank."""
    for name, whole in joint["of rank"].items():
        if whole is not None:
            parts = [r["of rank"][name] for r in results]
            assert all(p.dtype == whole.dtype for p in parts)
            close(torch.cat(parts), whole, tolerance, name)
    for name, whole in joint["sums"].items():
        close(sum(r["sums"][name].double() for r in results), whole, tolerance * 4, name)
    for name, whole in joint["state"].items():
        for r in results:
            close(r["state"][name], whole, tolerance, name)
            assert torch.equal(r["state"][name], results[0]["state"][name]), f"{name} differs between ranks"


def close(one: Tensor, other: Tensor, tolerance: float, what: str) -> None:
    """Within ``tolerance`` of the largest value, and where that is finer one unit of the dtype both are stored in."""
    error = (one.double() - other.double()).abs()
    bound = torch.full_like(error, tolerance * max(1.0, other.abs().max().item()))
    if other.dtype in (torch.bfloat16, torch.float16):
        bound = bound + ulp(other.double(), other.dtype)
    assert (error <= bound).all(), f"{what}: off by {error.max().item():.3g}, allowed {bound.max().item():.3g}"


# Sums of the parts differ from those of the whole by the order of addition: some roundings of float32 (float64).
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-6, torch.float64: 1e-14}


# ---------------------------------------------------------------------------------------- one process, joint batch


@EACH_SPLIT
@pytest.mark.parametrize("precision", [FP32, BF16, FP64], ids=lambda p: p.name)
@pytest.mark.parametrize("act", [None, "relu"])
@pytest.mark.parametrize("with_residual", [False, True], ids=["", "residual"])
def test_equals_one_process(
    ranks: Ranks, split: tuple[int, ...], precision: Precision, act: str | None, with_residual: bool
) -> None:
    for shape, memory_format in [
        ((8, 5, 4, 3), torch.contiguous_format),
        ((8, 16, 3, 3), torch.channels_last),
        ((8, 7), torch.contiguous_format),
    ]:
        x, residual, dy = random_tensors(shape, precision, memory_format)
        tensors = [x, residual if with_residual else None, dy]
        arguments = {"act": act, "dtype": precision.params}
        state = parameters_of(shape[1], arguments)
        results = ranks.run(layer, [(arguments, state, *part) for part in dealt(tensors, split)])
        compare(results, joint_layer(arguments, state, *tensors), TOLERANCE[precision.dtype])
        for part, r in zip(dealt([x], split), results, strict=True):
            if x.dim() == 4 and len(part[0]) > 1:
                assert all(
                    r["of rank"][k].is_contiguous(memory_format=memory_format)
                    for k in ("y", "dx", "dresidual")
                    if r["of rank"][k] is not None
                )


@pytest.mark.parametrize(
    "arguments",
    [
        {"affine": False},
        {"bias": False},
        {"track_running_stats": False},
        {"momentum": None},
        {"momentum": 0.0},
        {"momentum": 1.0, "eps": 0.1},
        {"track_running_stats": False, "momentum": None},
    ],
    ids=lambda a: ",".join(f"{k}={v}" for k, v in a.items()),
)
def test_arguments(ranks: Ranks, arguments: dict) -> None:
    tensors = random_tensors((8, 5, 4), FP32)
    state = parameters_of(5, arguments)
    results = ranks.run(layer, [(arguments, state, *part) for part in dealt(tensors, (3, 0, 5))])
    compare(results, joint_layer(arguments, state, *tensors), TOLERANCE[torch.float32])


def several_batches(batches: list[Tensor], momentum: float | None, group) -> dict:
    bn = bnkern.nn.SyncBatchNorm(batches[0].shape[1], momentum=momentum, process_group=group)
    for x in batches:
        bn(x)
    outputs = [bn.eval()(x) for x in batches]
    return {"state": dict(bn.state_dict()), "eval": outputs}


@pytest.mark.parametrize("momentum", [0.1, None], ids=["momentum", "cumulative"])
def test_running_statistics_over_batches(ranks: Ranks, momentum: float | None) -> None:
    """Three batches, the second empty on every rank: it counts and changes nothing. Then eval, without the others."""
    whole = [t[: (0 if k == 1 else 8)] * (k + 1) for k, t in enumerate(random_tensors((8, 5, 4), FP32))]
    parts = [dealt([t], (0, 0) if len(t) == 0 else (3, 5)) for t in whole]
    results = ranks.run(several_batches, [([p[rank][0] for p in parts], momentum) for rank in range(2)])
    bn = bnkern.nn.BatchNorm1d(5, momentum=momentum)
    for x in whole:
        bn(x)
    bn.eval()
    for rank, result in enumerate(results):
        for name, value in bn.state_dict().items():
            close(result["state"][name], value, TOLERANCE[torch.float32], name)
            assert torch.equal(result["state"][name], results[0]["state"][name])
        for y, part in zip(result["eval"], parts, strict=True):
            if len(y):
                close(y, bn(part[rank][0]), 4 * TOLERANCE[torch.float32], "y in eval")


def test_one_value_in_all(ranks: Ranks) -> None:
    """Nobody can refuse it without waiting for the others: variance 0, y = bias, finite statistics."""
    x = torch.full((1, 3), 5.0)
    results = ranks.run(layer, [({}, parameters_of(3, {}), t, None, torch.ones_like(t)) for t in (x[:0], x)])
    bias, mean, var = (parameters_of(3, {})[k] for k in ("bias", "running_mean", "running_var"))
    assert torch.equal(results[1]["of rank"]["y"][0], bias)
    for r in results:
        torch.testing.assert_close(r["state"]["running_mean"], 0.9 * mean + 0.5)
        torch.testing.assert_close(r["state"]["running_var"], 0.9 * var)


def moments_of(count: int, mean: Tensor, m2: Tensor, group) -> tuple[Tensor, ...]:
    kernels = bnkern.backends.choose("", "cpu", mean.dtype)
    return distributed.gather_moments(kernels, count, mean, m2, *distributed.ranks_of(group))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_counts_travel_exactly(ranks: Ranks, dtype: torch.dtype) -> None:
    """Beyond 2^24 no float32 would hold them; beyond 2^31 no int32."""
    counts, ones = (2**24 + 1, 2**33 + 1, 0), torch.ones(3, dtype=dtype)
    for count, mean, m2 in ranks.run(moments_of, [(count, ones, 0 * ones) for count in counts]):
        assert count.item() == sum(counts)
        assert torch.equal(mean, ones) and torch.equal(m2, 0 * ones)


def test_small_variance(ranks: Ranks) -> None:
    """sigma = 1e-4 at mean 1, eps = 1e-3: torch gathers invstd, from which no variance can be had back."""
    generator = torch.Generator().manual_seed(0)
    x = 1 + 1e-4 * torch.randn(64, 3, 8, 8, generator=generator)
    arguments, split = {"eps": 1e-3, "momentum": 1.0}, (40, 24)
    state = bnkern.nn.SyncBatchNorm(3).state_dict()
    results = ranks.run(layer, [(arguments, state, part, None, part) for (part,) in dealt([x], split)])
    true_var = x.double().transpose(0, 1).flatten(1).var(1)
    error = (results[0]["state"]["running_var"] / true_var - 1).abs().max().item()

    # torch's formula (batch_norm_gather_stats_with_counts; its class refuses CPU tensors), in its float32
    count, mean, m2 = torch.zeros(()), torch.zeros(3), torch.zeros(3)
    for part in x.split(split):
        var, part_mean = torch.var_mean(part.transpose(0, 1).flatten(1), 1, correction=0)
        invstd = torch.rsqrt(var + arguments["eps"])
        n = torch.tensor(part.numel() / 3)
        part_var = (1 / invstd).square() - arguments["eps"]
        factor = 1 / (count + n)
        m2 = m2 + part_var * n + (part_mean - mean).square() * count * n * factor
        mean, count = (count * factor) * mean + n * factor * part_mean, count + n
    theirs = (m2 / (count - 1) / true_var - 1).abs().max().item()
    assert error < 1e-4  # r = 1e4: the bound of tests/cases.py
    assert theirs > 100 * error


# --------------------------------------------------------------------------------------------------- whole networks


class Net(nn.Module):
    """Convolutions, both fused shapes, and a batch norm of N x C, in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.first = bnkern.nn.BatchNorm2d(6, act="relu")
        self.conv = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.last = bnkern.nn.BatchNorm2d(6, act="relu", momentum=None)
        self.head = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.stem(x))
        return self.head(self.last(self.conv(x), x).mean((2, 3)))


def net() -> Net:
    torch.manual_seed(0)
    return Net().double()


def random_batches(split: tuple[int, ...]) -> list[list[tuple[Tensor, Tensor]]]:
    """For each rank its part of three batches of input and target."""
    generator = torch.Generator().manual_seed(1)
    shapes = ((8, 3, 6, 6), (8, 4))
    batches = [[torch.randn(shape, generator=generator).double() for shape in shapes] for _ in range(3)]
    parts = [dealt(batch, split) for batch in batches]
    return [[tuple(part[rank]) for part in parts] for rank in range(len(split))]


def train(model: nn.Module, batches: list[tuple[Tensor, Tensor]], weight: float) -> dict[str, Tensor]:
    """Steps of SGD on weight * sum of squares, as one process would do them."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    outputs = []
    for x, target in batches:
        x = x.clone().requires_grad_()
        y = model(x)
        optimizer.zero_grad()
        (weight * (y - target).square().sum()).backward()
        optimizer.step()
        outputs += [y.detach(), x.grad]
    return {"outputs": outputs, "state": dict(getattr(model, "module", model).state_dict())}


def train_rank(batches: list[tuple[Tensor, Tensor]], weight: float, compiled: bool, group) -> dict:
    model = bnkern.nn.convert_sync_batchnorm(net(), group)
    assert sum(type(m) is bnkern.nn.SyncBatchNorm for m in model.modules()) == 3
    model = DistributedDataParallel(model, process_group=group, broadcast_buffers=True)
    if compiled:
        torch._dynamo.reset()
        model = torch.compile(model, backend="aot_eager")
    # DDP takes the mean of the ranks' gradients; the joint loss is the sum of theirs.
    result = train(model, batches, weight * dist.get_world_size(group))
    result["state"] = {k.removeprefix("_orig_mod.").removeprefix("module."): v for k, v in result["state"].items()}
    return result


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("split", [(4, 4), (6, 2), (5, 0, 3)], ids=str)
def test_network_under_ddp(ranks: Ranks, split: tuple[int, ...], compiled: bool) -> None:
    """Three steps of DDP, with buffers broadcast, end where one process with the joint batch does: 1e-10 in float64."""
    if compiled and 0 in split:
        pytest.skip("an empty convolution has no compiled form")
    parts = random_batches(split)
    given = [(batches, 1 / 8, compiled) for batches in parts]
    results = ranks.run(train_rank, given)
    joint = [tuple(map(torch.cat, zip(*pieces, strict=True))) for pieces in zip(*parts, strict=True)]
    joint = train(net(), joint, 1 / 8)
    assert results[0]["state"].keys() == joint["state"].keys()
    for name, value in joint["state"].items():
        for result in results:
            torch.testing.assert_close(result["state"][name], value, rtol=1e-10, atol=1e-10)
            assert torch.equal(result["state"][name], results[0]["state"][name])
    for k, whole in enumerate(joint["outputs"]):
        scale = 1 if k % 2 == 0 else len(split)  # the input's gradient is of the loss that DDP was given
        together = torch.cat([r["outputs"][k] for r in results]) / scale
        torch.testing.assert_close(together, whole, rtol=1e-10, atol=1e-10)


def two_forwards(x: Tensor, group) -> list[Tensor]:
    """Two calls before one backward, as a siamese network makes them; DDP broadcasts buffers before each."""
    model = bnkern.nn.convert_sync_batchnorm(net(), group)
    model = DistributedDataParallel(model, process_group=group)
    (model(x).square().sum() + model(2 * x).square().sum()).backward()
    return [p.grad for p in model.parameters()]


def test_two_forwards_under_ddp(ranks: Ranks) -> None:
    x = torch.randn(8, 3, 5, 5, generator=torch.Generator().manual_seed(2)).double()
    results = ranks.run(two_forwards, [(part,) for (part,) in dealt([x], (3, 5))])
    model = net()
    (model(x).square().sum() + model(2 * x).square().sum()).backward()
    for k, p in enumerate(model.parameters()):
        for grads in results:
            torch.testing.assert_close(2 * grads[k], p.grad, rtol=1e-10, atol=1e-10)


def fully_sharded(model: Net, group: dist.ProcessGroup) -> nn.Module:
    """FSDP2: each rank holds a part of every parameter, batch norms' included."""
    mesh = DeviceMesh.from_group(group, "cpu")
    for module in (model.first, model.last, model.head, model):
        fully_shard(module, mesh=mesh)
    assert isinstance(model.first.weight, DTensor)
    return model


def train_wrapped(batches: list[tuple[Tensor, Tensor]], wrapper: str, sync: bool, group) -> dict[str, Tensor]:
    model = bnkern.nn.convert_sync_batchnorm(net(), group) if sync else net()
    model = DistributedDataParallel(model, process_group=group) if wrapper == "ddp" else fully_sharded(model, group)
    state = train(model, batches, 1.0)["state"]
    return {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in state.items()}


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_plain_batch_norms_in_wrappers(ranks: Ranks, wrapper: str) -> None:
    """Each rank normalises by its own batch; gradients are averaged; DDP takes buffers from rank 0 before a step."""
    parts = random_batches((3, 5))
    results = ranks.run(train_wrapped, [(batches, wrapper, False) for batches in parts])
    models = [net() for _ in parts]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9) for model in models]
    for step_batches in zip(*parts, strict=True):
        if wrapper == "ddp":
            models[1].load_state_dict(models[0].state_dict())
        for model, (x, target) in zip(models, step_batches, strict=True):
            model.zero_grad()
            (model(x) - target).square().sum().backward()
        for ps in zip(*(model.parameters() for model in models), strict=True):
            mean = sum(p.grad for p in ps) / len(ps)
            for p in ps:
                p.grad = mean.clone()
        for optimizer in optimizers:
            optimizer.step()
    for model, state in zip(models, results, strict=True):
        for name, value in model.state_dict().items():
            torch.testing.assert_close(state[name], value, rtol=1e-10, atol=1e-10)


def test_synchronized_network_under_fsdp(ranks: Ranks) -> None:
    """As one process with the joint batch, whose gradient FSDP divides by the number of ranks."""
    parts = random_batches((4, 4))
    results = ranks.run(train_wrapped, [(batches, "fsdp", True) for batches in parts])
    joint = [tuple(map(torch.cat, zip(*pieces, strict=True))) for pieces in zip(*parts, strict=True)]
    model = net()
    train(model, joint, 1 / 2)
    for name, value in model.state_dict().items():
        for state in results:
            torch.testing.assert_close(state[name], value, rtol=1e-10, atol=1e-10)


# ---------------------------------------------------------------------------------------------- compile and errors


def compiled_layer(backend: str, batches: list[list[Tensor]], group) -> tuple[list[dict], list[dict], int]:
    """Steps of a compiled and of an eager layer without a graph break, and the number of compiled graphs."""
    torch._dynamo.reset()
    graphs = 0

    def counting(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        nonlocal graphs
        graphs += 1
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    layers = [bnkern.nn.SyncBatchNorm(5, momentum=None, act="relu", process_group=group) for _ in range(2)]
    calls = [torch.compile(layers[0], backend=counting, fullgraph=True), layers[1]]
    results = [[], []]
    for tensors in batches:
        for bn, call, found in zip(layers, calls, results, strict=True):
            bn.zero_grad()
            x, residual = (t.clone().requires_grad_() for t in tensors[:2])
            y = call(x, residual)
            y.backward(tensors[2])
            found += [y.detach(), x.grad, residual.grad, bn.weight.grad, bn.bias.grad, *bn.state_dict().values()]
    return copy.deepcopy(results[0]), copy.deepcopy(results[1]), graphs


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile(ranks: Ranks, backend: str) -> None:
    """fullgraph in training, momentum None; all batch sizes after the first share one dynamic graph; eager's bits."""
    batches = [random_tensors((n, 5, 4, 3), FP32) for n in (8, 9, 11)]
    parts = [dealt(tensors, (3, len(tensors[0]) - 3)) for tensors in batches]
    for rank, (compiled, eager, graphs) in enumerate(
        ranks.run(compiled_layer, [(backend, [p[rank] for p in parts]) for rank in range(2)])
    ):
        assert graphs == (1 if rank == 0 else 2)  # rank 0 has 3 samples each time
        for one, other in zip(compiled, eager, strict=True):
            if backend == "aot_eager":
                assert torch.equal(one, other)
            else:  # inductor computes the running statistics, in another order
                torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def checked_by_torch(group) -> None:
    """opcheck of both ops, in a group of one: shapes, strides, fakes, autograd registration."""
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x, residual, dy = random_tensors((4, 5, 3, 3), FP32, memory_format)
        weight, bias = torch.rand(5), torch.rand(5)
        for act, added in ((None, None), ("relu", None), ("relu", residual)):
            leaves = [t if t is None else t.clone().requires_grad_() for t in (x, weight, bias, added)]
            given = (1e-5, act, "", group.group_name, 1)
            forward = torch.ops.bnkern.sync_batch_norm_forward.default
            torch.library.opcheck(forward, (*leaves, *given))
            torch.library.opcheck(forward, (*leaves, *given, True))
            _, mean, invstd, _, count, mask, _ = forward(x, weight, bias, added, *given)
            for needs in ([True, True, True, added is not None], [False, True, False, False]):
                arguments = (dy, x, weight, bias, mean, invstd, count, mask, act, needs, "", group.group_name)
                torch.library.opcheck(torch.ops.bnkern.sync_batch_norm_backward.default, arguments)
            torch.library.opcheck(torch.ops.bnkern.sync_batch_norm_backward.default, (*arguments, False, True))


def test_opcheck(ranks: Ranks) -> None:
    ranks.run(checked_by_torch, [()])


def refusals(x: Tensor, group) -> list[str]:
    bn = bnkern.nn.SyncBatchNorm(3, process_group=group)
    messages = []

    def keep(function: Callable, error: type[Exception]) -> None:
        with pytest.raises(error) as caught:
            function()
        messages.append(str(caught.value))

    leaf = x.clone().requires_grad_()
    keep(
        lambda: torch.autograd.grad(bn(leaf).square().sum(), leaf, create_graph=True)[0].sum().backward(), RuntimeError
    )
    keep(lambda: torch.func.grad(lambda x: bn(x).sum())(x), RuntimeError)
    keep(lambda: torch.vmap(lambda x: bn(x))(torch.stack([x, x])), RuntimeError)
    keep(lambda: bn(x[0]), ValueError)
    keep(lambda: bn(x[:, :0]), ValueError)
    keep(lambda: bn(x[:, :2]), ValueError)
    keep(lambda: bn(x, x[:, :2]), ValueError)
    keep(lambda: bn(x.double()), TypeError)
    assert bn.num_batches_tracked.item() == 1  # of the first; what was refused has counted nothing
    with torch.no_grad():
        bn(x)
    return messages


def test_errors(ranks: Ranks) -> None:
    """Each raises on every rank before it waits for another, so that the group goes on."""
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    expected = [
        "double backward across ranks is not supported",
        "cannot be seen through by torch.func transforms",
        "cannot be seen through by torch.func transforms",
        "expected at least 2D input (got 1D input)",
        "number of input channels should be non-zero",
        "must have one element per channel of input, shape [2], got [3]",
        "residual must have the shape of input, [4, 3], got [4, 2]",
        "must be torch.float64 for torch.float64 input, got torch.float32",
    ]
    for messages in ranks.run(refusals, [(x,), (x,)]):
        for message, part in zip(messages, expected, strict=True):
            assert part in message


# ------------------------------------------------------------------------------------------------ groups, and alone


def in_groups(x: Tensor, group) -> Tensor:
    """The first two ranks share statistics, the third has its own; a group of one is a plain batch norm."""
    mine = GROUPS[2] if dist.get_rank() < 2 else dist.GroupMember.NON_GROUP_MEMBER
    bn = bnkern.nn.SyncBatchNorm(3, process_group=mine)
    single = bnkern.nn.SyncBatchNorm(3, process_group=GROUPS[1])
    single(x)
    plain = bnkern.nn.BatchNorm1d(3)
    plain(x)
    assert torch.equal(single.running_mean, plain.running_mean)
    bn(x)
    return bn.running_mean


def test_process_groups(ranks: Ranks) -> None:
    xs = [torch.full((2, 3), float(10 ** (k + 1))) for k in range(3)]
    means = ranks.run(in_groups, [(x,) for x in xs])
    torch.testing.assert_close(torch.stack(means)[:, 0], torch.tensor([5.5, 5.5, 100.0]))


def frozen_parts(x: Tensor, residual: Tensor, group) -> None:
    """Each subset of input, weight, bias and residual that requires grad gets what it gets with all of them."""

    def gradients(wanted: tuple[bool, ...]) -> list[Tensor | None]:
        bn = bnkern.nn.SyncBatchNorm(3, act="relu", process_group=group)
        leaves = [x.clone(), residual.clone(), bn.weight, bn.bias]
        for leaf, want in zip(leaves, wanted, strict=True):
            leaf.requires_grad_(want)
        y = bn(leaves[0], leaves[1])
        assert y.requires_grad == any(wanted)
        if y.requires_grad:
            y.square().sum().backward()
        return [leaf.grad for leaf in leaves]

    everything = gradients((True,) * 4)
    for k in range(16):
        wanted = tuple(bool(k >> j & 1) for j in range(4))
        for want, one, all_of_them in zip(wanted, gradients(wanted), everything, strict=True):
            assert torch.equal(one, all_of_them) if want else one is None


def test_partial_gradients(ranks: Ranks) -> None:
    x, residual, _ = random_tensors((8, 3, 4), FP32)
    ranks.run(frozen_parts, [tuple(part) for part in dealt([x, residual], (3, 5))])


def test_alone_it_is_a_plain_batch_norm() -> None:
    """Without a process group, as in a notebook: the same bits, and torch's error for one value per channel."""
    x, residual, dy = random_tensors((8, 5, 4), FP32)
    state = parameters_of(5, {})
    sync, plain = bnkern.nn.SyncBatchNorm(5, act="relu"), bnkern.nn.BatchNorm1d(5, act="relu")
    results = []
    for bn in (sync, plain):
        bn.load_state_dict(state)
        result = step(bn, x, residual, dy)
        results.append([*result["of rank"].values(), *result["sums"].values(), *result["state"].values()])
    assert all(map(torch.equal, *results))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        sync(x[:1, :, 0])
    sync(torch.ones(2, 5, 1, 1, 1, 1))  # any number of dimensions from 2


def test_constructor_and_state_are_torch_s() -> None:
    for arguments in ({}, {"affine": False}, {"bias": False, "dtype": torch.float64}, {"track_running_stats": False}):
        ours, theirs = bnkern.nn.SyncBatchNorm(5, **arguments), nn.SyncBatchNorm(5, **arguments)
        assert isinstance(ours, nn.modules.batchnorm._BatchNorm)
        assert repr(ours) == repr(theirs)
        ours.load_state_dict(theirs.state_dict(), strict=True)
        assert all(
            a.dtype == b.dtype for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True)
        )
    assert bnkern.nn.SyncBatchNorm(5, 1e-3, None, False, True, "group").process_group == "group"
    assert "act='relu'" in repr(bnkern.nn.SyncBatchNorm(5, act="relu"))
    with pytest.raises(ValueError, match="act must be None or \"relu\", got 'gelu'"):
        bnkern.nn.SyncBatchNorm(5, act="gelu")
    twin = copy.deepcopy(bnkern.nn.SyncBatchNorm(5, act="relu"))
    assert twin.act == "relu" and type(twin) is bnkern.nn.SyncBatchNorm


# ------------------------------------------------------------------------------------------------------- conversion


def test_convert() -> None:
    """Torch's three, ours and torch's own SyncBatchNorm: the very same tensors, mode, hooks, act and names."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1),
        nn.BatchNorm2d(4, momentum=None),
        bnkern.nn.BatchNorm2d(4, act="relu", affine=False),
        nn.ModuleDict({"a": nn.SyncBatchNorm(4, eps=0.1), "b": bnkern.nn.SyncBatchNorm(4, act="relu")}),
        nn.BatchNorm3d(4, track_running_stats=False, bias=False).requires_grad_(False),
        nn.InstanceNorm2d(4),
    )
    model[1].eval()
    handle, calls = model[1].register_forward_hook(lambda *_: calls.append(1)), []
    before = dict(model.state_dict(keep_vars=True))
    modes = {name: m.training for name, m in model.named_modules()}
    was = {name: m for name, m in model.named_modules()}
    converted = bnkern.nn.convert_sync_batchnorm(model, "group")
    assert converted is model
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(before)
    assert all(after[k] is v for k, v in before.items())
    assert {name: m.training for name, m in model.named_modules()} == modes
    kinds = {name: type(m) for name, m in model.named_modules()}
    for name in ("1", "2", "3.a", "3.b", "4"):
        now = model.get_submodule(name)
        assert kinds[name] is bnkern.nn.SyncBatchNorm and now.process_group == "group"
        assert now.act == getattr(was[name], "act", None)
        for key in ("eps", "momentum", "affine", "track_running_stats", "num_features"):
            assert getattr(now, key) == getattr(was[name], key)
    assert kinds["5"] is nn.InstanceNorm2d
    model[1](torch.ones(2, 4, 2, 2))
    assert calls == [1]
    handle.remove()
    model[1](torch.ones(2, 4, 2, 2))
    assert calls == [1]


def test_convert_a_single_and_a_shared_one() -> None:
    bn = bnkern.nn.BatchNorm1d(4, act="relu")
    converted = bnkern.nn.convert_sync_batchnorm(bn)
    assert type(converted) is bnkern.nn.SyncBatchNorm and type(bn) is bnkern.nn.BatchNorm1d
    assert converted.weight is bn.weight
    model = nn.ModuleList([nn.Sequential(bn), bn, bn])
    bnkern.nn.convert_sync_batchnorm(model)
    assert type(model[1]) is bnkern.nn.SyncBatchNorm
    assert model[0][0] is model[1] is model[2]
    again = bnkern.nn.convert_sync_batchnorm(copy.deepcopy(model))
    assert repr(again) == repr(model)


def test_convert_refuses_what_it_would_spoil() -> None:
    class Rectified(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).relu()

    model = nn.Sequential(Rectified(4), nn.BatchNorm2d(4))
    with pytest.warns(UserWarning, match=r"0 \(Rectified\) has a forward of its own"):
        bnkern.nn.convert_sync_batchnorm(model)
    assert type(model[0]) is Rectified and type(model[1]) is bnkern.nn.SyncBatchNorm
    with pytest.raises(ValueError, match=r"a\.0 \(LazyBatchNorm2d\) must be initialised by a first call"):
        bnkern.nn.convert_sync_batchnorm(nn.ModuleDict({"a": nn.Sequential(nn.LazyBatchNorm2d())}))
    model = nn.Sequential(nn.BatchNorm2d(4))
    parametrize.register_parametrization(model[0], "weight", nn.Softplus())
    with pytest.raises(ValueError, match="0 must not be parametrized"):
        bnkern.nn.convert_sync_batchnorm(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bnkern.nn.convert_sync_batchnorm(nn.Sequential(nn.Linear(2, 2), bnkern.nn.BatchNorm1d(2)))
