"""The native calls (csrc/call.cpp): they take what they should, decline the rest, and equal the launchers in Python.

Whether a call goes one way or the other must not be seen but in time: same bits, same strides, same errors.
"""

import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import bnkern
from bnkern import backends, functional
from bnkern.backends import layout as layouts
from tests.cases import BF16, CASES, FP32, FP64, LAYOUTS, Case, Precision
from tests.test_errors import bad_arguments, good_arguments

cpu = pytest.importorskip("bnkern.backends.cpu")
native = cpu._native

needs_exchange = pytest.mark.skipif(cpu.usual is None, reason="this torch has no exchange table of DLPack")


@pytest.fixture
def in_python(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As with a torch that has no exchange table."""
    backends.native_usual.cache_clear()
    monkeypatch.setattr(cpu, "_reads_tensors", False)
    monkeypatch.setattr(cpu, "usual", None)
    yield
    backends.native_usual.cache_clear()


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The native calls that were not declined, as they come."""
    names: list[str] = []

    def spy(name: str, call: Callable) -> Callable:
        def spied(*args: object) -> object:
            results = call(*args)
            if results is not None:
                names.append(name)
            return results

        return spied

    for name in ("forward", "backward"):
        monkeypatch.setattr(native, name, spy(name, getattr(native, name)))
    return names


# ------------------------------------------------------------------------------------------------- same results


def call_all(case: Case, precision: Precision, training: bool, act: str | None, with_residual: bool) -> list[Tensor]:
    """Every result and gradient of one call, and the statistics it wrote."""
    p = case.problem(precision)
    leaves = [t.detach().clone(memory_format=torch.preserve_format) for t in (p.x, p.residual, p.weight, p.bias)]
    leaves[0], leaves[1] = p.x.detach(), p.residual.detach()
    leaves = [leaf.requires_grad_() for leaf in leaves]
    x, residual, weight, bias = leaves
    running = [p.mean.to(p.weight.dtype).clone(), (p.invstd**-2).to(p.weight.dtype), torch.tensor(3)]
    y = bnkern.batch_norm(
        x,
        running[0],
        running[1],
        weight,
        bias,
        training,
        0.3,
        residual=residual if with_residual else None,
        act=act,
        num_batches_tracked=running[2],
    )
    wanted = leaves if with_residual else [x, weight, bias]
    return [y.detach(), *torch.autograd.grad(y, wanted, p.dy.to(y.dtype)), *running]


WAYS = [
    way
    for way in itertools.product(CASES, (FP32, BF16, FP64), (True, False), (None, "relu"), (False, True))
    if 0 not in way[0].shape and way[0].shape[0] * torch.Size(way[0].shape[2:]).numel() > 1
]


@needs_exchange
def test_same_bits_and_strides_as_in_python(monkeypatch: pytest.MonkeyPatch, taken: list[str]) -> None:
    """All shared cases: dense ones are taken, views are declined, and nobody could tell from the results."""
    both = {True: 0, False: 0}
    for case, precision, training, act, with_residual in WAYS[:: max(len(WAYS) // 160, 1)]:
        del taken[:]
        found = call_all(case, precision, training, act, with_residual)
        x = case.problem(precision).x
        dense = native.dense_layout(x.shape, x.stride()) is not None
        assert ("forward" in taken) == dense, case
        both[dense] += 1
        with monkeypatch.context() as patch:
            patch.setattr(cpu, "_reads_tensors", False)
            expected = call_all(case, precision, training, act, with_residual)
        for one, other in zip(found, expected, strict=True):
            assert one.dtype is other.dtype and one.stride() == other.stride(), case
            assert torch.equal(one.isnan(), other.isnan()), case
            assert torch.equal(one.nan_to_num(), other.nan_to_num()), case
    assert both[True] > 40 and both[False] > 5


@needs_exchange
@pytest.mark.parametrize("needs", list(itertools.product((True, False), repeat=4)), ids=str)
def test_gradients_where_needed(needs: tuple[bool, ...], monkeypatch: pytest.MonkeyPatch, taken: list[str]) -> None:
    """Frozen one by one, in training and eval."""
    p = next(case for case in CASES if case.name == "nchw_tail").problem(FP32)
    x, residual, dy = (t.contiguous() for t in (p.x, p.residual, p.dy))
    for training, act in itertools.product((True, False), ("relu", None)):
        running = (None, None) if training else (p.mean, p.invstd**-2)
        call = (x, p.weight, p.bias, residual, *running, None, training, 0.1, 1e-5, act)
        _, mean, invstd, mask = cpu.forward(*call, True)
        results = [cpu.backward(dy, x, p.weight, p.bias, mean, invstd, mask, act, training, needs)]
        assert taken == ["forward", "backward"]
        with monkeypatch.context() as patch:
            patch.setattr(cpu, "_reads_tensors", False)
            results.append(cpu.backward(dy, x, p.weight, p.bias, mean, invstd, mask, act, training, needs))
        for one, other, need in zip(*results, needs, strict=True):
            assert (one is not None) == (other is not None) == need
            assert not need or torch.equal(one, other)
        del taken[:]


@needs_exchange
def test_small_and_large_results(taken: list[str]) -> None:
    """Memory is aligned, outlives the call, and goes back to the pool where it came from it."""
    cpu.release_memory()
    for size in (4, 256):
        x = torch.randn(2, 16, size, size)
        y = cpu.forward(x, None, None, None, None, None, None, True, 0.1, 1e-5, None, False)[0]
        kept = y.clone()
        assert y.data_ptr() % 64 == 0
        for _ in range(3):
            cpu.forward(-x, None, None, None, None, None, None, True, 0.1, 1e-5, None, False)
        assert torch.equal(y, kept)
        idle = native.pool_idle()
        del y
        assert (native.pool_idle() > idle) == (size == 256)
    assert taken == ["forward"] * 8


def test_without_the_exchange_table() -> None:
    """A torch whose capsule is missing, or of another kind: the same results by the launchers in Python."""
    code = """
import torch
torch.Tensor.__dlpack_c_exchange_api__ = None
import bnkern
from bnkern import backends
from bnkern.backends import cpu
for other in (0, "dlpack_exchange_api", torch.Tensor):
    assert not cpu._native.exchange(other, (torch.Tensor,), torch.Tensor.is_neg)
assert cpu.usual is None and backends.native_usual() is None and not cpu._reads_tensors
torch.manual_seed(0)
bn, bt = bnkern.nn.BatchNorm2d(3, act="relu"), torch.nn.BatchNorm2d(3)
x, r = torch.randn(2, 4, 3, 5, 5, requires_grad=True)
y = bn(x, r)
torch.testing.assert_close(y, torch.relu(bt(x) + r))
y.square().sum().backward()
torch.testing.assert_close(bn.running_var, bt.running_var)
"""
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------------------------------------- same layout


@st.composite
def strided(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Sizes, and strides that are some permutation's dense ones, now and then with one of them off."""
    shape = draw(st.lists(st.sampled_from([1, 1, 2, 3, 16]), min_size=2, max_size=5))
    order = draw(st.permutations(range(len(shape))))
    usual = [list(range(len(shape))), [0, *range(2, len(shape)), 1]]
    order = draw(st.sampled_from([*usual, list(order)]))
    strides, step = [0] * len(shape), 1
    for axis in reversed(order):
        strides[axis] = step
        step *= shape[axis]
    if draw(st.booleans()):
        strides[draw(st.integers(0, len(shape) - 1))] = draw(st.integers(0, 40))
    return tuple(shape), tuple(strides)


@settings(max_examples=300, deadline=None)
@given(strided())
def test_layout_has_one_meaning(tensor: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    """What the native calls take, they see as ``layout.py`` does, and results get the input's own strides."""
    shape, stride = tensor
    found = native.dense_layout(shape, stride)
    x = torch.empty_strided(shape, stride, device="meta")
    like = layouts.layout(x)
    dense = x.is_contiguous() or (like.rows and layouts.dense(x, True).stride() == x.stride())
    if dense:
        assert found is not None
    if found is not None:
        rows, n, c, s, outer, inner = found
        assert layouts.Layout(rows, n, c, s) == like
        expected = layouts.strides(x, rows)  # of an axis of size 1 any stride will do
        assert outer == expected[0] or (n if not rows else n * s) == 1
        assert inner == expected[1] or c == 1
        assert layouts.output_strides(x, rows) == x.stride()


def test_layouts_that_must_be_declined() -> None:
    """Gaps, overlaps, other orders and nothing at all."""
    for shape, stride in (
        ((2, 3, 4, 4), (96, 16, 4, 1)),
        ((2, 3, 4, 4), (0, 16, 4, 1)),
        ((2, 3, 4, 4), (48, 16, 1, 4)),
        ((2, 3, 4, 4), (96, 2, 24, 6)),
        ((4, 3), (6, 1)),
        ((4, 3), (1, 4)),
        ((0, 3, 4, 4), (48, 16, 4, 1)),
        ((2, 0, 4, 4), (0, 16, 4, 1)),
    ):
        assert native.dense_layout(shape, stride) is None, (shape, stride)


# ------------------------------------------------------------------------------------------------- same door


def arguments_of(call: dict[str, object]) -> list[object]:
    names = ("input", "weight", "bias", "residual", "running_mean", "running_var", "num_batches_tracked", "training")
    return [call[name] for name in (*names, "momentum", "eps", "act")]


class Subclass(Tensor):
    pass


@needs_exchange
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_door_is_the_same(precision: Precision, layout: str, training: bool) -> None:
    """``usual`` in C++ says what ``_usual`` says in Python, of good calls and of every malformed one."""
    good = good_arguments(precision, layout, training)
    assert native.usual(*arguments_of(good)) is functional._usual(*arguments_of(good)) is True
    for name in ("weight", "bias", "residual", "num_batches_tracked", "act"):
        assert native.usual(*arguments_of(good | {name: None}))
    for eps in (0.0, -0.0):  # accepted in eval mode alone
        call = arguments_of(good | {"eps": eps})
        assert native.usual(*call) is functional._usual(*call) is (not training)
    parameters = good | {name: torch.nn.Parameter(good[name]) for name in ("input", "weight", "bias")}
    assert native.usual(*arguments_of(parameters))
    odd = [(name, value) for name, value, _ in bad_arguments(good)]
    for name in ("input", "weight", "bias", "residual", "running_mean", "running_var"):
        tensor = good[name]
        odd += [(name, tensor.as_subclass(Subclass)), (name, torch._neg_view(tensor))]
        odd += [(name, torch._efficientzerotensor(tensor.shape, dtype=tensor.dtype))]
    odd += [("momentum", None), ("momentum", 1), ("eps", 0), ("input", good["input"][:0])]
    odd.append(("residual", LAYOUTS["contiguous" if layout == "channels_last" else "channels_last"](good["residual"])))
    for name, value in odd:
        call = arguments_of(good | {name: value})
        if isinstance(call[0], Tensor):
            assert native.usual(*call) is functional._usual(*call) is False, f"{name}={value!r}"
        else:
            assert native.usual(*call) is False
    assert good["input"].numel()


@needs_exchange
def test_the_door_of_one_value_per_channel() -> None:
    for shape, expected in (((1, 3), False), ((1, 3, 1, 1), False), ((1, 3, 2), True), ((2, 3), True)):
        call = [torch.randn(shape), *[None] * 6, True, 0.1, 1e-5, None]
        assert native.usual(*call) is functional._usual(*call) is expected


@needs_exchange
def test_the_door_with_a_tensor_of_a_transform() -> None:
    """Tensors of vmap and grad have no memory of their own: declined, while they live and after."""
    seen = []

    def look(x: Tensor) -> Tensor:
        seen.append(x)
        assert not native.usual(x, *[None] * 6, True, 0.1, 1e-5, None)
        assert native.forward(x, *[None] * 6, True, 0.1, 1e-5, None, False, None, 1) is None
        return x.sum()

    torch.vmap(look)(torch.randn(2, 4, 3))
    torch.func.grad(look)(torch.randn(4, 3))
    for x in seen:
        assert not native.usual(x, *[None] * 6, True, 0.1, 1e-5, None)
    x = torch.randn(4, 3)
    torch.func.grad(lambda t: seen.append(t) or t.sum())(x)
    torch.testing.assert_close(
        bnkern.batch_norm(seen[-1], None, None, training=True), bnkern.batch_norm(x, None, None, training=True)
    )


# --------------------------------------------------------------------------- what lies in memory is not the value


@pytest.mark.parametrize("way", ["native", "python"])
@pytest.mark.parametrize("which", range(6), ids=["x", "weight", "bias", "residual", "running_mean", "running_var"])
def test_lazy_negation(which: int, way: str, request: pytest.FixtureRequest) -> None:
    """A view that negates (the imaginary part of a conjugate) is read with its sign, wherever it is an argument."""
    if way == "python":
        request.getfixturevalue("in_python")
    generator = torch.Generator().manual_seed(which)
    shapes = [(4, 3, 5, 5), (3,), (3,), (4, 3, 5, 5), (3,), (3,)]
    values = [torch.rand(shape, generator=generator) + 0.5 for shape in shapes]
    results = []
    for lazy in (False, True):
        tensors = [v.clone() for v in values]
        if lazy:
            tensors[which] = torch._neg_view(-tensors[which])
            assert tensors[which].is_neg()
        x, weight, bias, residual, running_mean, running_var = tensors
        leaves = [x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), residual.requires_grad_()]
        y = bnkern.batch_norm(x, running_mean, running_var, weight, bias, True, residual=residual, act="relu")
        results.append([y, *torch.autograd.grad(y.square().sum(), leaves), running_mean, running_var])
    # Not the same bits: through the op a view may be copied to another dense layout first.
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one.detach(), other.detach().resolve_neg(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("way", ["native", "python"])
def test_lazily_negated_and_batched_gradients(way: str, request: pytest.FixtureRequest) -> None:
    """A gradient that arrives negated, or as many at once (``is_grads_batched``, as jacobian(vectorize=True) makes)."""
    if way == "python":
        request.getfixturevalue("in_python")
    x = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    dys = torch.randn(2, 4, 3, 5, 5, generator=torch.Generator().manual_seed(1))
    y = bnkern.batch_norm(x, None, None, training=True, act="relu")
    one_by_one = [torch.autograd.grad(y, x, dy, retain_graph=True)[0] for dy in dys]
    assert torch.equal(torch.autograd.grad(y, x, torch._neg_view(-dys[0]), retain_graph=True)[0], one_by_one[0])
    batched = torch.autograd.grad(y, x, dys, is_grads_batched=True)[0]
    # The reference formula against the kernels: float32 sums of 100 values in another order.
    torch.testing.assert_close(batched, torch.stack(one_by_one), rtol=1e-5, atol=1e-6)


def test_zeros_that_were_never_stored() -> None:
    """A tensor without memory that stands for zeros, as forward mode makes, is a batch of zeros."""
    y = bnkern.batch_norm(torch._efficientzerotensor(4, 3), None, None, training=True)
    assert torch.equal(y + 0, torch.zeros(4, 3))
