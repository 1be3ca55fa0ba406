"""``sample_weight``: the statistics, results and gradients against float64 formulas that are written here again."""

import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import bnkern
from bnkern import _native, backends, nn, probes
from bnkern.backends.calls import BackwardCall, ForwardCall
from bnkern.backends.reference import accumulator
from tests.backends.triton.interpreter import interpreted
from tests.support.cases import BF16, EPS, FP16, FP32, FP64, LAYOUTS, MIXED, Precision, Target

MOMENTUM = 0.1
SHAPES = [(4, 3, 5, 5), (8, 64, 8, 8), (5, 32, 7, 7), (7, 6, 9), (64, 10), (3, 300, 4, 4), (6, 3, 90, 91), (70, 16)]
SMALL = [(4, 3, 5, 5), (5, 16, 3, 3), (7, 6, 9), (20, 10)]  # for the interpreter, which is slow
# The errors of y and dx, relative to the value and to the largest value. Halves round the result.
ERRORS = {torch.float32: (2e-5, 2e-5), torch.float64: (1e-11, 1e-11)}
ERRORS |= {torch.bfloat16: (2.0**-8, 2e-5), torch.float16: (2.0**-10, 2e-5)}


def weights_of(kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Some weights for x of this shape. All kinds but "samples" have zeros."""
    n, positions = shape[0], (shape[0], *shape[2:])
    random = torch.Generator().manual_seed(5)
    if kind == "samples":
        return torch.rand(n, generator=random, dtype=dtype) + 0.1
    if kind == "zero_samples":  # whole tiles without weight come first
        return (torch.arange(n) >= n // 2).to(dtype)
    if kind == "positions":
        return torch.rand(positions, generator=random, dtype=dtype) * (torch.rand(positions, generator=random) > 0.3)
    if kind == "tiny":  # their sum is less than 1
        weights = torch.rand(positions, generator=random, dtype=dtype)
        return weights / (2 * weights.sum())
    assert kind == "repetitions"
    return torch.randint(0, 4, (n,), generator=random).to(dtype)


def by_value(w: Tensor, x: Tensor) -> Tensor:
    """The weights [N, 1, S...] in float64."""
    w = w.double()
    w = w.view(len(x), *[1] * (x.dim() - 2)).expand(len(x), *x.shape[2:]) if w.dim() == 1 else w
    return w.unsqueeze(1)


def by_channel(v: Tensor, x: Tensor) -> Tensor:
    return v.view(1, -1, *[1] * (x.dim() - 2))


def formula(x: Tensor, w: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """z, the mean and the variance of the running statistics."""
    axes = [0, *range(2, x.dim())]
    w, total = by_value(w, x), by_value(w, x).sum()
    counted = x.where(w > 0, 0.0)
    mean = (w * counted).sum(axes) / total
    squares = (w * (counted - by_channel(mean, x)).square()).sum(axes)
    xhat = (x - by_channel(mean, x)) / (by_channel(squares / total, x) + EPS).sqrt()
    return by_channel(weight, x) * xhat + by_channel(bias, x), mean, squares / (total - 1 if total > 1 else total)


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype, what: str, scale: float = 0.0) -> None:
    relative, absolute = ERRORS[dtype]
    bound = relative * expected.abs() + absolute * max(scale, expected.abs().max().item())
    error = (actual.double() - expected).abs()
    assert (error <= bound).all(), f"{what}: {(error / bound).max():.3g} times the bound"


def tensors_of(precision: Precision, shape: tuple[int, ...], layout: str, offset: float = 0.5) -> list[Tensor]:
    """x, weight, bias, residual and dy."""
    random = torch.Generator().manual_seed(1)
    like = [shape, shape[1:2], shape[1:2], shape, shape]
    x, weight, bias, residual, dy = (torch.randn(size, generator=random, dtype=torch.float64) for size in like)
    x = x * 2 + offset + torch.arange(shape[0]).view(-1, *[1] * (len(shape) - 1)) / shape[0]
    x, residual, dy = (LAYOUTS[layout](t.to(precision.dtype)) for t in (x, residual, dy))
    return [x, weight.to(precision.params), bias.to(precision.params), residual, dy]


def check(
    target: Target,
    precision: Precision,
    shape: tuple[int, ...],
    layout: str,
    kind: str,
    fused: bool,
    offset: float = 0.5,
) -> None:
    """Results, gradients and running statistics of one call, with ReLU and a residual if ``fused``."""
    x, weight, bias, residual, dy = (t.to(target.device) for t in tensors_of(precision, shape, layout, offset))
    w = weights_of(kind, shape, accumulator(precision.dtype)).to(target.device)
    exact = [t.detach().double().requires_grad_() for t in (x, weight, bias, residual)]
    z, mean, variance = formula(exact[0], w, *exact[1:3])
    z = z + exact[3] if fused else z
    dy = dy * (z.detach().abs() > 1e-3) if fused else dy  # rounding may change the sign of smaller values
    (z.relu() if fused else z).backward(dy.double())

    leaves = [t.detach().requires_grad_() for t in (x, weight, bias, residual)]
    running = [torch.zeros_like(weight), torch.ones_like(weight)]
    counter = torch.tensor(0, device=target.device)
    with bnkern.use_backend(target.backend):
        y = bnkern.batch_norm(
            leaves[0],
            *running,
            *leaves[1:3],
            True,
            MOMENTUM,
            EPS,
            residual=leaves[3] if fused else None,
            act="relu" if fused else None,
            num_batches_tracked=counter,
            sample_weight=w,
        )
        y.backward(dy)
    assert counter == 1 and y.stride() == bnkern.batch_norm(x, None, None, weight, bias, True).stride()
    assert_close(y, (z.relu() if fused else z).detach(), x.dtype, "y", 1 + abs(offset))
    assert_close(leaves[0].grad, exact[0].grad, x.dtype, "dx")
    if fused:
        assert_close(leaves[3].grad, exact[3].grad, x.dtype, "dresidual")
    count = x[:, 0].numel() ** 0.5
    for name, leaf, truth in (("dweight", leaves[1], exact[1]), ("dbias", leaves[2], exact[2])):
        assert_close(leaf.grad, truth.grad, weight.dtype, name, count)
    assert_close(running[0], MOMENTUM * mean.detach(), weight.dtype, "running_mean", 1)
    assert_close(running[1], 1 - MOMENTUM + MOMENTUM * variance.detach(), weight.dtype, "running_var")


CALLS = [
    *((FP32, shape, kind) for shape in SHAPES for kind in ("samples", "positions")),
    *((precision, shape, "positions") for precision in (FP64, BF16, FP16) for shape in SHAPES[:5]),
    *((FP32, shape, kind) for shape in (SHAPES[1], SHAPES[6]) for kind in ("zero_samples", "tiny")),
]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("precision", "shape", "kind"), CALLS, ids=str)
def test_agrees_with_the_formula(
    target: Target, precision: Precision, shape: tuple[int, ...], kind: str, layout: str
) -> None:
    for fused in (False, True):
        check(target, precision, shape, layout, kind, fused)


@pytest.mark.parametrize("layout", ["sliced_batch", "sliced_channels", "sliced_channels_last", "expanded_space"])
@pytest.mark.parametrize("shape", [(4, 3, 5, 5), (5, 32, 7, 7)])
def test_views(target: Target, shape: tuple[int, ...], layout: str) -> None:
    check(target, FP32, shape, layout, "positions", True)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_mean_that_is_large_beside_sigma(target: Target, layout: str) -> None:
    """The mean is 2000 sigma. Sums of squares would lose all digits of the variance in float32."""
    x = tensors_of(FP32, (16, 64, 16, 16), layout, 4000.0)[0].to(target.device)
    w = weights_of("positions", x.shape, torch.float32).to(target.device)
    _, mean, variance = formula(x.double(), w, *torch.ones(2, 64, dtype=torch.float64, device=x.device))
    running = [torch.zeros(64, device=x.device) for _ in range(2)]
    bnkern.batch_norm(x, *running, training=True, momentum=1.0, sample_weight=w)
    assert (running[0] - mean).abs().max() < 1e-3  # four units in the last place
    assert_close(running[1], variance, torch.float32, "variance")


TRITON_CALLS = [(FP32, shape, kind) for shape in SMALL for kind in ("positions", "samples")]
TRITON_CALLS += [(precision, SMALL[1], "positions") for precision in (FP64, BF16, FP16)]
TRITON_CALLS += [(FP32, SMALL[1], "zero_samples"), (FP32, SMALL[0], "tiny")]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("precision", "shape", "kind"), TRITON_CALLS, ids=str)
def test_triton(precision: Precision, shape: tuple[int, ...], kind: str, layout: str) -> None:
    for fused in (False, True):
        interpreted(check, Target("triton", "cpu"), precision, shape, layout, kind, fused)


def test_triton_without_weight_and_with_padding() -> None:
    interpreted(check_padding, Target("triton", "cpu"), "channels_last")
    interpreted(check_no_weight, Target("triton", "cpu"))


# -------------------------------------------------------------------------------------------- what weights mean


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("precision", MIXED, ids=lambda precision: precision.name)
def test_integer_weights_are_repetitions(target: Target, precision: Precision, layout: str) -> None:
    shape = (9, 24, 6, 5)
    x, weight, bias, *_ = (t.to(target.device) for t in tensors_of(precision, shape, layout))
    w = weights_of("repetitions", shape, accumulator(precision.dtype)).to(target.device)
    results = []
    for values, weights in ((x, w), (x.repeat_interleave(w.long(), 0), None)):
        running = [torch.zeros_like(weight), torch.ones_like(weight)]
        y = bnkern.batch_norm(values, *running, weight, bias, True, sample_weight=weights)
        results.append((y if weights is None else y.repeat_interleave(w.long(), 0), *running))
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected.double(), actual.dtype, "result")


def test_ones_are_no_weights(target: Target) -> None:
    x = torch.randn(6, 5, 7, device=target.device)
    expected = bnkern.batch_norm(x, None, None, training=True).double()
    for shape in ((6,), (6, 7)):
        y = bnkern.batch_norm(x, None, None, training=True, sample_weight=torch.ones(shape, device=target.device))
        assert_close(y, expected, torch.float32, "y")


def check_padding(target: Target, layout: str) -> None:
    """Values of weight 0 may be anything. They have the y and dx of the formulas."""
    x = tensors_of(FP32, (6, 16, 5, 7), layout)[0].to(target.device)
    padding = torch.zeros(6, 5, 7, dtype=torch.bool, device=x.device)
    padding[0], padding[:, :, 4:] = True, True
    w = (~padding).float()
    results = []
    with bnkern.use_backend(target.backend):
        for garbage in (0.0, 1e30, torch.inf, torch.nan):
            values = torch.where(padding.unsqueeze(1), garbage, x).requires_grad_()
            running = [torch.zeros(16, device=x.device), torch.ones(16, device=x.device)]
            y = bnkern.batch_norm(values, *running, training=True, sample_weight=w)
            valid = y.movedim(1, -1)[~padding]
            valid.square().sum().backward()
            assert values.grad.movedim(1, -1)[padding].abs().max() == 0 or garbage != 0
            results.append([valid.detach(), *running])
    for result in results[1:]:
        for actual, expected in zip(result, results[0], strict=True):
            assert torch.equal(actual, expected)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_garbage_in_the_padding(target: Target, layout: str) -> None:
    check_padding(target, layout)


def check_no_weight(target: Target) -> None:
    """If no value has a weight, the statistics are NaN, and the batch is one that can be skipped."""
    x, w = torch.randn(4, 3, 5, device=target.device), torch.zeros(4, device=target.device)
    running = [torch.zeros(3, device=x.device), torch.ones(3, device=x.device)]
    tracked, skipped = torch.zeros(2, dtype=torch.int64, device=x.device).unbind()
    counters = {"num_batches_tracked": tracked, "num_batches_skipped": skipped}
    with bnkern.use_backend(target.backend):
        y = bnkern.batch_norm(x, *running, training=True, sample_weight=w, **counters)
        assert y.isnan().all() and not tracked and skipped == 1
        assert (running[0] == 0).all() and (running[1] == 1).all()
        bnkern.batch_norm(x, *running, training=True, sample_weight=w + 1, **counters)
        assert tracked == 1 and skipped == 1 and (running[0] != 0).all()
        bnkern.batch_norm(x, *running, training=True, sample_weight=w)
        assert running[0].isnan().all() and running[1].isnan().all()


def test_no_weight_at_all(target: Target) -> None:
    check_no_weight(target)


def test_cumulative_momentum(target: Target) -> None:
    x = torch.randn(2, 6, 3, 4, device=target.device)
    w = torch.rand(6, device=target.device)
    running, counter = [torch.zeros(3, device=x.device) for _ in range(2)], torch.tensor(0, device=x.device)
    for batch in x:
        bnkern.batch_norm(batch, *running, None, None, True, None, num_batches_tracked=counter, sample_weight=w)
    ones = torch.ones(2, 3, dtype=torch.float64, device=x.device)
    expected = [
        torch.stack(values).mean(0) for values in zip(*(formula(b.double(), w, *ones)[1:] for b in x), strict=True)
    ]
    assert counter == 2
    assert_close(running[0], expected[0], torch.float32, "running_mean", 1)
    assert_close(running[1], expected[1], torch.float32, "running_var")


def test_ignored_in_eval_mode(target: Target) -> None:
    x, w = torch.randn(4, 3, 5, device=target.device), torch.rand(4, device=target.device)
    running = [torch.rand(3, device=x.device), torch.rand(3, device=x.device)]
    y = bnkern.batch_norm(x, *running, sample_weight=w)
    assert torch.equal(y, bnkern.batch_norm(x, *running))


def test_empty_batch(target: Target) -> None:
    x = torch.empty(0, 3, 4, device=target.device)
    running = [torch.zeros(3, device=x.device), torch.ones(3, device=x.device)]
    w = torch.empty(0, device=target.device)
    assert bnkern.batch_norm(x, *running, training=True, sample_weight=w).shape == x.shape
    assert (running[0] == 0).all() and (running[1] == 1).all()


# ------------------------------------------------------------------------------------------------ same bits


def results_of(layout: str, precision: Precision, shape: tuple[int, ...]) -> list[Tensor]:
    x, weight, bias, residual, dy = tensors_of(precision, shape, layout)
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    w = weights_of("positions", shape, accumulator(precision.dtype))
    running = [torch.zeros_like(weight), torch.ones_like(weight)]
    y = bnkern.batch_norm(leaves[0], *running, *leaves[1:], True, residual=residual, act="relu", sample_weight=w)
    y.backward(dy)
    return [y.detach(), *running, *(t.grad for t in leaves)]


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(8, 64, 16, 16), (33, 3, 37, 37)])
def test_threads_do_not_change_bits(threads: None, layout: str, shape: tuple[int, ...]) -> None:
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(results_of(layout, FP32, shape))
    for other in results[1:]:
        for actual, expected in zip(other, results[0], strict=True):
            assert torch.equal(actual, expected)


def fingerprint() -> str:
    """The bits of some results, for a process with another instruction set."""
    results = [
        results_of(layout, precision, shape)
        for layout in ("contiguous", "channels_last")
        for precision in MIXED
        for shape in ((5, 32, 7, 7), (7, 6, 9), (64, 10))
    ]
    return str([zlib.crc32(t.contiguous().view(torch.uint8).numpy().tobytes()) for result in results for t in result])


def test_instruction_sets_do_not_change_bits() -> None:
    code = "import tests.norm.test_sample_weight as test; print(test.fingerprint())"
    prints = set()
    for isa in ("generic", "avx2", "avx512"):
        environment = {"BNKERN_ISA": isa, "PATH": "/usr/bin:/bin"}
        process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
        if "this machine cannot run it" in process.stderr or "this build has" in process.stderr:
            continue
        assert process.returncode == 0, process.stderr
        prints.add(process.stdout)
    assert len(prints) == 1


# --------------------------------------------------------------------------------- other ways to make the call


@pytest.mark.parametrize("residual", [False, True])
def test_operators(target: Target, residual: bool) -> None:
    """opcheck of both operators: shapes, strides, fakes, autograd registration."""
    x, weight, bias, added, dy = (t.to(target.device) for t in tensors_of(FP32, (4, 3, 5, 5), "channels_last"))
    w = torch.rand(100, device=x.device)
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)] + [added if residual else None]
    running = (torch.zeros(3, device=x.device), torch.ones(3, device=x.device), None)
    arguments = (*leaves, *running, True, 0.1, EPS, "relu", True, None, w, target.backend)
    torch.library.opcheck(torch.ops.bnkern.batch_norm_forward.default, arguments)
    _, mean, invstd, mask, *_ = torch.ops.bnkern.batch_norm_forward(*arguments)
    saved = (dy, x, weight, bias, mean, invstd, mask if residual else None)
    arguments = (*saved, "relu", True, [True, True, True, residual], w, target.backend)
    torch.library.opcheck(torch.ops.bnkern.batch_norm_backward.default, arguments)


def test_phases(target: Target) -> None:
    """The phase grad_input alone divides by the sum of the weights, and moments with weights are those of the call."""
    x, weight, bias, _, dy = (t.to(target.device) for t in tensors_of(FP32, (6, 8, 5), "contiguous"))
    w = torch.rand(30, device=x.device)
    kernels = backends.choose(target.backend, target.device, x.dtype)
    _, mean, invstd, _ = kernels.forward(ForwardCall(x, weight, bias, sample_weight=w))
    call = BackwardCall(dy, x, weight, bias, mean, invstd, sample_weight=w)
    dx, dweight, dbias, _ = kernels.backward(call)
    sums = kernels.grad_sums(call)
    assert torch.equal(sums[0], dbias) and torch.equal(sums[1], dweight)
    assert_close(kernels.grad_input(call, (*sums, 30))[0], dx.double(), x.dtype, "dx")


def test_the_native_module_declines() -> None:
    """The kernels would read wrong memory, or write a record that they do not compute."""
    x, w, record = torch.randn(4, 3, 5), torch.ones(20), torch.zeros(9, 3, dtype=torch.float64)
    call, backward = ForwardCall(x, sample_weight=w), BackwardCall(x, x, mean=w[:3], invstd=w[:3], sample_weight=w)
    assert _native.forward(call, True) and _native.backward(backward)
    assert _native.forward(call, False) is None
    for wrong in (w[:4], w.double(), torch.ones(40)[::2], w.to("meta"), 1.0):
        assert _native.forward(call._replace(sample_weight=wrong), True) is None
        assert _native.backward(backward._replace(sample_weight=wrong)) is None
    assert _native.forward(call._replace(record=record), True) is None
    for name in ("record_gradient", "record_affine"):
        assert _native.backward(backward._replace(**{name: record[:8]})) is None


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("shape", [(6,), (6, 4, 4)])
def test_compile(target: Target, shape: tuple[int, ...], dynamic: bool) -> None:
    torch.compiler.reset()
    x, w = torch.randn(6, 5, 4, 4, device=target.device), torch.rand(shape, device=target.device)
    modules = [nn.BatchNorm2d(5, act="relu").to(target.device) for _ in range(2)]
    compiled = torch.compile(modules[1], backend="aot_eager", fullgraph=True, dynamic=dynamic)
    results = []
    for module, call in zip(modules, (modules[0], compiled), strict=True):
        leaf = x.clone().requires_grad_()
        y = call(leaf, sample_weight=w)
        y.backward(x)
        results.append([y, leaf.grad, *(p.grad for p in module.parameters()), *module.buffers()])
    for actual, expected in zip(*results, strict=True):
        assert torch.equal(actual, expected)


def test_second_derivative(target: Target) -> None:
    tensors = [t.detach().requires_grad_() for t in tensors_of(FP64, (4, 3, 5), "contiguous")[:3]]
    tensors = [t.detach().to(target.device).requires_grad_() for t in tensors]
    w = weights_of("positions", (4, 3, 5), torch.float64).to(target.device)

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return bnkern.batch_norm(x, None, None, weight, bias, True, sample_weight=w)

    assert torch.autograd.gradcheck(function, tensors) and torch.autograd.gradgradcheck(function, tensors)


def test_modules() -> None:
    """The weights reach the call, in each module, and the state_dict is torch's."""
    for name, shape in (("BatchNorm1d", (6, 3)), ("BatchNorm2d", (6, 3, 4, 4)), ("BatchNorm3d", (6, 3, 2, 2, 2))):
        ours, theirs = getattr(nn, name)(3), getattr(torch.nn, name)(3)
        x, w = torch.randn(shape), torch.rand(6)
        expected = bnkern.batch_norm(x, None, None, training=True, sample_weight=w)
        assert torch.equal(ours(x, sample_weight=w), expected)
        assert torch.equal(ours(x, None, w), expected)
        assert ours.state_dict().keys() == theirs.state_dict().keys()
        theirs.load_state_dict(ours.state_dict())
        assert torch.equal(ours.eval()(x, None, w), ours(x))
    sync = nn.SyncBatchNorm(3)
    x, w = torch.randn(6, 3), torch.rand(6)
    assert torch.equal(sync(x, sample_weight=w), nn.BatchNorm1d(3)(x, sample_weight=w))


def test_symbolic_trace() -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x: Tensor, w: Tensor) -> Tensor:
            return self.norm(x, sample_weight=w) + bnkern.batch_norm(x, None, None, training=True, sample_weight=w)

    net, x, w = Net(), torch.randn(6, 3), torch.rand(6)
    assert torch.equal(torch.fx.symbolic_trace(net)(x, w), net(x, w))


def call_in_a_group(x: Tensor, group: object) -> str:
    try:
        nn.SyncBatchNorm(3, process_group=group)(x, sample_weight=torch.ones(len(x)))
    except RuntimeError as error:
        return str(error)
    return ""


def test_ranks_are_refused(ranks) -> None:
    messages = ranks.run(call_in_a_group, [(torch.randn(4, 3),)] * 2)
    assert all("sample_weight" in message for message in messages)


# -------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        ([1.0] * 4, TypeError, "sample_weight must be a torch.Tensor"),
        (torch.ones(3), ValueError, r"sample_weight must have one weight .* \[4\] or \[4, 5\], got \[3\]"),
        (torch.ones(4, 3, 5), ValueError, "sample_weight must have one weight"),
        (torch.ones(4, 1), ValueError, "sample_weight must have one weight"),
        (torch.ones(4, dtype=torch.float64), TypeError, "sample_weight must be torch.float32"),
        (torch.ones(4, dtype=torch.bool), TypeError, "sample_weight must be torch.float32"),
        (torch.ones(4, device="meta"), ValueError, "sample_weight must be on the device"),
        (torch.ones(4).to_sparse(), TypeError, "sample_weight must be a strided"),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_wrong_weights(weights: object, error: type[Exception], message: str, training: bool) -> None:
    running = torch.zeros(3), torch.ones(3)
    with pytest.raises(error, match=message):
        bnkern.batch_norm(torch.randn(4, 3, 5), *running, training=training, sample_weight=weights)
    assert (running[0] == 0).all()


def test_transforms_are_refused() -> None:
    x, w = torch.randn(4, 3, 5), torch.rand(4)

    def call(x: Tensor) -> Tensor:
        return bnkern.batch_norm(x, None, None, training=True, sample_weight=w)

    for transformed in (
        lambda: torch.func.vmap(call)(x.expand(2, 4, 3, 5)),
        lambda: torch.func.grad(lambda x: call(x).sum())(x),
        lambda: torch.func.jvp(call, (x,), (x,)),
    ):
        with pytest.raises(RuntimeError, match="sample_weight"):
            transformed()


def test_probes_are_refused(tmp_path: Path) -> None:
    module, x = nn.BatchNorm1d(3), torch.randn(4, 3)
    with probes.record(module, ["affine_gradient_signs"], out=tmp_path) as rec:
        with pytest.raises(RuntimeError, match="sample_weight"):
            module(x, sample_weight=torch.ones(4))
        module(x).sum().backward()
        rec.step()
