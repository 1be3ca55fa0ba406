"""SyncBatchNorm in several processes over gloo gives the results of one process with the joint batch."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import bnkern
from bnkern.norm import ranks as joint
from tests.support.cases import BF16, FP32, FP64, Precision, ulp
from tests.support.ranks import GROUPS, Ranks, rank_parts

# The parts of a batch of 8 on 2 and 3 ranks: even, uneven, with a single value, and with empty ranks.
SPLITS = [(4, 4), (1, 7), (8, 0), (0, 8), (3, 3, 2), (1, 6, 1), (0, 8, 0), (5, 0, 3)]
EACH_SPLIT = pytest.mark.parametrize("split", SPLITS, ids=lambda s: "+".join(map(str, s)))


def random_tensors(
    shape: tuple[int, ...], precision: Precision, memory_format: torch.memory_format = torch.contiguous_format
) -> list[Tensor]:
    """An input, a residual and a gradient."""
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
    """A training step: the output, the gradients, and the state after it."""
    x = x.clone().requires_grad_()
    residual = None if residual is None else residual.clone().requires_grad_()
    y = bn(x, residual)
    y.backward(dy)
    of_rank = {"y": y.detach(), "dx": x.grad, "dresidual": None if residual is None else residual.grad}
    sums = {f"d{name}": p.grad for name, p in bn.named_parameters()}
    return {"of rank": of_rank, "sums": sums, "state": dict(bn.state_dict())}


def layer(arguments: dict, state: dict, x: Tensor, residual: Tensor | None, dy: Tensor, group) -> dict:
    """On a rank: one step of a SyncBatchNorm in this group."""
    bn = bnkern.nn.SyncBatchNorm(x.shape[1], process_group=group, **arguments)
    bn.load_state_dict(state)
    return step(bn, x, residual, dy)


def joint_layer(arguments: dict, state: dict, x: Tensor, residual: Tensor | None, dy: Tensor) -> dict:
    """In this process: the same step of a plain batch norm with the joint batch."""
    bn = bnkern.nn.SyncBatchNorm(x.shape[1], **arguments)
    bn.load_state_dict(state)
    return step(bn, x, residual, dy)


def compare(results: list[dict], joint: dict, tolerance: float) -> None:
    """Compares concatenated outputs and gradients, summed gradients of parameters, and the state of each rank."""
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


def close(actual: Tensor, expected: Tensor, tolerance: float, label: str) -> None:
    """Requires errors within ``tolerance`` of the largest value, or one unit of the stored dtype if that is larger."""
    error = (actual.double() - expected.double()).abs()
    bound = torch.full_like(error, tolerance * max(1.0, expected.abs().max().item()))
    if expected.dtype in (torch.bfloat16, torch.float16):
        bound = bound + ulp(expected.double(), expected.dtype)
    assert (error <= bound).all(), f"{label}: off by {error.max().item():.3g}, allowed {bound.max().item():.3g}"


# Sums of parts differ from sums of the whole by the order of addition: some roundings of float32 (float64).
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
        results = ranks.run(layer, [(arguments, state, *part) for part in rank_parts(tensors, split)])
        compare(results, joint_layer(arguments, state, *tensors), TOLERANCE[precision.dtype])
        for part, r in zip(rank_parts([x], split), results, strict=True):
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
    results = ranks.run(layer, [(arguments, state, *part) for part in rank_parts(tensors, (3, 0, 5))])
    compare(results, joint_layer(arguments, state, *tensors), TOLERANCE[torch.float32])


def several_batches(batches: list[Tensor], momentum: float | None, group) -> dict:
    bn = bnkern.nn.SyncBatchNorm(batches[0].shape[1], momentum=momentum, process_group=group)
    for x in batches:
        bn(x)
    outputs = [bn.eval()(x) for x in batches]
    return {"state": dict(bn.state_dict()), "eval": outputs}


@pytest.mark.parametrize("momentum", [0.1, None], ids=["momentum", "cumulative"])
def test_running_statistics_over_batches(ranks: Ranks, momentum: float | None) -> None:
    """Three batches, of which the second is empty on every rank: it is counted and changes nothing.

    Then eval without ranks.
    """
    whole = [t[: (0 if k == 1 else 8)] * (k + 1) for k, t in enumerate(random_tensors((8, 5, 4), FP32))]
    parts = [rank_parts([t], (0, 0) if len(t) == 0 else (3, 5)) for t in whole]
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


def test_one_value_on_all_ranks_together(ranks: Ranks) -> None:
    """A rank cannot refuse it without communication, so the variance is 0, y = bias, and the statistics are finite."""
    x = torch.full((1, 3), 5.0)
    results = ranks.run(layer, [({}, parameters_of(3, {}), t, None, torch.ones_like(t)) for t in (x[:0], x)])
    bias, mean, var = (parameters_of(3, {})[k] for k in ("bias", "running_mean", "running_var"))
    assert torch.equal(results[1]["of rank"]["y"][0], bias)
    for r in results:
        torch.testing.assert_close(r["state"]["running_mean"], 0.9 * mean + 0.5)
        torch.testing.assert_close(r["state"]["running_var"], 0.9 * var)


def moments_of(count: int, mean: Tensor, m2: Tensor, group) -> tuple[Tensor, ...]:
    kernels = bnkern.backends.choose("", "cpu", mean.dtype)
    return joint.gather_moments(kernels, count, mean, m2, *joint.ranks_of(group))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_counts_are_gathered_exactly(ranks: Ranks, dtype: torch.dtype) -> None:
    """Counts above 2^24 do not fit float32, and counts above 2^31 do not fit int32."""
    counts, ones = (2**24 + 1, 2**33 + 1, 0), torch.ones(3, dtype=dtype)
    for count, mean, m2 in ranks.run(moments_of, [(count, ones, 0 * ones) for count in counts]):
        assert count.item() == sum(counts)
        assert torch.equal(mean, ones) and torch.equal(m2, 0 * ones)


def test_small_variance(ranks: Ranks) -> None:
    """sigma = 1e-4 at mean 1, eps = 1e-3: torch gathers invstd, which does not determine so small a variance."""
    generator = torch.Generator().manual_seed(0)
    x = 1 + 1e-4 * torch.randn(64, 3, 8, 8, generator=generator)
    arguments, split = {"eps": 1e-3, "momentum": 1.0}, (40, 24)
    state = bnkern.nn.SyncBatchNorm(3).state_dict()
    results = ranks.run(layer, [(arguments, state, part, None, part) for (part,) in rank_parts([x], split)])
    true_var = x.double().transpose(0, 1).flatten(1).var(1)
    error = (results[0]["state"]["running_var"] / true_var - 1).abs().max().item()

    # torch's formula in its float32 (batch_norm_gather_stats_with_counts, because its class refuses CPU tensors)
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
    assert error < 1e-4  # r = 1e4: the bound of tests/support/cases.py
    assert theirs > 100 * error


# ---------------------------------------------------------------------------------------------- compile and errors


def compiled_layer(backend: str, batches: list[list[Tensor]], group) -> tuple[list[dict], list[dict], int]:
    """Steps of a compiled and of an eager layer, without a graph break, and the number of compiled graphs."""
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
        for bn, call, result in zip(layers, calls, results, strict=True):
            bn.zero_grad()
            x, residual = (t.clone().requires_grad_() for t in tensors[:2])
            y = call(x, residual)
            y.backward(tensors[2])
            result += [y.detach(), x.grad, residual.grad, bn.weight.grad, bn.bias.grad, *bn.state_dict().values()]
    return copy.deepcopy(results[0]), copy.deepcopy(results[1]), graphs


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile(ranks: Ranks, backend: str) -> None:
    """With fullgraph in training and momentum None, all batch sizes after the first share one dynamic graph and eager's
    bits.
    """
    batches = [random_tensors((n, 5, 4, 3), FP32) for n in (8, 9, 11)]
    parts = [rank_parts(tensors, (3, len(tensors[0]) - 3)) for tensors in batches]
    for rank, (compiled, eager, graphs) in enumerate(
        ranks.run(compiled_layer, [(backend, [p[rank] for p in parts]) for rank in range(2)])
    ):
        assert graphs == (1 if rank == 0 else 2)  # rank 0 always has 3 samples
        for actual, expected in zip(compiled, eager, strict=True):
            if backend == "aot_eager":
                assert torch.equal(actual, expected)
            else:  # inductor computes the running statistics in another order
                torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)


def checked_by_torch(group) -> None:
    """opcheck of both operators in a group of one rank: shapes, strides, fakes, autograd registration."""
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x, residual, dy = random_tensors((4, 5, 3, 3), FP32, memory_format)
        weight, bias = torch.rand(5), torch.rand(5)
        for act, added in ((None, None), ("relu", None), ("relu", residual)):
            leaves = [t if t is None else t.clone().requires_grad_() for t in (x, weight, bias, added)]
            running = (torch.zeros(5), torch.ones(5), torch.tensor(0))
            settings = (*running, True, 0.1, 1e-5, act, added is not None, torch.tensor(0), None)
            settings += ("", group.group_name, 1)
            forward = torch.ops.bnkern.batch_norm_forward.default
            backward = torch.ops.bnkern.batch_norm_backward.default
            torch.library.opcheck(forward, (*leaves, *settings))
            torch.library.opcheck(forward, (*leaves, *settings, True))
            _, mean, invstd, mask, *_, count, _ = forward(x, weight, bias, added, *settings)
            mask = mask if mask.numel() else None
            for needs in ([True, True, True, added is not None], [False, True, False, False]):
                arguments = (dy, x, weight, bias, mean, invstd, mask, act, True, needs, None)
                arguments += ("", group.group_name, count)
                torch.library.opcheck(backward, arguments)
            torch.library.opcheck(backward, (*arguments, False, True, True))


def test_opcheck(ranks: Ranks) -> None:
    ranks.run(checked_by_torch, [()])


def refusals(x: Tensor, group) -> list[str]:
    bn = bnkern.nn.SyncBatchNorm(3, process_group=group)
    messages = []

    def expect_error(function: Callable, error: type[Exception]) -> None:
        with pytest.raises(error) as caught:
            function()
        messages.append(str(caught.value))

    leaf = x.clone().requires_grad_()
    expect_error(
        lambda: torch.autograd.grad(bn(leaf).square().sum(), leaf, create_graph=True)[0].sum().backward(), RuntimeError
    )
    expect_error(lambda: torch.func.grad(lambda x: bn(x).sum())(x), RuntimeError)
    expect_error(lambda: torch.vmap(lambda x: bn(x))(torch.stack([x, x])), RuntimeError)
    expect_error(lambda: bn(x[0]), ValueError)
    expect_error(lambda: bn(x[:, :0]), ValueError)
    expect_error(lambda: bn(x[:, :2]), ValueError)
    expect_error(lambda: bn(x, x[:, :2]), ValueError)
    expect_error(lambda: bn(x.double()), TypeError)
    assert bn.num_batches_tracked.item() == 1  # only the first batch is counted, refused ones are not
    with torch.no_grad():
        bn(x)
    return messages


def test_errors(ranks: Ranks) -> None:
    """Each error is raised on every rank before any communication, so the group remains usable."""
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    expected = [
        "double backward across ranks is not supported",
        "do not support torch.func transforms",
        "do not support torch.func transforms",
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
    """The first two ranks share statistics, and the third has its own. A group of one is a plain batch norm."""
    own_group = GROUPS[2] if dist.get_rank() < 2 else dist.GroupMember.NON_GROUP_MEMBER
    bn = bnkern.nn.SyncBatchNorm(3, process_group=own_group)
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
    """For each subset of input, weight, bias and residual that requires grad, the gradients are the same."""

    def gradients(requirements: tuple[bool, ...]) -> list[Tensor | None]:
        bn = bnkern.nn.SyncBatchNorm(3, act="relu", process_group=group)
        leaves = [x.clone(), residual.clone(), bn.weight, bn.bias]
        for leaf, is_required in zip(leaves, requirements, strict=True):
            leaf.requires_grad_(is_required)
        y = bn(leaves[0], leaves[1])
        assert y.requires_grad == any(requirements)
        if y.requires_grad:
            y.square().sum().backward()
        return [leaf.grad for leaf in leaves]

    all_gradients = gradients((True,) * 4)
    for k in range(16):
        requirements = tuple(bool(k >> j & 1) for j in range(4))
        for is_required, gradient, expected in zip(requirements, gradients(requirements), all_gradients, strict=True):
            assert torch.equal(gradient, expected) if is_required else gradient is None


def test_partial_gradients(ranks: Ranks) -> None:
    x, residual, _ = random_tensors((8, 3, 4), FP32)
    ranks.run(frozen_parts, [tuple(part) for part in rank_parts([x, residual], (3, 5))])


def test_without_a_group_it_is_a_plain_batch_norm() -> None:
    """Without a process group, as in a notebook, it has the bits of the plain batch norm, and torch's error for one
    value.
    """
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
