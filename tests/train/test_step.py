"""One step: torch's SGD on the gradients of the network, divergence, and no synchronisation with the host."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from bnkern import backends
from bnkern.backends import cpu
from bnkern.train.loop import build
from bnkern.train.sgd import Sgd
from bnkern.train.step import Step
from tests.train.training import images, stepper, tiny


@pytest.mark.parametrize("norm", ["batch", "none"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
def test_a_step_is_torchs_sgd_on_torchs_network(norm: str, channels_last: bool) -> None:
    """Five steps in float64 agree to 1e-9, because only the order of sums differs. lr 1/64 is exact in float32."""
    config = tiny(norm=norm, precision="fp64", lr=1 / 64, weight_decay=0.01, channels_last=channels_last)
    step = stepper(config, images())
    torch.manual_seed(config.seed)
    network = build(config.replace(kernels="torch", channels_last=False))
    optimiser = torch.optim.SGD(network.parameters(), lr=1 / 64, momentum=0.9, weight_decay=0.01)
    losses, correct = [], []
    for index in range(5):
        before = torch.nn.utils.parameters_to_vector(network.parameters()).detach()
        x, labels = step.batches.at(0, index)
        logits = network(x.contiguous())
        loss = F.cross_entropy(logits, labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
        correct.append((logits.argmax(1) == labels).sum().item())
        step()
    for name, value in network.state_dict().items():
        torch.testing.assert_close(step.network.state_dict()[name], value, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(before_of(step), before, rtol=1e-9, atol=1e-11)
    # the ring has log_every = 4 places, so step 4 overwrites step 0
    expected = torch.tensor([losses[4], *losses[1:4]], dtype=torch.float64)
    torch.testing.assert_close(step.ring[:, 0], expected, rtol=1e-9, atol=0)
    assert step.ring[:, 1].tolist() == [correct[4], *correct[1:4]]
    assert (step.taken.item(), step.index.item(), step.diverged.item()) == (5, 5, -1)


def flat(step: Step) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in step.network.parameters()])


def before_of(step: Step) -> torch.Tensor:
    return torch.cat([t.flatten() for t in step.before_by_name().values()])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6], ids=str)
def test_after_divergence_nothing_changes(value: float) -> None:
    """A bad loss at step 2, through the classifier. Parameters, those before the update, and velocities stay."""
    step = stepper(tiny(norm="none", lr=0.01, precision="fp64"), images())
    step()
    after_first = flat(step)
    step()
    before = after_first.clone()
    step.network.fc.bias.data[3] = value
    after = flat(step)
    velocity = [v.clone() for v in step.state_dict().values()]
    names = list(step.state_dict())
    for later in range(3):
        step()
        assert step.diverged.item() == 2
        assert torch.equal(flat(step).nan_to_num(), after.nan_to_num()), later
        assert torch.equal(before_of(step), before), later
    for name, expected in zip(names, velocity, strict=True):
        if name.startswith("velocity"):
            assert torch.equal(step.state_dict()[name], expected), name
    assert step.taken.item() == 5


def test_a_large_loss_of_the_fresh_network_is_not_divergence() -> None:
    step = stepper(tiny(norm="none", lr=1e-9), images())
    step.network.fc.weight.data *= 1e5
    step()
    assert step.ring[0, 0] > 1e3 and step.diverged.item() == -1
    step()
    assert step.diverged.item() == 1


def test_a_loss_that_is_not_finite_is_divergence_even_at_first() -> None:
    step = stepper(tiny(), images())
    step.network.fc.bias.data[0] = float("nan")
    before = flat(step)
    step()
    assert step.diverged.item() == 0
    assert torch.equal(flat(step).nan_to_num(), before.nan_to_num())


class _Reads(TorchDispatchMode):
    """Records every operation whose result the host must wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.waits = 0, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        name = function.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select"):
            self.waits.append(name)
        return function(*args, **kwargs or {})


def test_the_host_reads_nothing_back() -> None:
    """Otherwise the step could not be captured on a GPU.

    Batches.fill is excluded, because on the CPU it may read its argument.
    """
    step = stepper(tiny(precision="bf16"), images())
    step.batches.fill(step.index, step._images, step._labels)
    step.batches.fill = lambda *filled: None
    with _Reads() as recorded:
        step()
    assert recorded.count > 100 and recorded.waits == []
    with _Reads() as recorded:
        step.diverged.item()
        step.ring.tolist()
    assert recorded.waits and set(recorded.waits) == {"_local_scalar_dense"}


def test_state_passes_to_another_step() -> None:
    """After one step, the same two steps in both have the same bits."""
    config = tiny(lr=0.01)
    first, second = (stepper(config, images()) for _ in range(2))
    first()
    second.load_state_dict({name: t.clone() for name, t in first.state_dict().items()})
    second.network.load_state_dict(first.network.state_dict())
    for step in (first, second):
        step()
        step()
    assert torch.equal(flat(first), flat(second)) and torch.equal(before_of(first), before_of(second))
    assert torch.equal(first.ring, second.ring)
    shapes = {name: p.shape for name, p in first.network.named_parameters()}
    assert {name: t.shape for name, t in first.before_by_name().items()} == shapes
    assert {name: t.shape for name, t in first.velocity_by_name().items()} == shapes


def test_the_state_of_an_earlier_version_is_loaded() -> None:
    """It has the parameters before the last update as one tensor, each in the order of its indices."""
    config = tiny(lr=0.01, channels_last=True)
    first, second = (stepper(config, images()) for _ in range(2))
    first()
    state = {name: t.clone() for name, t in first.state_dict().items() if not name.startswith("before")}
    state["before"] = before_of(first)
    second.network.load_state_dict(first.network.state_dict())
    second.load_state_dict(state)
    for name, t in first.state_dict().items():
        assert torch.equal(t, second.state_dict()[name]), name


def test_weights_that_the_update_rounds_are_those_that_autocast_casts(monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without bfloat16 copies of the weights, parameters and evaluations have the same bits."""
    for channels_last in (False, True):
        config = tiny(lr=0.05, precision="bf16", channels_last=channels_last)
        first = stepper(config, images())
        with monkeypatch.context() as patch:
            patch.setattr("bnkern.train.step.Sgd", lambda *args: Sgd(*args[:3]))
            second = stepper(config, images())
        assert first.network.conv.weight.grad_dtype is None and second.network.conv.weight.grad_dtype is torch.float32
        for _ in range(3):
            first()
            second()
            for (name, p), q in zip(first.network.named_parameters(), second.network.parameters(), strict=True):
                assert torch.equal(p, q), name
                assert torch.equal(p.grad.float(), q.grad), name
        assert first.network.conv.weight.grad.dtype is torch.bfloat16
        # a state from elsewhere, whose weights must be rounded again
        second.network.fc.weight.data *= 2
        first.network.load_state_dict(second.network.state_dict())
        first.load_state_dict(second.state_dict())
        first()
        second()
        assert torch.equal(flat(first), flat(second))


def test_a_network_whose_parameters_have_gaps_is_refused() -> None:
    network = torch.nn.Linear(4, 3)
    network.weight.data = torch.zeros(3, 8)[:, ::2]
    with pytest.raises(ValueError, match=r"parameter weight must be contiguous or channels_last, got strides \(8, 2\)"):
        Sgd(network, 0.9, 0.0)


# Operations that launch nothing on a GPU, and those of the 3 running statistics of each batch norm, which only the
# operator copies. The operator serves here because a mode records the step.
_VIEWS = ("detach", "t", "view", "_unsafe_view", "unsqueeze", "select", "slice", "expand", "alias", "as_strided")
_KINDS = {
    "convolution": ("convolution", "convolution_backward"),
    "batch norm": ("batch_norm_forward", "batch_norm_backward"),
    "cast": ("_to_copy",),
    "clone": ("clone",),
    "addition": ("add",),
}


class _Launches(TorchDispatchMode):
    """Counts the operations of a step by kind, and the calls of the kernel of the update."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.counts = Counter()
        update = cpu.update

        def counted(*args: object) -> None:
            self.counts["update"] += 1
            update(*args)

        monkeypatch.setattr(cpu, "update", counted)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name not in _VIEWS:
            self.counts[next((kind for kind, names in _KINDS.items() if name in names), "other")] += 1
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize(("precision", "casts"), [("fp32", 2), ("bf16", 4)])
def test_operations_of_a_step(precision: str, casts: int, channels_last: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """ResNet-20 with its 19 convolutions, 2 projections and 9 blocks.

    A mode that records the step excludes chains, so these are the operations of a step without chains, as on a GPU.
    The casts are those of the loss to float64, of the number of right answers, and in bfloat16 of the logits and their
    gradient. The additions are those of the shortcuts' gradients. Before there was one kernel for the update there were
    19 clones in channels_last, and 50 casts in bfloat16.
    """
    step = stepper(tiny(depth=20, batch=2, precision=precision, channels_last=channels_last), images())
    step.batches.fill(step.index, step._images, step._labels)
    step.batches.fill = lambda *filled: None
    with _Launches(monkeypatch) as recorded:
        step()
    norms = 21
    recorded.counts["other"] -= 3 * norms
    kinds = {"convolution": 2 * 21, "batch norm": 2 * norms, "cast": casts, "clone": 0, "addition": 9, "update": 1}
    assert recorded.counts == Counter(kinds | {"other": 34})


def test_chains_add_the_gradients_of_their_shortcuts() -> None:
    """Of the 9 additions of shortcuts' gradients only those of the 2 blocks that change the shape are left."""
    if backends.choose(None, torch.device("cpu"), torch.float32) is not cpu:
        pytest.skip("the CPU's backend does not serve here")
    step = stepper(tiny(depth=20, batch=32, precision="fp32", channels_last=True), images())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        step()
    assert sum("Chain" in event.name and "Backward" not in event.name for event in profile.events()) >= 3
    additions = [e for e in profile.events() if e.name in ("aten::add", "aten::add_") and len(e.input_shapes[0]) == 4]
    assert len(additions) <= 2, additions


def test_a_recorded_step_is_one_replay() -> None:
    """Nothing is done per layer in Python: no module is called, and no operation is dispatched."""
    step = stepper(tiny(), images())
    replays = []
    step._graph = SimpleNamespace(replay=lambda: replays.append(1))
    step._model = step._sgd = None  # a use of the network or of the parameters would fail
    with _Reads() as recorded:
        step()
    assert replays == [1] and recorded.count == 0


def test_a_probe_receives_every_loss_and_the_gradients() -> None:
    step = stepper(tiny(), images())
    recorded = []
    step._observers.append(
        lambda loss: recorded.append((loss.item(), step.network.conv.weight.grad.abs().sum().item()))
    )
    step()
    step()
    assert [loss for loss, _ in recorded] == step.ring[:2, 0].tolist()
    assert all(total > 0 for _, total in recorded)


@pytest.mark.parametrize("precision", ["fp64", "bf16"])
def test_compiled_step_is_the_same_step(precision: str) -> None:
    """aot_eager uses the same kernels. The subject is that torch.compile loses no part of the step."""
    config = tiny(lr=0.01, precision=precision)
    eager = stepper(config, images())
    compiled = stepper(config, images(), lambda network: torch.compile(network, backend="aot_eager", fullgraph=True))
    for step in (eager, compiled):
        step()
        step()
    torch.testing.assert_close(flat(eager), flat(compiled), rtol=1e-9, atol=1e-11)
