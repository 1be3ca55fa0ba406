"""One step: torch's SGD on the gradients of the network, divergence, and no synchronisation with the host."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from bnkern.train.loop import build
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
    losses, right = [], []
    for index in range(5):
        before = torch.nn.utils.parameters_to_vector(network.parameters()).detach()
        x, labels = step.batches.at(0, index)
        logits = network(x.contiguous())
        loss = F.cross_entropy(logits, labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
        right.append((logits.argmax(1) == labels).sum().item())
        step()
    for name, value in network.state_dict().items():
        torch.testing.assert_close(step.network.state_dict()[name], value, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(before_of(step), before, rtol=1e-9, atol=1e-11)
    # the ring has log_every = 4 places, so step 4 overwrites step 0
    expected = torch.tensor([losses[4], *losses[1:4]], dtype=torch.float64)
    torch.testing.assert_close(step.ring[:, 0], expected, rtol=1e-9, atol=0)
    assert step.ring[:, 1].tolist() == [right[4], *right[1:4]]
    assert (step.taken.item(), step.index.item(), step.diverged.item()) == (5, 5, -1)


def flat(step: Step) -> torch.Tensor:
    return torch.nn.utils.parameters_to_vector(step.network.parameters()).detach()


def before_of(step: Step) -> torch.Tensor:
    return torch.cat([t.flatten() for t in step.before_by_name().values()])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6], ids=str)
def test_after_divergence_nothing_moves(value: float) -> None:
    """A bad loss at step 2, through the classifier: no parameter, before or after the update, and no velocity changes."""
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
    for name, was in zip(names, velocity, strict=True):
        if name.startswith("velocity"):
            assert torch.equal(step.state_dict()[name], was), name
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
    was = flat(step)
    step()
    assert step.diverged.item() == 0
    assert torch.equal(flat(step).nan_to_num(), was.nan_to_num())


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
    one, other = (stepper(config, images()) for _ in range(2))
    one()
    other.load_state_dict({name: t.clone() for name, t in one.state_dict().items()})
    other.network.load_state_dict(one.network.state_dict())
    for step in (one, other):
        step()
        step()
    assert torch.equal(flat(one), flat(other)) and torch.equal(before_of(one), before_of(other))
    assert torch.equal(one.ring, other.ring)
    shapes = {name: p.shape for name, p in one.network.named_parameters()}
    assert {name: t.shape for name, t in one.before_by_name().items()} == shapes
    assert {name: t.shape for name, t in one.velocity_by_name().items()} == shapes


def test_a_probe_sees_every_loss_and_the_gradients() -> None:
    step = stepper(tiny(), images())
    recorded = []
    step._probe = lambda loss: recorded.append((loss.item(), step.network.conv.weight.grad.abs().sum().item()))
    step()
    step()
    assert [loss for loss, _ in recorded] == step.ring[:2, 0].tolist()
    assert all(total > 0 for _, total in recorded)


def test_compiled_step_is_the_same_step() -> None:
    """aot_eager uses the same kernels. The subject is that torch.compile loses no part of the step."""
    config = tiny(lr=0.01, precision="fp64")
    eager, compiled = (stepper(config, images()) for _ in range(2))
    compiled._model = torch.compile(compiled.network, backend="aot_eager", fullgraph=True)
    for step in (eager, compiled):
        step()
        step()
    torch.testing.assert_close(flat(eager), flat(compiled), rtol=1e-9, atol=1e-11)
