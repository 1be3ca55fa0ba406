"""The operator under torch's tracers: compile, export, fake and meta tensors, make_fx, opcheck and torch.func."""

import copy
import inspect
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import bnkern
from bnkern import backends
from bnkern.backends.calls import BackwardCall, ForwardCall
from bnkern.backends.layout import layout
from bnkern.norm import context
from tests.support.cases import BF16, CASE, CASES, EPS, FEW, FP32, FP64, Case, Problem, Target

FORWARD = torch.ops.bnkern.batch_norm_forward.default
BACKWARD = torch.ops.bnkern.batch_norm_backward.default


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def arguments(p: Problem, mode: str, act: str | None, with_residual: bool) -> tuple:
    """The arguments of the forward operator. The mode is training, untracked, eval or identity."""
    tracked = mode in ("training", "eval")
    running = [p.mean.to(p.weight.dtype), (p.invstd**-2).to(p.weight.dtype)] if tracked else [None, None]
    counter, skipped = torch.tensor([3, 2], device=p.x.device).unbind() if mode == "training" else (None, None)
    affine = (None, None) if mode == "identity" else (p.weight, p.bias)
    residual = p.residual if with_residual else None
    training = mode in ("training", "untracked")
    momentum = None if mode == "training" else 0.1
    settings = (training, momentum, EPS, act, True)
    return (p.x, *affine, residual, *running, counter, *settings, skipped, None, backends.forced())


def requiring_grad(args: tuple) -> tuple:
    """Input, weight, bias and residual as leaves that require grad."""
    return (*(t if t is None else t.detach().requires_grad_() for t in args[:4]), *args[4:])


EACH_MODE = pytest.mark.parametrize("mode", ["training", "untracked", "eval", "identity"])
FUSED = pytest.mark.parametrize(
    ("act", "with_residual"),
    [(None, False), ("relu", False), (None, True), ("relu", True)],
    ids=["plain", "relu", "add", "add_relu"],
)


# ------------------------------------------------------------------------------------------------------------ ops


def or_none(t: Tensor) -> Tensor | None:
    """The results of the operator in the form that its backward takes."""
    return t if t.numel() else None


@pytest.mark.parametrize("case", [CASE["nhwc_c5_s49"], CASE["sliced_channels"]], ids=str)
@FUSED
def test_opcheck(target: Target, case: Case, act: str | None, with_residual: bool) -> None:
    for mode in ("training", "eval", "identity"):
        args = requiring_grad(arguments(case.problem(FP32, target.device), mode, act, with_residual))
        torch.library.opcheck(FORWARD, args)


@FUSED
def test_opcheck_of_the_backward(target: Target, act: str | None, with_residual: bool) -> None:
    for mode in ("training", "eval", "identity"):
        p = CASE["nhwc_c5_s49"].problem(BF16, target.device)
        args = arguments(p, mode, act, with_residual)
        _, mean, invstd, mask, *_ = FORWARD(*args)
        x, weight, bias = args[:3]
        for needs in ((True, weight is not None, bias is not None, with_residual), (False, False, False, True)):
            saved = (x, weight, bias, *map(or_none, (mean, invstd, mask)))
            torch.library.opcheck(BACKWARD, (p.dy, *saved, act, args[7], list(needs), None, args[-1]))


@FUSED
def test_opcheck_of_ops_that_record(target: Target, act: str | None, with_residual: bool) -> None:
    p = CASE["nhwc_c5_s49"].problem(BF16, target.device)
    for mode in ("training", "eval", "identity"):
        args = arguments(p, mode, act, with_residual)
        torch.library.opcheck(FORWARD, (*requiring_grad(args), "", 1, True))
        _, mean, invstd, mask, *_ = FORWARD(*args)
        x, weight, bias = args[:3]
        needs = [True, weight is not None, bias is not None, with_residual]
        affine = mode != "identity"
        saved = (x, weight, bias, *map(or_none, (mean, invstd, mask)))
        settings = (act, args[7], needs, None, args[-1], "", None)
        torch.library.opcheck(BACKWARD, (p.dy, *saved, *settings, True, affine, affine))


@pytest.mark.parametrize("mode", ["training", "identity"])
@pytest.mark.parametrize(("act", "with_residual"), [(None, False), ("relu", True)], ids=["plain", "add_relu"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_fake_results_match_real_ones(
    target: Target, case: Case, mode: str, act: str | None, with_residual: bool
) -> None:
    """Fake tensors have the shapes, dtypes and strides of all real results of both operators."""
    args = arguments(case.problem(BF16, target.device), mode, act, with_residual)
    needs = [True, args[1] is not None, args[2] is not None, with_residual]
    dy = torch.ones(args[0].shape, dtype=args[0].dtype, device=target.device)

    def run_both(*args: object) -> list[Tensor]:
        y, mean, invstd, mask, *running = FORWARD(*args[:-1])
        saved = (*args[:3], *map(or_none, (mean, invstd, mask)))
        backward = (args[-1], *saved, args[10], args[7], needs, None, args[-2])
        return [y, mean, invstd, mask, *running, *BACKWARD(*backward)]

    fake_mode = FakeTensorMode()
    fake = [fake_mode.from_tensor(a) if isinstance(a, Tensor) else a for a in (*args, dy)]
    with fake_mode:
        predicted = run_both(*fake)
    for real, fake_result in zip(run_both(*args, dy), predicted, strict=True):
        assert (real.shape, real.dtype, real.stride()) == (fake_result.shape, fake_result.dtype, fake_result.stride())


@EACH_MODE
@FUSED
@pytest.mark.parametrize("case", FEW, ids=str)
def test_op_equals_direct_call(target: Target, case: Case, mode: str, act: str | None, with_residual: bool) -> None:
    """The operator returns the new statistics and does not write them.

    The other results have the bits of the direct call.
    """
    args = requiring_grad(arguments(case.problem(FP32, target.device), mode, act, with_residual))
    leaves = [t for t in args[:4] if t is not None]
    running = (*args[4:7], args[12])
    before = copy.deepcopy([None if t is None else t.detach() for t in running])
    y, mean, invstd, mask, *new, count, activation = FORWARD(*args)
    assert count.numel() == activation.numel() == 0
    for old, untouched in zip(before, running, strict=True):
        assert old is None or torch.equal(old, untouched)
    kernels = backends.choose(target.backend, target.device, torch.float32)
    direct = kernels.forward(
        ForwardCall(
            *(t.detach() if isinstance(t, Tensor) else t for t in args[:4]),
            *before[:3],
            *args[7:12],
            num_batches_skipped=before[3],
        )
    )
    for actual, expected in zip((y, mean, invstd, mask), direct, strict=True):
        assert torch.equal(actual, expected) if expected is not None else actual.numel() == 0
    for actual, expected in zip(new, before, strict=True):
        assert torch.equal(actual, expected) if expected is not None and args[7] else actual.numel() == 0
    dy = torch.ones_like(y)
    needs = tuple(t is not None for t in args[:4])
    direct = kernels.backward(
        BackwardCall(dy, *(None if t is None else t.detach() for t in args[:3]), *direct[1:], act, args[7], needs)
    )
    for actual, expected in zip(
        torch.autograd.grad(y, leaves, dy), [g for g, n in zip(direct, needs, strict=True) if n], strict=True
    ):
        assert torch.equal(actual, expected)


# ------------------------------------------------------------------------------------------- operator or direct call


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch, target: Target) -> list[bool]:
    """A True for each call of the operator's implementation, and a False for each call of a backend outside of it."""
    calls: list[bool] = []
    module = backends.choose(target.backend, target.device, torch.float32)

    def spy_on(name: str) -> None:
        original = getattr(module, name)

        def spied(call: ForwardCall) -> object:
            calls.append(any(frame.function == "_forward" for frame in inspect.stack()[1:3]))
            return original(call)

        monkeypatch.setattr(module, name, spied)

    for name in ("forward", "try_forward"):
        if hasattr(module, name):
            spy_on(name)
    return calls


class Recording(TorchDispatchMode):
    """Lists the operators that are dispatched in the context."""

    def __init__(self) -> None:
        super().__init__()
        self.recorded: list[object] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.recorded.append(func)
        return func(*args, **(kwargs or {}))


def test_plain_eager_calls_the_launcher(target: Target, launches: list[bool]) -> None:
    p = CASE["nc"].problem(FP32, target.device)
    bnkern.batch_norm(p.x, None, None, nn.Parameter(p.weight), training=True)
    bnkern.nn.BatchNorm1d(17, device=target.device)(p.x)
    assert launches == [False, False]


def test_dispatch_mode_receives_the_op(target: Target) -> None:
    p = CASE["nc"].problem(FP32, target.device)
    x, running = p.x.requires_grad_(), [torch.zeros_like(p.mean), torch.ones_like(p.mean)]
    expected_running = [t.clone() for t in running]
    with Recording() as mode:
        y = bnkern.batch_norm(x, *running, training=True, act="relu")
        (dx,) = torch.autograd.grad(y, x, p.dy)
    assert FORWARD in mode.recorded and BACKWARD in mode.recorded
    z = bnkern.batch_norm(x, *expected_running, training=True, act="relu")
    assert torch.equal(y, z) and torch.equal(dx, *torch.autograd.grad(z, x, p.dy))
    assert all(map(torch.equal, running, expected_running))


def test_function_mode_receives_the_op(target: Target) -> None:
    recorded = []

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            recorded.append(func)
            return func(*args, **(kwargs or {}))

    with Mode():
        bnkern.batch_norm(CASE["nc"].problem(FP32, target.device).x, None, None, training=True)
    assert torch.ops.bnkern.batch_norm_forward in recorded


class Labelled(torch.Tensor):
    """A subclass whose default __torch_function__ keeps the class."""


def test_subclass_goes_through_the_op(target: Target, launches: list[bool]) -> None:
    x = CASE["nc"].problem(FP32, target.device).x
    y = bnkern.batch_norm(x.as_subclass(Labelled), None, None, training=True)
    assert type(y) is Labelled
    assert torch.equal(y.as_subclass(Tensor), bnkern.batch_norm(x, None, None, training=True))
    assert launches == [True, False]


# ------------------------------------------------------------------------------------------- tensors without values


@pytest.mark.parametrize("kind", ["fake", "meta"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@FUSED
def test_without_values(target: Target, kind: str, training: bool, act: str | None, with_residual: bool) -> None:
    """A module runs forward and backward on tensors without memory, with the strides of real ones."""
    x = CASE["nhwc_c5_s49"].problem(FP32, target.device).x
    bn = bnkern.nn.BatchNorm2d(5, act=act, momentum=None, device=target.device).train(training)
    if kind == "meta":
        mode, x, bn = warnings.catch_warnings(), x.to("meta"), bn.to("meta")
    else:
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        x = mode.from_tensor(x)
    x.requires_grad_()
    with mode:
        y = bn(x, torch.empty_like(x) if with_residual else None)
        y.sum().backward()
    for t in (y, x.grad):
        assert (t.shape, t.stride(), t.device) == (x.shape, x.stride(), x.device)
    assert bn.weight.grad.shape == (5,)


# ------------------------------------------------------------------------------------------------ compile and export


class Block(nn.Module):
    """A residual block with both fused forms."""

    def __init__(self, momentum: float | None = 0.1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.first = bnkern.nn.BatchNorm2d(4, momentum=momentum, act="relu")
        self.last = bnkern.nn.BatchNorm2d(4, momentum=momentum, act="relu")

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.conv(self.first(x)), x)


def block(device: str, **arguments: object) -> tuple[Block, Tensor]:
    torch.manual_seed(0)
    model = Block(**arguments).to(device, memory_format=torch.channels_last)
    return model, torch.randn(4, 4, 6, 5).to(device, memory_format=torch.channels_last)


def steps(model: nn.Module, call: Callable, x: Tensor, count: int = 3) -> list[Tensor]:
    """Training steps and one step in eval mode: outputs, gradients, state."""
    results = []
    for k in range(count):
        leaf = (x + k).detach().requires_grad_()
        model.train(k < count - 1)
        y = call(leaf)
        y.square().sum().backward()
        results += [y.detach(), leaf.grad]
    return results + [p.grad for p in model.parameters()] + list(model.state_dict().values())


def assert_equal(results: list[Tensor], references: list[Tensor], exactly: bool = True) -> None:
    for actual, expected in zip(results, references, strict=True):
        assert actual.stride() == expected.stride()
        if exactly:
            assert torch.equal(actual, expected)
        else:
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("momentum", [0.1, None], ids=["momentum", "cumulative"])
def test_compile_equals_eager(target: Target, momentum: float | None) -> None:
    """Without a graph break outputs, gradients and running statistics have the same bits."""
    (eager, x), (model, _) = block(target.device, momentum=momentum), block(target.device, momentum=momentum)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_equal(steps(model, compiled, x), steps(eager, eager, x))


def test_compile_with_inductor(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")  # Inductor then checks operators that have a decomposition more strictly
    (eager, x), (model, _) = block(target.device), block(target.device)
    compiled = torch.compile(model, fullgraph=True)
    assert_equal(steps(model, compiled, x, count=2), steps(eager, eager, x, count=2), exactly=False)


def test_compile_keeps_the_forced_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """The name of the forced backend is stored in the graph, for forward and backward."""
    model, x = block("cpu")
    names = []
    original = backends.choose
    monkeypatch.setattr(backends, "choose", lambda name, *rest: (names.append(name), original(name, *rest))[1])
    with bnkern.use_backend("reference"):
        y = torch.compile(model, backend="aot_eager", fullgraph=True)(x.requires_grad_())
    names.clear()
    y.sum().backward()
    assert names == ["reference"] * 2


def test_compile_a_function_with_buffers(target: Target) -> None:
    """batch_norm itself, with statistics, a counter, and momentum None."""
    p = CASE["nhwc"].problem(FP32, target.device)

    def call(x: Tensor, mean: Tensor, var: Tensor, counter: Tensor) -> Tensor:
        return bnkern.batch_norm(x, mean, var, training=True, momentum=None, num_batches_tracked=counter).relu()

    results = []
    for function in (call, torch.compile(call, backend="aot_eager", fullgraph=True)):
        state = [torch.zeros_like(p.mean), torch.ones_like(p.mean), torch.tensor(1, device=target.device)]
        results.append([function(p.x, *state), *state])
    assert_equal(*results)


def test_one_graph_for_many_batches(target: Target) -> None:
    """Later batch sizes share one dynamic graph. Later values of the counter need no new graph."""
    model, x = block(target.device, momentum=None)
    compiled_graphs = []

    def compiler(graph: torch.fx.GraphModule, _: list) -> Callable:
        compiled_graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=compiler, fullgraph=True)
    for n in (4, 4, 4, 6, 7, 9, 12):
        compiled(x[:1].repeat(n, 1, 1, 1).contiguous(memory_format=torch.channels_last))
    assert len(compiled_graphs) == 2
    assert model.first.num_batches_tracked.item() == 7


def test_bad_input_raises_under_compile(target: Target) -> None:
    function = torch.compile(lambda x, r: bnkern.add_act(x, r), backend="aot_eager")
    with pytest.raises(ValueError, match="residual must have the shape of input"):
        function(torch.ones(2, 3, device=target.device), torch.ones(2, 4, device=target.device))


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_export(target: Target, strict: bool, training: bool) -> None:
    """The exported program contains the operator, and has the same values and statistics."""
    (eager, x), (model, _) = block(target.device), block(target.device)
    program = torch.export.export(model.train(training), (x,), strict=strict)
    results = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert results.count(FORWARD) == 2
    module = program.module()
    assert torch.equal(module(x + 1), eager.train(training)(x + 1))
    state = module.state_dict()
    assert {"first.running_mean", "last.running_var"} <= set(state)
    for key, value in state.items():
        assert torch.equal(value, eager.state_dict()[key]), key


def test_export_with_a_dynamic_batch(target: Target) -> None:
    model, x = block(target.device)
    model.eval()
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("n", min=2)},), strict=False)
    y = torch.cat([x, x, x])
    assert torch.equal(program.module()(y), model(y))


@pytest.mark.parametrize("tracing_mode", ["real", "fake", "symbolic"])
def test_make_fx(target: Target, tracing_mode: str) -> None:
    p = CASE["nhwc_c5_s49"].problem(FP32, target.device)

    def call(x: Tensor, residual: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
        x = x.detach().requires_grad_()
        y = bnkern.batch_norm(x, None, None, training=True, residual=residual, act="relu")
        return y.detach(), *torch.autograd.grad(y, x, dy)

    graph = make_fx(call, tracing_mode=tracing_mode)(p.x, p.residual, p.dy)
    results = [node.target for node in graph.graph.nodes]
    assert FORWARD in results and BACKWARD in results
    assert_equal(list(graph(p.x, p.residual, p.dy)), list(call(p.x, p.residual, p.dy)))


# ------------------------------------------------------------------------------------------------------- transforms


def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return bnkern.batch_norm(x, None, None, weight, bias, True, residual=x.sin(), act="relu").square()


def theirs(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return (F.batch_norm(x, None, None, weight, bias, True) + x.sin()).relu().square()


def _forward_mode(f: Callable, *args: Tensor) -> Tensor:
    with forward_ad.dual_level():
        y = f(*(forward_ad.make_dual(t, t.cos()) for t in args))
        return forward_ad.unpack_dual(y).tangent


TRANSFORMS: dict[str, Callable] = {
    "grad": lambda f, x, w, b: torch.func.grad(lambda *a: f(*a).sum(), argnums=(0, 1, 2))(x, w, b),
    "vjp": lambda f, x, w, b: torch.func.vjp(f, x, w, b)[1](x.cos()),
    "jvp": lambda f, x, w, b: torch.func.jvp(f, (x, w, b), (x.cos(), w.cos(), b.cos())),
    "forward_ad": lambda f, x, w, b: (_forward_mode(f, x, w, b),),
    "vmap": lambda f, x, w, b: (torch.vmap(f, (0, None, None))(torch.stack([x, 2 * x.cos()]), w, b),),
    "vmap(grad)": lambda f, x, w, b: torch.vmap(
        torch.func.grad(lambda *a: f(*a).sum(), argnums=(0, 1, 2)), (0, None, None)
    )(torch.stack([x, 2 * x.cos()]), w, b),
    "grad(vmap)": lambda f, x, w, b: (
        torch.func.grad(lambda xs: torch.vmap(f, (0, None, None))(xs, w, b).sum())(torch.stack([x, 2 * x.cos()])),
    ),
    "hessian": lambda f, x, w, b: (torch.func.hessian(lambda v: f(x, v, b).sum())(w),),
    "jacrev": lambda f, x, w, b: (torch.func.jacrev(lambda v: f(x, v, b))(w),),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("case", [Case("nchw_tiny", (3, 2, 3, 3), ""), Case("nc_tiny", (6, 3), "")], ids=str)
def test_functional_transforms(target: Target, transform: str, case: Case) -> None:
    """torch.func and forward-mode differentiation give the results of torch's batch norm."""
    p = case.problem(FP64, target.device)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")  # about torch's own batch norm under vmap
        results = [TRANSFORMS[transform](f, p.x, p.weight, p.bias) for f in (ours, theirs)]
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
    assert any(t.abs().max() > 0.1 for t in results[0])


def test_per_sample_gradients_of_a_frozen_module(target: Target) -> None:
    """vmap over functional_call in eval mode, as for per-sample gradients."""
    bn = bnkern.nn.BatchNorm2d(4, device=target.device, dtype=torch.float64).eval()
    xs = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(target.device)
    parameters = {k: v.detach() for k, v in bn.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(bn, parameters, x[None]).square().sum()

    per_sample = torch.vmap(torch.func.grad(loss), (None, 0))(parameters, xs)
    for k, x in enumerate(xs):
        bn.zero_grad()
        bn(x[None]).square().sum().backward()
        torch.testing.assert_close(per_sample["weight"][k], bn.weight.grad)
        torch.testing.assert_close(per_sample["bias"][k], bn.bias.grad)


def test_captured_statistics_refuse_to_change_under_grad(target: Target) -> None:
    """As in torch, statistics that are captured by a transform cannot be updated inside of it."""
    x, mean, var = torch.ones(4, 3, device=target.device).cumsum(0), *torch.ones(2, 3, device=target.device)
    with pytest.raises(RuntimeError, match="mutate a captured Tensor"):
        torch.func.grad(lambda x: bnkern.batch_norm(x, mean, var, training=True).sum())(x)
    assert mean.tolist() == var.tolist() == [1.0] * 3


def test_is_direct() -> None:
    x = torch.ones(2, 3)
    assert context.is_direct(x, None, nn.Parameter(x)) and not context.is_transformed()
    assert not context.is_direct(x.to("meta")) and not context.is_direct(x.as_subclass(Labelled))
    with FakeTensorMode() as mode:
        assert not context.is_direct(mode.from_tensor(x))
    with forward_ad.dual_level():
        assert not context.is_direct(x) and context.is_transformed()
    assert layout(x).rows and context.is_direct(x)
