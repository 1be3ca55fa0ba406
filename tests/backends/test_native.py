"""The functions of the native module (csrc/call): the operands that they accept, and equal bits on every path."""

import ctypes
import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import bnkern
from bnkern.backends import layout as layouts
from bnkern.backends.activations import ACTIVATIONS
from bnkern.backends.calls import BackwardCall, ForwardCall
from tests import ROOT
from tests.support.arguments import bad_arguments, good_arguments
from tests.support.cases import BF16, CASE, CASES, FP32, FP64, LAYOUTS, Case, Precision

native = pytest.importorskip("bnkern.backends.native")
cpu = pytest.importorskip("bnkern.backends.cpu")
_native = native._native

needs_table = pytest.mark.skipif(not native.READS_TABLE, reason="this torch has no exchange table of DLPack")


def reconnected(monkeypatch: pytest.MonkeyPatch, table: object) -> bool:
    """Connects the native module to ``table``. Returns whether it reads tensors through it."""
    monkeypatch.setattr(native, "exchange_table", table)
    return _native.connect(native)


@pytest.fixture
def in_python(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Reads tensors by their attributes, as with a torch that has no exchange table."""
    assert not reconnected(monkeypatch, None)
    yield
    monkeypatch.undo()
    _native.connect(native)


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the copying functions, in the order of their calls."""
    names: list[str] = []

    def spy(name: str, function: Callable) -> Callable:
        return lambda call: names.append(name) or function(call)

    for name in ("_readable_forward", "_readable_backward"):
        monkeypatch.setattr(native, name, spy(name, getattr(native, name)))
    return names


# ------------------------------------------------------------------------------------------------- same results


def call_all(case: Case, precision: Precision, training: bool, act: str | None, with_residual: bool) -> list[Tensor]:
    """Every result and gradient of one call, and the statistics that it wrote."""
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
    differentiated = leaves if with_residual else [x, weight, bias]
    return [y.detach(), *torch.autograd.grad(y, differentiated, p.dy.to(y.dtype)), *running]


ALL_ARGUMENTS = [
    arguments
    for arguments in itertools.product(CASES, (FP32, BF16, FP64), (True, False), (None, "relu"), (False, True))
    if 0 not in arguments[0].shape and arguments[0].shape[0] * torch.Size(arguments[0].shape[2:]).numel() > 1
]


def assert_same(actual: list[Tensor | None], expected: list[Tensor | None], label: object) -> None:
    for ours, theirs in zip(actual, expected, strict=True):
        assert (ours is None) == (theirs is None), label
        if ours is not None:
            assert ours.dtype is theirs.dtype and ours.stride() == theirs.stride(), label
            assert torch.equal(ours.isnan(), theirs.isnan()), label
            assert torch.equal(ours.nan_to_num(), theirs.nan_to_num()), label


@needs_table
def test_tensors_read_in_python_give_the_same_results(request: pytest.FixtureRequest) -> None:
    """All shared cases give the same bits and strides with the exchange table and without it."""
    sample = ALL_ARGUMENTS[:: max(len(ALL_ARGUMENTS) // 160, 1)]
    with_table = [call_all(*arguments) for arguments in sample]
    request.getfixturevalue("in_python")
    for arguments, expected in zip(sample, with_table, strict=True):
        assert_same(call_all(*arguments), expected, arguments)


@needs_table
def test_both_forms_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """A capsule and an address are accepted. Everything else is refused."""
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    offered = native.exchange_table
    address = offered if isinstance(offered, int) else get(offered, b"dlpack_exchange_api")
    expected = call_all(*ALL_ARGUMENTS[0])
    try:
        for table, accepted in ((address, True), (offered, True), (0, False), (None, False), ("table", False)):
            assert reconnected(monkeypatch, table) == accepted
            assert_same(call_all(*ALL_ARGUMENTS[0]), expected, table)
    finally:
        monkeypatch.undo()
        _native.connect(native)


def test_views_are_read_in_place(copies: list[str]) -> None:
    """A tensor that two strides describe is not copied, except rows with gaps whose channels are no multiple of 16."""
    read = set()
    for case in (case for case in CASES if 0 not in case.shape):
        del copies[:]
        x = case.problem(FP32).x
        x_layout = layouts.layout(x)
        if x_layout.count == 1:
            continue
        cpu.forward(ForwardCall(x, training=True))
        result = layouts.strides(x, x_layout.rows)
        narrow = x_layout.rows and x_layout.c % 16 and result is not None and result[0] != x_layout.c
        assert copies == ["_readable_forward"] * (result is None or narrow), case
        read.add((x.is_contiguous() or layouts.dense(x, True).stride() == x.stride(), not copies))
    assert {(True, True), (False, True), (False, False)} <= read


@pytest.mark.parametrize("needs", list(itertools.product((True, False), repeat=4)), ids=str)
def test_gradients_where_needed(needs: tuple[bool, ...]) -> None:
    """Each gradient is the same if others are not needed, in training and in eval mode."""
    p = CASE["nchw_tail"].problem(FP32)
    x, residual, dy = (t.contiguous() for t in (p.x, p.residual, p.dy))
    for training, act in itertools.product((True, False), ("relu", None)):
        running = (None, None) if training else (p.mean, p.invstd**-2)
        call = ForwardCall(x, p.weight, p.bias, residual, *running, None, training, 0.1, 1e-5, act, True)
        _, *saved = cpu.forward(call)
        backward = BackwardCall(dy, x, p.weight, p.bias, *saved, act, training)
        every, result = cpu.backward(backward), cpu.backward(backward._replace(needs=needs))
        assert_same(result, [grad if need else None for grad, need in zip(every, needs, strict=True)], needs)


def test_small_and_large_results() -> None:
    """Memory is aligned, outlives the call, and returns to the pool if it came from the pool."""
    cpu.release_memory()
    for size in (4, 256):
        x = torch.randn(2, 16, size, size)
        y = cpu.forward(ForwardCall(x))[0]
        expected = y.clone()
        assert y.data_ptr() % 64 == 0
        for _ in range(3):
            cpu.forward(ForwardCall(-x))
        assert torch.equal(y, expected)
        idle = _native.pool_idle()
        del y
        assert (_native.pool_idle() > idle) == (size == 256)


def test_without_the_exchange_table() -> None:
    """A torch without an exchange table."""
    code = """
import torch
torch.Tensor.__dlpack_c_exchange_api__ = None
import bnkern
from bnkern.backends import native
assert not native.READS_TABLE
torch.manual_seed(0)
bn, bt = bnkern.nn.BatchNorm2d(3, act="relu"), torch.nn.BatchNorm2d(3)
x, r = torch.randn(2, 4, 3, 5, 5, requires_grad=True)
y = bn(x, r)
torch.testing.assert_close(y, torch.relu(bt(x) + r))
y.square().sum().backward()
torch.testing.assert_close(bn.running_var, bt.running_var)
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert process.returncode == 0, process.stderr


# ------------------------------------------------------------------------------------------------- calls by type


def test_fields_are_mirrored() -> None:
    assert _native.fields() == (ForwardCall._fields, BackwardCall._fields, tuple(ACTIVATIONS))


def test_wrong_types_are_errors() -> None:
    """A tuple of the right length, the other kind of call, and swapped arguments are refused."""
    x, v = torch.randn(4, 3), torch.ones(3)
    forward, backward = ForwardCall(x), BackwardCall(x, x, v, v, v, v)
    for function, arguments in (
        (_native.forward, (tuple(forward), True)),
        (_native.forward, (backward, True)),
        (_native.forward, (True, forward)),
        (_native.forward, (forward,)),
        (_native.backward, (forward,)),
        (_native.backward, (tuple(backward),)),
        (_native.backward, (backward._replace(needs=True),)),
        (_native.backward, (backward._replace(needs=(True,) * 3),)),
        (_native.normalize, (v, forward, v)),
        (_native.grad_sums, (x,)),
        (_native.grad_input, (v, backward, v)),
        (_native.conv3x3, (torch.ones(16, 16, 3, 3), x, False)),
        (_native.conv3x3, (torch.ones(1, 16, 8, 8), torch.ones(16, 32, 3, 3), False)),
        (_native.augment, (x,) * 9),
    ):
        with pytest.raises(TypeError):
            function(*arguments)


def test_invalid_operands_are_declined() -> None:
    """If one operand of a valid call is invalid, the result is None, because the kernels would read invalid memory."""
    x, v = torch.randn(4, 3, 5, 5), torch.ones(3)
    record, mask = torch.zeros(9, 3, dtype=torch.float64), torch.zeros(4, 3, 4, dtype=torch.uint8)
    forward = ForwardCall(x, v, v, x, v.clone(), v.clone(), torch.tensor(0), True, 0.1, 1e-5, "relu", True, record)
    backward = BackwardCall(x, x, v, v, v, v, mask, "relu", True, (True,) * 4, record[:8], record[:8])
    assert _native.forward(forward, True) is not None and _native.backward(backward) is not None
    wrong_vectors = (torch.ones(4), torch.ones(1, 3), v.double(), v.int(), torch.ones(6)[::2], v.to("meta"), 1.0, "v")
    wrong_images = (x[:3], x[0], x.double(), x.to_sparse(), x.to("meta"), torch.randn(4, 5, 3, 5).transpose(1, 2), 0)
    for name in ("weight", "bias", "running_mean", "running_var"):
        for wrong in wrong_vectors:
            assert _native.forward(forward._replace(**{name: wrong}), True) is None, (name, wrong)
    for name in ("x", "residual"):
        for wrong in wrong_images[0 if name == "residual" else 3 :]:
            assert _native.forward(forward._replace(**{name: wrong}), True) is None, (name, wrong)
    for name, wrong in (("num_batches_tracked", v), ("num_batches_tracked", torch.tensor([0, 1])), ("record", v)):
        assert _native.forward(forward._replace(**{name: wrong}), True) is None, (name, wrong)
    for name in ("weight", "bias", "mean", "invstd"):
        for wrong in wrong_vectors:
            if name in ("mean", "invstd") and isinstance(wrong, Tensor) and wrong.shape == (1, 3):
                continue  # the same number of elements, in another shape
            assert _native.backward(backward._replace(**{name: wrong})) is None, (name, wrong)
    for wrong in (None, *wrong_images):
        assert _native.backward(backward._replace(dy=wrong)) is None, wrong
    for name, wrong in (("mask", mask[:3]), ("mask", v), ("record_gradient", record), ("record_affine", record[:7])):
        assert _native.backward(backward._replace(**{name: wrong})) is None, (name, wrong)


# ------------------------------------------------------------------------------------------------- same layout


@st.composite
def strided(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Sizes, and strides that are dense in some permutation, or sometimes wrong in one axis."""
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
    """The native module computes the layout of ``layout.py``, and which results have the strides of the input."""
    shape, stride = tensor
    result = _native.view_layout(shape, stride)
    x = torch.empty_strided(shape, stride, device="meta")
    like = layouts.layout(x)
    expected = layouts.strides(x, like.rows)
    assert (result is None) == (expected is None)
    if result is not None:
        rows, n, c, s, outer, inner, keeps = result
        assert layouts.Layout(rows, n, c, s) == like
        # The stride of an axis of size 1 is arbitrary.
        assert outer == expected[0] or (n if not rows else n * s) == 1
        assert inner == expected[1] or c == 1
        dense = x.is_contiguous() or (like.rows and layouts.dense(x, True).stride() == x.stride())
        assert keeps or not dense
        assert not keeps or layouts.output_strides(x, rows) == x.stride()


# ---------------------------------------------------------------------------------------- calls without validation


def call_of(arguments: dict[str, object]) -> ForwardCall:
    names = ("input", "weight", "bias", "residual", "running_mean", "running_var", "num_batches_tracked", "training")
    return ForwardCall(*(arguments[name] for name in (*names, "momentum", "eps", "act")))


class Subclass(Tensor):
    pass


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_only_plainly_valid_calls_are_accepted(precision: Precision, layout: str, training: bool) -> None:
    good = good_arguments(precision, layout, training)

    def accepted(**changes: object) -> bool:
        return cpu.try_forward(call_of(good | changes)) is not None

    assert accepted()
    for name in ("weight", "bias", "residual", "num_batches_tracked", "act"):
        assert accepted(**{name: None}), name
    assert accepted(momentum=None)
    assert accepted(momentum=None, num_batches_tracked=None) == (not training)
    for eps in (0.0, -0.0):
        assert accepted(eps=eps) == (not training)
    assert accepted(**{name: torch.nn.Parameter(good[name]) for name in ("input", "weight", "bias")})
    other_format = LAYOUTS["contiguous" if layout == "channels_last" else "channels_last"]
    invalid = [(name, value) for name, value, _ in bad_arguments(good)]
    for name in ("input", "weight", "bias", "residual", "running_mean", "running_var"):
        tensor = good[name]
        invalid += [(name, tensor.as_subclass(Subclass)), (name, torch._neg_view(tensor))]
        invalid += [(name, torch._efficientzerotensor(tensor.shape, dtype=tensor.dtype))]
    invalid += [("momentum", 1), ("eps", 0), ("input", good["input"][:0]), ("residual", other_format(good["residual"]))]
    for name, value in invalid:
        assert not accepted(**{name: value}), f"{name}={value!r}"


def test_declined_calls_write_nothing() -> None:
    """If an argument after valid ones is invalid, the running statistics and the counter do not change."""
    for precision, layout in ((FP32, "contiguous"), (BF16, "channels_last")):
        good = good_arguments(precision, layout, True)
        state = [good[name] for name in ("running_mean", "running_var", "num_batches_tracked")]
        before = [t.clone() for t in state]
        for name, value, _ in bad_arguments(good):
            assert cpu.try_forward(call_of(good | {name: value})) is None
        assert all(map(torch.equal, state, before))


def test_one_value_per_channel() -> None:
    for shape, expected in (((1, 3), False), ((1, 3, 1, 1), False), ((1, 3, 2), True), ((2, 3), True)):
        assert (cpu.try_forward(ForwardCall(torch.randn(shape))) is not None) == expected


def test_tensors_of_a_transform() -> None:
    """Tensors of vmap and grad have no memory. They are declined during the transform and after it."""
    recorded = []

    def check_declined(x: Tensor) -> Tensor:
        recorded.append(x)
        assert cpu.try_forward(ForwardCall(x)) is None and _native.forward(ForwardCall(x), True) is None
        return x.sum()

    torch.vmap(check_declined)(torch.randn(2, 4, 3))
    torch.func.grad(check_declined)(torch.randn(4, 3))
    for x in recorded:
        assert cpu.try_forward(ForwardCall(x)) is None
    x = torch.randn(4, 3)
    torch.func.grad(lambda t: recorded.append(t) or t.sum())(x)
    torch.testing.assert_close(
        bnkern.batch_norm(recorded[-1], None, None, training=True), bnkern.batch_norm(x, None, None, training=True)
    )


def test_subclasses_without_a_dispatch_of_their_own() -> None:
    """Such subclasses reach the kernels through the operator, as plain tensors."""
    x, running = torch.randn(8, 3), [torch.zeros(3), torch.ones(3)]
    y = bnkern.batch_norm(x.as_subclass(Subclass), *(t.as_subclass(Subclass) for t in running), training=True)
    expected = [torch.zeros(3), torch.ones(3)]
    assert torch.equal(y.as_subclass(Tensor), bnkern.batch_norm(x, *expected, training=True))
    assert all(map(torch.equal, running, expected))


def test_moments_of_a_lazily_negated_tensor() -> None:
    x = torch.rand(8, 3) + 1
    assert torch.equal(bnkern.channel_moments(torch._neg_view(x)).mean, bnkern.channel_moments(-x).mean)


# -------------------------------------------------------------------- values that differ from the bytes in memory


@pytest.mark.parametrize("reader", ["native", "python"])
@pytest.mark.parametrize("index", range(6), ids=["x", "weight", "bias", "residual", "running_mean", "running_var"])
def test_lazy_negation(index: int, reader: str, request: pytest.FixtureRequest) -> None:
    """A view with a lazy negation (the imaginary part of a conjugate) is read with its sign, for every argument."""
    if reader == "python":
        request.getfixturevalue("in_python")
    generator = torch.Generator().manual_seed(index)
    shapes = [(4, 3, 5, 5), (3,), (3,), (4, 3, 5, 5), (3,), (3,)]
    values = [torch.rand(shape, generator=generator) + 0.5 for shape in shapes]
    results = []
    for lazy in (False, True):
        tensors = [v.clone() for v in values]
        if lazy:
            tensors[index] = torch._neg_view(-tensors[index])
            assert tensors[index].is_neg()
        x, weight, bias, residual, running_mean, running_var = tensors
        leaves = [x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), residual.requires_grad_()]
        y = bnkern.batch_norm(x, running_mean, running_var, weight, bias, True, residual=residual, act="relu")
        results.append([y, *torch.autograd.grad(y.square().sum(), leaves), running_mean, running_var])
    # The bits may differ, because the operator may first copy a view to another dense layout.
    for plain, negated in zip(*results, strict=True):
        torch.testing.assert_close(plain.detach(), negated.detach().resolve_neg(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reader", ["native", "python"])
def test_lazily_negated_and_batched_gradients(reader: str, request: pytest.FixtureRequest) -> None:
    """A gradient may be lazily negated, or batched (``is_grads_batched``, as in jacobian(vectorize=True))."""
    if reader == "python":
        request.getfixturevalue("in_python")
    x = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    dys = torch.randn(2, 4, 3, 5, 5, generator=torch.Generator().manual_seed(1))
    y = bnkern.batch_norm(x, None, None, training=True, act="relu")
    one_by_one = [torch.autograd.grad(y, x, dy, retain_graph=True)[0] for dy in dys]
    assert torch.equal(torch.autograd.grad(y, x, torch._neg_view(-dys[0]), retain_graph=True)[0], one_by_one[0])
    batched = torch.autograd.grad(y, x, dys, is_grads_batched=True)[0]
    # The reference formula and the kernels add 100 float32 values in different orders.
    torch.testing.assert_close(batched, torch.stack(one_by_one), rtol=1e-5, atol=1e-6)


def test_tensors_of_zeros_without_memory() -> None:
    """A tensor without memory that represents zeros, as forward mode makes, is a batch of zeros."""
    y = bnkern.batch_norm(torch._efficientzerotensor(4, 3), None, None, training=True)
    assert torch.equal(y + 0, torch.zeros(4, 3))
