"""The CUDA kernels on a GPU: what the harness on the host cannot test.

The shared tests run on this backend too, through their ``target``. The tests here cover graphs, streams, the scheduling
of real hardware, and sizes that only fit a GPU. Results must have the bits of a single call without other work.
"""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

import bnkern
from bnkern import _native, backends
from bnkern.backends.calls import BackwardCall, ForwardCall
from tests.support.batch_norm import check_batch_norm
from tests.support.cases import BF16, FP16, FP32, Case, Precision, Target, assert_close, exact, mean_bound, var_bound
from tests.support.record_cases import Call, check_backward, check_forward

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or backends.unavailable("cuda", "cuda") is not None,
        reason="there is no CUDA device, or the module was built without CUDA",
    ),
]

ODD = Case("odd_planes", (90, 4, 7, 7), "planes of 49")
PLANES = Case("planes", (32, 16, 32, 32), "a channel of several parts")
FEW = Case("few_channels", (8, 3, 96, 96), "fewer channels than clusters can share")
ROWS = Case("rows", (32, 16, 32, 32), "rows of octets", "channels_last")
ODD_ROWS = Case("odd_rows", (32, 17, 9, 9), "rows read element by element", "channels_last")
WIDE_ROWS = Case("wide_rows", (40, 300, 3, 3), "rows of many vectors and a tail", "channels_last")
CASES = [ODD, PLANES, FEW, ROWS, ODD_ROWS, WIDE_ROWS]
STRATEGIES = {"single_read": 0, "two_kernels": 1 << 62}


@pytest.fixture(params=STRATEGIES)
def strategy(request: pytest.FixtureRequest):
    """Forces the CUDA backend, with one strategy for every size."""
    from bnkern.backends import cuda

    index = torch.cuda.current_device()
    backends.choose("cuda", "cuda", torch.float32)  # sets up the device with its own rule, which the test then changes
    cuda.introduce(index, STRATEGIES[request.param])
    with bnkern.use_backend("cuda"):
        yield request.param
    cuda.introduce(index)


@pytest.mark.parametrize("precision", [FP32, BF16, FP16], ids=lambda p: p.name)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_strategy(strategy: str, case: Case, precision: Precision) -> None:
    """The short list of tests for compute-sanitizer."""
    for mode, act, residual in (("training", "relu", True), ("training", None, False), ("eval", "relu", True)):
        check_batch_norm(Target("cuda", "cuda"), case, precision, mode, act, residual)


@pytest.mark.parametrize("precision", [FP32, BF16], ids=lambda p: p.name)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_records(strategy: str, case: Case, precision: Precision) -> None:
    kernels, p = backends.choose("cuda", "cuda", precision.dtype), case.problem(precision, "cuda")
    for call in (Call("training", "saved mask"), Call("eval", "relu"), Call("identity", None)):
        # Without batch statistics distances are measured from the middle one of three values.
        check_forward(kernels, p, call, shift=0.0 if call.mode == "training" else 2.0)
        check_backward(kernels, p, call)


class Step:
    """Forward and backward of BN + add + ReLU on its own tensors."""

    def __init__(self, case: Case, precision: Precision = BF16) -> None:
        p = case.problem(precision, "cuda")
        self.leaves = [t.clone().requires_grad_() for t in (p.x, p.weight, p.bias, p.residual)]
        self.dy = p.dy
        self.running = torch.zeros_like(p.weight), torch.ones_like(p.weight)
        self.counter = torch.zeros((), dtype=torch.int64, device="cuda")

    def __call__(self) -> list[Tensor]:
        x, weight, bias, residual = self.leaves
        y = bnkern.batch_norm(
            x, *self.running, weight, bias, True, None, residual=residual, act="relu",
            num_batches_tracked=self.counter,
        )  # fmt: skip
        return [y.detach(), *torch.autograd.grad(y, self.leaves, self.dy)]


def equal(a: list[Tensor], b: list[Tensor]) -> Tensor:
    """Whether all bits agree, computed on the device without synchronisation."""
    same = [(s.contiguous().view(torch.uint8) == t.contiguous().view(torch.uint8)).all() for s, t in zip(a, b)]  # noqa: B905
    return torch.stack(same).all()


def captured(step: Step) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    side_stream = torch.cuda.Stream()
    side_stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side_stream):
        step()
    torch.cuda.current_stream().wait_stream(side_stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    return graph, results


@pytest.mark.parametrize("case", [PLANES, FEW, ROWS, ODD_ROWS], ids=str)
def test_a_replayed_graph_has_the_bits_of_a_call(strategy: str, case: Case) -> None:
    step = Step(case)
    expected = step()
    graph, results = captured(step)
    count_before = step.counter.item()
    for _ in range(3):
        for t in results:
            t.fill_(torch.nan)
        graph.replay()
        assert equal(results, expected)
    assert step.counter.item() == count_before + 3


@pytest.mark.parametrize("case", [PLANES, FEW, ROWS, ODD_ROWS], ids=str)
def test_graphs_captured_on_one_stream_replay_side_by_side(strategy: str, case: Case) -> None:
    """Each graph has a workspace of its own."""
    pairs = []
    steps = [Step(case) for _ in range(2)]  # kept alive, because a graph does not own the memory that it reads
    for step in steps:
        expected = step()
        pairs.append((*captured(step), expected))
    streams = [torch.cuda.Stream() for _ in pairs]
    all_equal = [torch.ones((), dtype=torch.bool, device="cuda") for _ in pairs]
    torch.cuda.synchronize()
    for _ in range(500):
        for k, (stream, (graph, results, expected)) in enumerate(zip(streams, pairs, strict=True)):
            with torch.cuda.stream(stream):
                graph.replay()
                all_equal[k] &= equal(results, expected)
    torch.cuda.synchronize()
    assert all(all_equal)


def test_memory_of_destroyed_graphs_is_reused(strategy: str) -> None:
    step = Step(ROWS)
    step()

    def free_after_captures(count: int) -> int:
        for _ in range(count):
            captured(step)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]

    before = free_after_captures(3)
    assert before - free_after_captures(200) < 4 << 20  # bytes


@pytest.mark.parametrize("case", [PLANES, ROWS, ODD_ROWS], ids=str)
def test_two_threads_on_one_stream(strategy: str, case: Case) -> None:
    """The kernels of one call pass partial results in the workspace of the stream, which both threads use."""
    p = case.problem(BF16, "cuda")
    backend = backends.choose("cuda", "cuda", BF16.dtype)

    def call(scale: float, rounds: int) -> list[Tensor]:
        x, dy = p.x * scale, p.dy * scale
        all_equal = torch.ones((), dtype=torch.bool, device="cuda")
        first = None
        for _ in range(rounds):
            y, mean, invstd, mask = backend.forward(
                ForwardCall(x, p.weight, p.bias, p.residual, None, None, None, True, 0.1, 1e-5, "relu", True)
            )
            saved = (mean, invstd, mask, "relu", True, (True,) * 4)
            results = [y, mean, invstd, mask, *backend.backward(BackwardCall(dy, x, p.weight, p.bias, *saved))]
            first = first or results
            all_equal &= equal(results, first)
        return [all_equal, *first]

    sequential = [call(scale, 1) for scale in (1, -3)]
    with ThreadPoolExecutor(2) as pool:
        concurrent = list(pool.map(call, (1, -3), (300, 300)))
    for ours, expected in zip(concurrent, sequential, strict=True):
        assert ours[0] and equal(ours, expected)


class Raw:
    """Bytes on the device in the form that torch.as_tensor accepts without a copy."""

    def __init__(self, address: int, size: int) -> None:
        self.__cuda_array_interface__ = {"shape": (size,), "typestr": "|u1", "data": (address, False), "version": 2}


@pytest.mark.slow
@pytest.mark.parametrize("case", [PLANES, FEW, ROWS, ODD_ROWS], ids=str)
def test_100_000_launches_beside_a_busy_stream(strategy: str, case: Case) -> None:
    """Detects a missing fence between blocks.

    The workspace is NaN before each launch, and another stream keeps the memory system and some multiprocessors busy.
    """
    p = case.problem(BF16, "cuda")
    x = p.x
    backend = backends.choose("cuda", "cuda", x.dtype)
    arguments = (p.weight, p.bias, p.residual, None, None, None, True, 0.1, 1e-5, "relu", True)
    expected = [t for t in backend.forward(ForwardCall(x, *arguments)) if t is not None]
    backward = (p.weight, p.bias, *expected[1:], "relu", True, (True, True, True, True))
    gradients = backend.backward(BackwardCall(p.dy, x, *backward))
    address, signals, size = _native.cuda_workspace(torch.cuda.current_stream().cuda_stream)
    parts = torch.as_tensor(Raw(address + signals, size), device="cuda")
    noise, busy = torch.randn(4096, 4096, device="cuda"), torch.cuda.Stream()
    all_equal = torch.ones((), dtype=torch.bool, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(busy), torch.cuda.graph(graph, stream=busy):
        for _ in range(10):
            noise.add_(1e-3).sin_()
    for k in range(25_000):
        parts.fill_(255)
        results = [t for t in backend.forward(ForwardCall(x, *arguments)) if t is not None]
        backward_results = backend.backward(BackwardCall(p.dy, x, *backward))
        all_equal &= equal([*results, *backward_results], [*expected, *gradients])
        if k % 50 == 0:
            with torch.cuda.stream(busy):
                graph.replay()
        if k % 2000 == 0:
            assert all_equal, f"wrong after {4 * k} launches"
    assert all_equal


def test_one_launch_and_no_memset(strategy: str) -> None:
    """A forward is one kernel or two, and so is a backward. Nothing is cleared between them."""
    step = Step(PLANES)
    step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    names = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    ours = [name for name in names if "planes_" in name]
    assert len(ours) == (2 if strategy == "single_read" else 4), names
    assert not any("memset" in name.lower() for name in names), names


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_more_than_2_to_the_31_elements(strategy: str, layout: str) -> None:
    """The mean and variance of half-precision values, and the output of the last sample."""
    shape = (11, 2, 10_000, 10_000)  # 2.2e9 elements, 4.4 GB
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GB")
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    x = torch.empty(shape, dtype=torch.float16, device="cuda", memory_format=memory_format)
    for n, sample in enumerate(x):
        sample.normal_(mean=n)
    wide = [(s.double().sum((1, 2)), s.double().square().sum((1, 2))) for s in x]
    count = shape[0] * shape[2] * shape[3]
    mean = sum(w[0] for w in wide) / count
    var = sum(w[1] for w in wide) / count - mean.square()
    kernels = backends.choose("cuda", "cuda", x.dtype)
    y, ours, invstd, _ = kernels.forward(
        ForwardCall(x, None, None, None, None, None, None, True, 0.1, 1e-5, None, False)
    )
    (true_mean, true_var) = exact(mean, var)
    assert_close(ours, true_mean, mean_bound(true_mean, true_var, x.dtype), "mean")
    assert_close(1 / invstd.double().square() - 1e-5, true_var, 4 * var_bound(true_mean, true_var, x.dtype), "variance")
    last = (x[-1].double() - mean.view(-1, 1, 1)) * (var + 1e-5).rsqrt().view(-1, 1, 1)
    # half an ulp of the largest value, about 6, and the rounding of the mean
    assert (y[-1].double() - last).abs().max() < 4e-3
