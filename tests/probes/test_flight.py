"""The flight recorder: planted faults are named exactly, nothing is written without a reason, and no bit changes."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import bnkern
from bnkern import probes
from bnkern.probes.diagnosis import Event, diagnose
from tests import ROOT
from tests.convert.converting import pytorchcv
from tests.probes.flight_ranks import fly_rank
from tests.support.probing import batch, make_net, train
from tests.support.ranks import Ranks

FAULT_AT = 5  # the step


def fly(
    net: nn.Module,
    out: Path,
    steps: int = 8,
    forward: Callable | None = None,
    before: Callable[[int], None] = lambda step: None,
    update_first: bool = True,
    size: int = 7,
    **options: object,
) -> probes.FlightRecorder:
    """Trains with a flight recorder. ``before(step)`` runs before each step."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    with probes.flight_recorder(net, 4, out, **options) as flight:  # type: ignore[arg-type]
        for step in range(steps):
            before(step)
            images, labels = batch(step)
            images = F.interpolate(images, (size, size))
            loss = F.cross_entropy((net if forward is None else forward)(images), labels)
            loss.backward()
            if update_first:
                optimizer.step()
            flight.step(loss)
            if not update_first:
                optimizer.step()
            optimizer.zero_grad()
    return flight


class Plant:
    """Changes the output of a module at step FAULT_AT, in the forward or in the backward pass."""

    def __init__(self, module: nn.Module, change: Callable[[Tensor], None], backward: bool = False) -> None:
        self.change, self.backward, self.step = change, backward, -1
        module.register_forward_hook(self)

    def before(self, step: int) -> None:
        self.step = step

    def __call__(self, module: nn.Module, args: tuple, y: Tensor) -> Tensor | None:
        if self.step != FAULT_AT:
            return None
        if self.backward:
            y.register_hook(self.changed)
            return None
        return self.changed(y)

    def changed(self, t: Tensor) -> Tensor:
        t = t.clone()
        self.change(t.detach())
        return t


def one_value(value: float, channel: int) -> Callable[[Tensor], None]:
    def change(t: Tensor) -> None:
        t[0, channel, 0, 0] = value

    return change


def first(flight: probes.FlightRecorder) -> Event:
    assert flight.fault is not None
    return flight.fault.events[0]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("update_first", [True, False])
@pytest.mark.parametrize(("value", "word"), [(torch.inf, "inf"), (-torch.inf, "-inf"), (torch.nan, "NaN")])
def test_a_value_in_the_forward_pass(tmp_path: Path, layout: str, update_first: bool, value: float, word: str) -> None:
    net = make_net(layout=layout)
    plant = Plant(net.conv2, one_value(value, 3))
    with pytest.warns(RuntimeWarning, match="First seen at step 5, in the forward pass: the input of layer norm2"):
        flight = fly(net, tmp_path / "flight", before=plant.before, update_first=update_first)
    event = first(flight)
    assert event[1:5] == (FAULT_AT, "forward", "norm2", 3)
    assert event.what == f"has 1 of 80 values that are not finite ({word})"
    assert "the inputs of the 1 layers before it in the pass are finite" in flight.fault.sentence
    assert probes.load(tmp_path / "flight").steps.tolist() == [2, 3, 4, 5]  # the ring keeps the last four steps


@pytest.mark.parametrize("update_first", [True, False])
def test_a_weight(tmp_path: Path, update_first: bool) -> None:
    net = make_net()

    def before(step: int) -> None:
        if step == FAULT_AT:
            net.conv3.weight.data[2, 0, 0, 0] = torch.nan

    with pytest.warns(RuntimeWarning, match=r"step 5, in the parameters: conv3.weight, is not finite"):
        flight = fly(net, tmp_path, before=before, update_first=update_first)
    assert first(flight)[1:4] == (FAULT_AT, "parameters", "conv3.weight")
    second = flight.fault.events[1]
    assert second[1:5] == (FAULT_AT, "forward", "norm3", 2)


def test_a_value_in_the_backward_pass(tmp_path: Path) -> None:
    net = make_net()
    plant = Plant(net.norm2, one_value(torch.nan, 1), backward=True)
    with pytest.warns(
        RuntimeWarning, match="in the backward pass: the gradient at the input of layer norm2, channel 1"
    ):
        flight = fly(net, tmp_path, before=plant.before)
    assert first(flight)[1:5] == (FAULT_AT, "backward", "norm2", 1)
    assert "the gradients of the 1 layers before it in the pass are finite" in flight.fault.sentence
    assert {event.name for event in flight.fault.events if event.phase == "forward"} == set()


def test_a_loss(tmp_path: Path) -> None:
    net = make_net()
    with (
        pytest.warns(RuntimeWarning, match="First seen at step 1, in the loss: it is NaN"),
        probes.flight_recorder(net, 4, tmp_path) as flight,
    ):
        for step, factor in enumerate((1.0, torch.nan, 1.0)):
            images, labels = batch(step)
            loss = F.cross_entropy(net(images), labels)
            loss.backward()
            flight.step(loss * factor)
    assert first(flight).step == 1
    assert not flight.active
    assert flight.fault.flight.steps.tolist() == [0, 1]


def test_an_exploding_and_a_dead_layer(tmp_path: Path) -> None:
    def explode(step: int) -> None:
        if step == FAULT_AT:
            net.conv2.weight.data[4] *= 1e6

    net = make_net()
    with pytest.warns(RuntimeWarning, match="the input of layer norm2, channel 4, has a value of magnitude"):
        flight = fly(net, tmp_path / "exploding", before=explode, limits={"abs_max": 1e4})
    assert first(flight)[1:5] == (FAULT_AT, "forward", "norm2", 4)

    def kill(step: int) -> None:
        if step == FAULT_AT:
            net.norm1.bias.data.fill_(-1e3)

    net = make_net()
    with pytest.warns(RuntimeWarning, match="layer norm1, gives an output of which 0.00 % is above zero"):
        flight = fly(net, tmp_path / "dead", before=kill, limits={"active": 0.01})
    assert first(flight)[1:5] == (FAULT_AT, "forward", "norm1", None)


@pytest.mark.parametrize(("limit", "phase"), [("loss", "loss"), ("gradient", "gradients"), ("update", "parameters")])
def test_other_limits(tmp_path: Path, limit: str, phase: str) -> None:
    """A limit that the first steps keep, and that the loss times 1e4 does not."""
    net = make_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    with (
        pytest.warns(RuntimeWarning, match="above 20"),
        probes.flight_recorder(net, 4, tmp_path, limits={limit: 20.0}) as flight,
    ):
        for step in range(5):
            images, labels = batch(step)
            loss = F.cross_entropy(net(images), labels) * (1e4 if step == 2 else 1.0)
            loss.backward()
            optimizer.step()
            flight.step(loss)
            optimizer.zero_grad()
    assert first(flight).phase == phase
    assert first(flight).step == (3 if limit == "update" else 2)  # the update is seen in the next forward


def test_a_converted_network_of_another_package(tmp_path: Path) -> None:
    model = nn.Sequential(bnkern.convert(pytorchcv("resnet", "resnet10")))
    convolution, layer = (f"0.features.stage2.unit1.body.conv2.{name}" for name in ("conv", "bn"))
    plant = Plant(model.get_submodule(convolution), one_value(torch.inf, 7))
    with pytest.warns(RuntimeWarning, match="in the forward pass"):
        flight = fly(model, tmp_path, before=plant.before, size=32)
    assert first(flight)[1:5] == (FAULT_AT, "forward", layer, 7)


def test_nothing_is_written_without_a_reason_and_no_bit_changes(tmp_path: Path) -> None:
    plain, flown = make_net(), make_net()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9)
    for step in range(8):
        images, labels = batch(step)
        F.cross_entropy(plain(images), labels).backward()
        optimizer.step(), optimizer.zero_grad()
    flight = fly(flown, tmp_path / "flight")
    assert not (tmp_path / "flight").exists() and flight.fault is None
    assert not flown.norm1.taps and not flown._forward_pre_hooks
    for a, b in zip(plain.state_dict().values(), flown.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_the_ring_on_request_and_after_an_exception(tmp_path: Path) -> None:
    net = make_net()
    with (
        pytest.raises(KeyError),
        probes.flight_recorder(net, 3, tmp_path / "flight") as flight,
    ):
        train(net, 5, flight)  # type: ignore[arg-type]  # it has the method step
        asked = flight.write()
        assert asked.reason == "asked" and asked.events == []
        assert asked.sentence == "No value in the last 3 steps is infinite, NaN or beyond a limit."
        assert probes.load(tmp_path / "flight").steps.tolist() == [2, 3, 4]
        net(batch(5)[0])
        raise KeyError("data")
    found = diagnose(tmp_path / "flight")
    assert found.reason == "KeyError: 'data'"
    assert found.flight.steps.tolist() == [3, 4, 5]  # with the forward of the step that failed


def test_an_interrupt_removes_the_hooks_and_writes_nothing(tmp_path: Path) -> None:
    net = make_net()
    with pytest.raises(KeyboardInterrupt), probes.flight_recorder(net, 3, tmp_path / "flight") as flight:
        train(net, 2, flight)  # type: ignore[arg-type]  # it has the method step
        raise KeyboardInterrupt
    assert not net.norm1.taps and not net._forward_pre_hooks and not (tmp_path / "flight").exists()


def test_an_error_is_not_replaced_if_the_ring_cannot_be_written(tmp_path: Path) -> None:
    net = make_net()
    (tmp_path / "file").touch()
    with pytest.raises(KeyError) as raised, probes.flight_recorder(net, 3, tmp_path / "file" / "flight") as flight:
        train(net, 2, flight)  # type: ignore[arg-type]
        raise KeyError("data")
    assert "flight_recorder: cannot write" in raised.value.__notes__[0]


def test_on_fault_raise(tmp_path: Path) -> None:
    net = make_net()
    plant = Plant(net.conv2, one_value(torch.inf, 3))
    with pytest.raises(FloatingPointError, match="First seen at step 5, in the forward pass"):
        fly(net, tmp_path, before=plant.before, on_fault="raise")
    assert diagnose(tmp_path).events[0].name == "norm2"


def test_accumulated_gradients(tmp_path: Path) -> None:
    """Each call of a layer is a row, and the ring holds the calls of all its steps."""
    net = make_net()
    with probes.flight_recorder(net, 3, tmp_path) as flight:
        for step in range(5):
            for part in range(2):
                images, labels = batch(2 * step + part)
                if (step, part) == (4, 1):
                    images[0, 0, 0, 0] = torch.nan
                loss = F.cross_entropy(net(images), labels)
                loss.backward()
            if step == 4:
                with pytest.warns(RuntimeWarning, match="step 4, in the forward pass: the input of layer norm1"):
                    flight.step(1.0)
            else:
                flight.step(1.0)
            net.zero_grad()
    recording = probes.load(tmp_path)
    assert recording.steps.tolist() == [2, 2, 3, 3, 4, 4] and recording.calls.tolist() == [0, 1] * 3


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_torch_compile(tmp_path: Path, backend: str) -> None:
    """The network compiles in the first step, and once more after the fault, without records."""
    net = make_net()
    torch.compiler.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(net, backend=counter, fullgraph=True)
    frames = []

    def before(step: int) -> None:
        frames.append(counter.frame_count)
        if step == FAULT_AT:
            net.conv3.weight.data[2, 0, 0, 0] = torch.nan

    with pytest.warns(RuntimeWarning, match="conv3.weight, is not finite"):
        flight = fly(net, tmp_path, forward=compiled, before=before)
    assert [event[1:5] for event in flight.fault.events[:2]] == [
        (FAULT_AT, "parameters", "conv3.weight", None),
        (FAULT_AT, "forward", "norm3", 2),
    ]
    assert frames[1] == frames[FAULT_AT] == frames[-1] - 1


@pytest.mark.gpu
def test_a_captured_step(tmp_path: Path) -> None:
    """The device decides in replays of a CUDA graph. The host asks between them, and later rows are not kept."""
    net = make_net(device="cuda")
    images, labels = batch(0, device="cuda")

    def step(flight: probes.FlightRecorder) -> None:
        loss = F.cross_entropy(net(images), labels)
        loss.backward()
        flight.step(loss)
        net.zero_grad(set_to_none=False)

    with probes.flight_recorder(net, 4, tmp_path) as flight:
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            for _ in range(3):
                step(flight)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step(flight)
        flight.rewind(0)
        for k in range(FAULT_AT + 3):
            if k == FAULT_AT:
                images[0, 1, 0, 0] = torch.inf
            graph.replay()
            assert k > FAULT_AT or flight.fault is None
        with pytest.warns(RuntimeWarning, match="First seen at step 5, in the forward pass: the input of layer norm1"):
            flight.poll(wait=True)
    assert probes.load(tmp_path).steps.tolist() == [2, 3, 4, 5]


def test_ranks(tmp_path: Path) -> None:
    """The rank whose batch has the value is named, although the averaged gradients spread it to all ranks."""
    ranks = Ranks(2)
    try:
        ranks.run(fly_rank, [(str(tmp_path), rank) for rank in range(2)])
    finally:
        ranks.end()
    found = diagnose(tmp_path)
    assert found.rank == 1
    assert found.sentence.startswith("First seen at step 2 on rank 1, in the forward pass: the input of layer norm1")


def test_the_command_prints_and_draws_the_report(tmp_path: Path) -> None:
    net = make_net()
    plant = Plant(net.conv2, one_value(torch.inf, 3))
    with pytest.warns(RuntimeWarning):
        fly(net, tmp_path, before=plant.before)
    show = [sys.executable, "-m", "bnkern.probes", "show"]
    done = subprocess.run([*show, str(tmp_path)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "First seen at step 5, in the forward pass: the input of layer norm2, channel 3" in done.stdout
    assert "Further faults of this step, in order:" in done.stdout
    assert (tmp_path / "flight.png").stat().st_size > 10_000
    missing = subprocess.run([*show, str(tmp_path / "none")], capture_output=True, text=True, cwd=ROOT)
    assert missing.returncode == 2 and "no report of a flight recorder" in missing.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"on_fault": "stop"}, 'on_fault must be "warn" or "raise"'),
        ({"limits": {"weight": 1.0}}, "no limit is called 'weight'; there are loss, abs_max, gradient, update, active"),
    ],
)
def test_wrong_arguments(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message), probes.flight_recorder(make_net(), out=tmp_path, **options):
        pass


def test_a_report_is_not_overwritten_and_a_network_without_norm_layers_is_refused(tmp_path: Path) -> None:
    with probes.flight_recorder(make_net(), out=tmp_path) as flight:
        flight.write()
    with pytest.raises(ValueError, match="has a report already"), probes.flight_recorder(make_net(), out=tmp_path):
        pass
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    with (
        pytest.raises(ValueError, match=r"not one of bnkern.nn's norm layers"),
        probes.flight_recorder(net, out=tmp_path / "other"),
    ):
        pass
