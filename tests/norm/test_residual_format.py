"""Every function accepts a residual in another memory format than the input, as torch's addition does."""

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnkern
from bnkern import backends
from bnkern.backends import layout as layouts
from tests.support.cases import CASE, EPS, FP32, FP64, LAYOUTS, Case, Problem, Target
from tests.support.ranks import Ranks

FORWARD = torch.ops.bnkern.batch_norm_forward.default

OTHER = {"contiguous": "channels_last", "channels_last": "contiguous"}
FORMATS = pytest.mark.parametrize(
    "case",
    [CASE[name] for name in ("nchw", "nchw_s49", "ncl_s7", "ndhw", "nhwc", "nhwc_c5_s49", "nlc", "ndhwc")],
    ids=str,
)


def norm_in_training(x: Tensor, residual: Tensor, p: Problem, act: str | None) -> Tensor:
    return bnkern.batch_norm(x, None, None, p.weight, p.bias, True, residual=residual, act=act)


def norm_in_eval(x: Tensor, residual: Tensor, p: Problem, act: str | None) -> Tensor:
    return bnkern.batch_norm(x, p.mean, p.invstd**-2, p.weight, p.bias, residual=residual, act=act)


def addition(x: Tensor, residual: Tensor, p: Problem, act: str | None) -> Tensor:
    return bnkern.add_act(x, residual, act)


FUNCTIONS = pytest.mark.parametrize("function", [norm_in_training, norm_in_eval, addition], ids=lambda f: f.__name__)
EACH_ACT = pytest.mark.parametrize("act", [None, "relu"])


def layer_of(p: Problem, act: str | None) -> torch.nn.Module:
    kind = {3: "BatchNorm1d", 4: "BatchNorm2d", 5: "BatchNorm3d"}[p.x.dim()]
    return getattr(bnkern.nn, kind)(p.x.shape[1], act=act, device=p.x.device)


def outcome(function: Callable, x: Tensor, residual: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    """y, dx and the residual's gradient.

    The tensors are no leaves, so that only the function determines their layout.
    """
    x, residual = (t.detach().requires_grad_() for t in (x, residual))
    y = function(x, residual)
    return y.detach(), *torch.autograd.grad(y, (x, residual), dy)


@FORMATS
@FUNCTIONS
@EACH_ACT
def test_residual_in_the_other_format(target: Target, case: Case, function: Callable, act: str | None) -> None:
    """The results have the bits of a residual in the input's format. Its gradient has the format of the residual."""
    p = case.problem(FP32, target.device)
    other = LAYOUTS[OTHER[case.layout]](p.residual)
    expected = outcome(lambda x, r: function(x, r, p, act), p.x, p.residual, p.dy)
    result = outcome(lambda x, r: function(x, r, p, act), p.x, other, p.dy)
    for actual, expected_result in zip(result, expected, strict=True):
        assert torch.equal(actual, expected_result)
    y, dx, dresidual = result
    assert y.stride() == dx.stride() == p.x.stride()
    assert dresidual.stride() == other.stride() != p.x.stride()
    assert torch.equal(other, p.residual), "the call wrote to the residual"


@FORMATS
def test_modules_take_a_residual_in_the_other_format(target: Target, case: Case) -> None:
    p = case.problem(FP32, target.device)
    other = LAYOUTS[OTHER[case.layout]](p.residual)
    for module in (
        layer_of(p, "relu"),
        layer_of(p, None).eval(),
        bnkern.nn.Activation(),
        bnkern.nn.SyncBatchNorm(p.x.shape[1], act="relu", device=p.x.device),
    ):
        expected = outcome(module, p.x, p.residual, p.dy)
        result = outcome(module, p.x, other, p.dy)
        assert all(map(torch.equal, result, expected))
        assert result[2].stride() == other.stride()


@FORMATS
def test_second_derivatives_with_a_residual_in_the_other_format(target: Target, case: Case) -> None:
    """The double backward of the copied residual is the copy of the double backward."""
    p = case.problem(FP64, target.device)

    def second(residual: Tensor) -> tuple[Tensor, ...]:
        x, residual = (t.detach().requires_grad_() for t in (p.x, residual))
        y = bnkern.batch_norm(x, None, None, p.weight, p.bias, True, residual=residual.sin(), act="relu")
        first = torch.autograd.grad(y, (x, residual), p.dy, create_graph=True)
        return torch.autograd.grad(sum(t.square().sum() for t in first), (x, residual))

    for actual, expected_result in zip(
        second(LAYOUTS[OTHER[case.layout]](p.residual)), second(p.residual), strict=True
    ):
        torch.testing.assert_close(actual, expected_result, rtol=1e-12, atol=1e-12)


@FORMATS
def test_partial_residual_in_the_other_format(target: Target, case: Case) -> None:
    """For a slice of a wider tensor in the other format neither the residual nor its neighbours change."""
    p = case.problem(FP32, target.device)
    name = "sliced_channels" if case.layout == "channels_last" else "sliced_channels_last"
    view = LAYOUTS[name](p.residual)
    assert layouts.formats_conflict(p.x, view)
    expected = outcome(lambda x, r: norm_in_training(x, r, p, "relu"), p.x, p.residual, p.dy)
    result = outcome(lambda x, r: norm_in_training(x, r, p, "relu"), p.x, view, p.dy)
    assert all(map(torch.equal, result, expected))
    assert result[2].stride() == LAYOUTS[OTHER[case.layout]](p.residual).stride()


def test_residual_of_both_formats_at_once() -> None:
    """With one channel, or one position per channel, both formats are the same memory: nothing is copied or refused."""
    for shape in ((4, 1, 3, 5), (4, 6, 1, 1), (4, 6, 1), (4, 6)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        for a, b in ((x, LAYOUTS["channels_last"](x)), (LAYOUTS["channels_last"](x), x)):
            assert not layouts.formats_conflict(a, b)
            assert torch.equal(bnkern.add_act(a, b), (x + x).relu())


# ---------------------------------------------------------------------------------------- ops, compilers, transforms


@FORMATS
@EACH_ACT
def test_the_op_takes_either_format(target: Target, case: Case, act: str | None) -> None:
    """An exported program may get other formats than the traced ones. The operator accepts them, with the same bits."""
    p = case.problem(FP32, target.device)
    other = LAYOUTS[OTHER[case.layout]](p.residual)
    rest = (None, None, None, True, 0.1, EPS, act, True, None, None, backends.forced())
    result, expected = (FORWARD(p.x, p.weight, p.bias, r, *rest) for r in (other, p.residual))
    assert all(map(torch.equal, result, expected))
    torch.library.opcheck(FORWARD, (p.x.detach().requires_grad_(), p.weight, p.bias, other.requires_grad_(), *rest))


class Mixed(nn.Module):
    """A residual block whose skip path and trunk have different memory formats."""

    def __init__(self) -> None:
        super().__init__()
        # Without bias, because its gradient is zero in exact arithmetic, and its rounding depends on the order of the
        # sum.
        self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.bn = bnkern.nn.BatchNorm2d(4, act="relu")

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.bn(self.conv(x), skip)


def mixed(channels_last: bool) -> tuple[Mixed, Tensor, Tensor]:
    """The block, its input and the residual, in two different formats."""
    torch.manual_seed(0)
    formats = (torch.channels_last, torch.contiguous_format)
    of_trunk, of_skip = formats if channels_last else reversed(formats)
    x, skip = (torch.randn(4, 4, 6, 5).to(memory_format=f) for f in (of_trunk, of_skip))
    return Mixed().to(memory_format=of_trunk), x, skip


def step(call: Callable, model: nn.Module, x: Tensor, skip: Tensor) -> list[Tensor]:
    """y, the gradients of all leaves, and the state after one training step."""
    x, skip = (t.detach().clone().requires_grad_() for t in (x, skip))
    y = call(x, skip)
    y.square().sum().backward()
    assert skip.grad.stride() == skip.stride()
    return [y.detach(), x.grad, skip.grad, *(p.grad for p in model.parameters()), *model.state_dict().values()]


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


EACH_TRUNK = pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])


@EACH_TRUNK
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compile(channels_last: bool, compiler: str, fresh_compiler: None) -> None:
    model, x, skip = mixed(channels_last)
    eager = copy.deepcopy(model)
    result = step(torch.compile(model, backend=compiler, fullgraph=True), model, x, skip)
    for actual, expected_result in zip(result, step(eager, eager, x, skip), strict=True):
        torch.testing.assert_close(actual, expected_result, rtol=1e-5, atol=1e-5)


@EACH_TRUNK
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("run_in", ["traced format", "other format"])
def test_export(channels_last: bool, strict: bool, training: bool, run_in: str) -> None:
    """The program gives the values of eager, also for tensors in other formats than the traced ones."""
    model, x, skip = mixed(channels_last)
    model.train(training)
    eager = copy.deepcopy(model)
    program = torch.export.export(model, (x, skip), strict=strict).module()
    assert FORWARD in [node.target for node in program.graph.nodes]
    if run_in == "other format":
        x = x.contiguous() if channels_last else x.to(memory_format=torch.channels_last)
    torch.testing.assert_close(program(x, skip), eager(x, skip), rtol=1e-5, atol=1e-5)
    state = eager.state_dict()
    assert torch.allclose(program.state_dict()["bn.running_var"], state["bn.running_var"])


def with_ours(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
    return bnkern.batch_norm(x, None, None, weight, None, True, residual=residual, act="relu").square()


def with_torchs(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
    return (F.batch_norm(x, None, None, weight, None, True) + residual).relu().square()


TRANSFORMS: dict[str, Callable] = {
    "grad": lambda f, x, r, w: torch.func.grad(lambda *a: f(*a).sum(), argnums=(0, 1, 2))(x[0], r[0], w),
    "vmap": lambda f, x, r, w: (torch.vmap(f, (0, 0, None))(x, r, w),),
    "vmap over input": lambda f, x, r, w: (torch.vmap(f, (0, None, None))(x, r[0], w),),
    "vmap over residual": lambda f, x, r, w: (torch.vmap(f, (None, 0, None))(x[0], r, w),),
    "vmap(grad)": lambda f, x, r, w: torch.vmap(
        torch.func.grad(lambda *a: f(*a).sum(), argnums=(0, 1, 2)), (0, 0, None)
    )(x, r, w),
    "jvp": lambda f, x, r, w: torch.func.jvp(f, (x[0], r[0], w), (x[0].cos(), r[0].cos(), w.cos())),
    "hessian": lambda f, x, r, w: (torch.func.hessian(lambda w: f(x[0], r[0], w).sum())(w),),
}


@EACH_TRUNK
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.filterwarnings("ignore:There is a performance drop")  # about torch's own batch norm under vmap
def test_functional_transforms(channels_last: bool, transform: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x, r = (torch.randn(2, 3, 4, 3, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    last = x.movedim(2, -1).contiguous().movedim(-1, 2), r.movedim(2, -1).contiguous().movedim(-1, 2)
    x, r = (last[0], r) if channels_last else (x, last[1])
    w = torch.rand(4, generator=generator, dtype=torch.float64)
    result, expected = (TRANSFORMS[transform](f, x, r, w) for f in (with_ours, with_torchs))
    for actual, expected_result in zip(result, expected, strict=True):
        torch.testing.assert_close(actual, expected_result, rtol=1e-9, atol=1e-9)
    if transform == "grad":
        assert result[1].stride() == r[0].stride()


# ------------------------------------------------------------------------------------------------------ across ranks


def synchronized(x: Tensor, residual: Tensor, dy: Tensor, group) -> tuple[Tensor, ...]:
    bn = bnkern.nn.SyncBatchNorm(x.shape[1], process_group=group, act="relu")
    y, dx, dresidual = outcome(bn, x, residual, dy)
    return y, dx, dresidual, bn.running_var, torch.tensor(dresidual.stride() == residual.stride())


@pytest.mark.parametrize("case", [CASE["nchw"], CASE["nhwc_c5_s49"], CASE["nlc"]], ids=str)
def test_sync_batch_norm(ranks: Ranks, case: Case) -> None:
    """Each rank converts the residual to the format of its own input, with the bits of a residual in that format."""
    p = case.problem(FP32)
    parts = [tuple(t[i] for t in (p.x, p.residual, p.dy)) for i in (slice(0, 1), slice(1, None))]
    parts = [tuple(LAYOUTS[case.layout](t.contiguous()) for t in part) for part in parts]
    others = [(x, LAYOUTS[OTHER[case.layout]](r), dy) for x, r, dy in parts]
    for result, expected in zip(ranks.run(synchronized, others), ranks.run(synchronized, parts), strict=True):
        assert all(map(torch.equal, result, expected)) and result[-1]


# ------------------------------------------------------------------------------------------------- converted models


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return F.relu(self.bn(x) + skip)


@EACH_TRUNK
def test_converted_block(channels_last: bool) -> None:
    """The addition stays fused in every format of the skip path. The values and strides are those of torch's model."""
    _, x, skip = mixed(channels_last)
    theirs = Residual()
    ours = bnkern.convert(copy.deepcopy(theirs))
    for actual, expected_result in zip(step(ours, ours, x, skip), step(theirs, theirs, x, skip), strict=True):
        torch.testing.assert_close(actual, expected_result, rtol=1e-5, atol=1e-5)
        assert actual.stride() == expected_result.stride()
    assert ours.bn._conversion.separate_adds == 0
