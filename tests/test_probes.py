"""Recording: every quantity against its oracle, the steps' bookkeeping, the files, and that nothing changes a bit."""

import copy
import json
import os
import pickle
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import bnkern
from bnkern import probes
from bnkern.probes import files
from bnkern.probes.quantities import make
from tests.cases import TARGETS, Target

CHANNEL = ["activation_moments", "gradient_channel_signs"]


class Net(nn.Module):
    """Three convolutions, norm layers with and without residual and ReLU, and a classifier."""

    def __init__(self, norm: bool = True) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, stride=2, padding=1, bias=False)
        self.conv3 = bnkern.nn.Conv2d(6, 6, 1, bias=False)
        self.norm1, self.norm2, self.norm3 = (
            bnkern.nn.BatchNorm2d(6, act=act) if norm else bnkern.nn.Activation(act) for act in ("relu", "relu", None)
        )
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.conv1(x))
        y = self.norm2(self.conv2(x))
        y = self.norm3(self.conv3(y), y)
        return self.fc(y.mean((2, 3)))


def make_net(norm: bool = True, layout: str = "contiguous", device: str = "cpu") -> Net:
    torch.manual_seed(0)
    formats = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
    return Net(norm).to(device, memory_format=formats[layout])


def batch(step: int, size: int = 5, device: str = "cpu") -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(size, 3, 7, 7, generator=generator)
    return images.to(device), torch.randint(4, (size,), generator=generator).to(device)


def train(net: nn.Module, steps: int, rec: probes.Recorder | None = None, forward: Callable | None = None) -> None:
    device = next(net.parameters()).device
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    for step in range(steps):
        images, labels = batch(step, device=device)
        loss = F.cross_entropy((net if forward is None else forward)(images), labels)
        loss.backward()
        optimizer.step()
        if rec is not None:
            rec.step(loss)
        optimizer.zero_grad()


@pytest.fixture(params=TARGETS, ids=str)
def target(request: pytest.FixtureRequest) -> Iterator[Target]:
    with bnkern.use_backend(request.param.backend):
        yield request.param


# ---------------------------------------------------------------------------------------- quantities and their oracles


class Seen:
    """What plain hooks show of one forward and backward: inputs, outputs and their gradients, by layer."""

    def __init__(self, net: nn.Module) -> None:
        self.x, self.y, self.residual, self.dy = {}, {}, {}, {}
        for name, module in net.named_modules():
            module.register_forward_hook(self._hook(name))

    def _hook(self, name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, y: Tensor) -> None:
            self.x[name], self.y[name] = args[0].detach(), y.detach()
            self.residual[name] = args[1].detach() if len(args) > 1 else None
            y.register_hook(lambda dy: self.dy.__setitem__(name, dy.detach()))

        return hook


def compare(ours: dict[str, np.ndarray], oracle: dict[str, Tensor], what: str) -> None:
    """Against float64 sums over the same stored values. fp32 partial sums of some hundred summands are right to a few
    1e-7 of the sum of magnitudes: for signed values, which cancel, that is the floor."""
    for name, expected in oracle.items():
        expected, found = np.asarray(expected, dtype=float), ours[name][0]
        assert found.shape == expected.shape, (what, name)
        if name in ("count", "positive", "negative", "zero", "min", "max", "abs_max", "histogram") or (
            name.endswith(("sign_sum", "nonzero"))
        ):
            np.testing.assert_array_equal(found, expected, f"{what} {name}")
            continue
        scale = np.abs(expected).max()
        if name in ("sum", "bias_sum", "weight_sum"):
            scale = np.asarray(oracle[name.replace("sum", "abs_sum")]).max()
        elif name.endswith("ratio"):
            scale = max(scale, 1)
        elif name == "third":
            scale = max(scale, np.asarray(oracle["var"]).max() ** 1.5)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-6 * scale, err_msg=f"{what} {name}")


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("norm", [True, False], ids=["batch_norm", "no_norm"])
def test_quantities_agree_with_their_oracles(target: Target, norm: bool, layout: str, tmp_path: Path) -> None:
    net = make_net(norm, layout, target.device)
    wanted = [*CHANNEL, "signal_propagation", "weight_gradient_signs", "parameter_gradient_histogram"]
    wanted += [make("output_gradient", layers="fc"), make("output_moments", layers=["fc", "norm1"])]
    wanted += ["affine_gradient_signs"] if norm else []
    with probes.record(net, wanted, out=tmp_path) as rec:
        seen = Seen(net)
        images, labels = batch(0, device=target.device)
        F.cross_entropy(net(images), labels).backward()
        rec.step()
    found = probes.load(tmp_path)
    assert found.quantities == [q if isinstance(q, str) else q.name for q in wanted]

    for layer in ("norm1", "norm2", "norm3"):
        module, conv = getattr(net, layer), layer.replace("norm", "conv")
        x, y = seen.x[layer], seen.y[layer]
        oracle = make("activation_moments").oracle(x, y)
        compare(found["activation_moments"][layer], oracle, layer)
        compare(found["gradient_channel_signs"][layer], make("gradient_channel_signs").oracle(seen.dy[conv]), layer)
        if norm:
            var, mean = torch.var_mean(x, (0, 2, 3), correction=0, keepdim=True)
            xhat = (x - mean) * torch.rsqrt(var + module.eps)
            g = seen.dy[layer] * (y > 0) if module.act else seen.dy[layer]
            signs = make("affine_gradient_signs").oracle(g, xhat)
            compare(found["affine_gradient_signs"][layer], signs, layer)
            np.testing.assert_allclose(
                found["affine_gradient_signs"][layer]["bias_sum"][0], module.bias.grad, rtol=1e-5, atol=1e-7
            )
    for layer in ("conv1", "conv2", "conv3"):
        module = getattr(net, layer)
        oracle = make("weight_gradient_signs").oracle(seen.x[layer], seen.dy[layer], module)
        ours = found["weight_gradient_signs"][layer]
        # The ratio of a sum that cancels carries the sum's relative error: compared where it is not all rounding.
        oracle = {name: value.numpy() for name, value in oracle.items()}
        safe = np.abs(oracle["sum"]) > 1e-3 * oracle["abs_sum"]
        ratio, expected = ours.pop("ratio")[0], oracle.pop("ratio")
        np.testing.assert_allclose(ratio[safe], expected[safe], rtol=1e-2)
        compare(ours, oracle, layer)
        np.testing.assert_allclose(ours["sum"][0], module.weight.grad, rtol=1e-4, atol=1e-6)
    compare(found["output_gradient"]["fc"], make("output_gradient").oracle(seen.dy["fc"]), "fc")
    for layer in ("fc", "norm1"):
        compare(found["output_moments"][layer], make("output_moments").oracle(seen.y[layer]), layer)
    for name, parameter in net.named_parameters():
        oracle = make("parameter_gradient_histogram").oracle(parameter.grad)
        compare(found["parameter_gradient_histogram"][name], oracle, name)
    x, y, residual = seen.x["norm3"], seen.y["norm3"], seen.residual["norm3"]
    branch = y - residual if norm else x
    compare(found["signal_propagation"]["norm3"], make("signal_propagation").oracle(y, branch, residual), "norm3")
    assert found.layers("signal_propagation") == ["norm3"], "only norm layers that add a residual end a block"


@pytest.mark.parametrize("form", ["summary", "channels"])
def test_reduced_forms_of_weight_gradient_signs(form: str, tmp_path: Path) -> None:
    net = make_net()
    quantities = [make("weight_gradient_signs", form=form)]
    with (
        probes.record(net, quantities, out=tmp_path / form) as rec,
        probes.record(net, ["weight_gradient_signs"], out=tmp_path / "full") as full,
    ):
        images, labels = batch(0)
        F.cross_entropy(net(images), labels).backward()
        rec.step(), full.step()
    reduced = probes.load(tmp_path / form)["weight_gradient_signs"]["conv2"]
    sums = probes.load(tmp_path / "full")["weight_gradient_signs"]["conv2"]
    if form == "channels":
        np.testing.assert_allclose(reduced["abs_of_sum"], np.abs(sums["sum"]).sum((3, 4)))
        np.testing.assert_allclose(reduced["abs_sum"], sums["abs_sum"].sum((3, 4)))
    else:
        a, b = sums["abs_sum"].mean(), np.abs(sums["sum"]).mean()
        np.testing.assert_allclose(reduced["ratio"], a / b)
        assert reduced["places"] == 5 * 4 * 4
        np.testing.assert_allclose(reduced["ratio_sqrt"], a / b / np.sqrt(80))
        agreement = np.abs(sums["sign_sum"]).mean() / sums["nonzero"].mean()
        np.testing.assert_allclose(reduced["agreement"], agreement)


@pytest.mark.parametrize("centred", ["input", "gradient"])
def test_centred_weight_gradient_signs(target: Target, centred: str, tmp_path: Path) -> None:
    """The oracle on an x or dy that lost its channels' means; the gradient itself stays as it is."""
    net, plain = make_net(device=target.device), make_net(device=target.device)
    quantity = make("weight_gradient_signs", layers="conv[23]", centred=centred)
    images, labels = batch(0, device=target.device)
    F.cross_entropy(plain(images), labels).backward()
    with probes.record(net, [quantity], out=tmp_path) as rec:
        seen = Seen(net)
        F.cross_entropy(net(images), labels).backward()
        rec.step()
    for layer in ("conv2", "conv3"):
        x, dy = (t - t.mean((0, 2, 3), keepdim=True) * (which == centred) for which, t in (
            ("input", seen.x[layer]), ("gradient", seen.dy[layer])
        ))  # fmt: skip
        oracle = quantity.oracle(x, dy, getattr(net, layer))
        kept = {name: oracle[name] for name in ("sum", "abs_sum", "sign_sum", "nonzero")}
        compare(probes.load(tmp_path)["weight_gradient_signs"][layer], kept, layer)
        assert torch.equal(getattr(net, layer).weight.grad, getattr(plain, layer).weight.grad)


@pytest.mark.parametrize("divided", [True, False])
def test_gradient_noise_scale(divided: bool, tmp_path: Path) -> None:
    net, parts = make_net(norm=False), []
    noise = make("gradient_noise_scale", part=5, divided=divided)
    with probes.record(net, [noise], out=tmp_path) as rec:
        for step in range(2):
            for part in range(3):
                images, labels = batch(3 * step + part)
                twin = copy.deepcopy(net)
                gradients = torch.autograd.grad(F.cross_entropy(twin(images), labels), list(twin.parameters()))
                loss = F.cross_entropy(net(images), labels)
                parts.append(torch.cat([g.flatten() for g in gradients]))
                (loss / 3 if divided else loss).backward()
            rec.step()
            net.zero_grad()
    found = probes.load(tmp_path)["gradient_noise_scale"][""]
    for step in range(2):
        for name, value in noise.oracle(parts[3 * step : 3 * step + 3], part=5).items():
            np.testing.assert_allclose(found[name][step], value, rtol=1e-4, err_msg=name)


def test_gradient_noise_of_known_gaussians() -> None:
    """The estimator is unbiased: over many draws its means are tr Sigma and |G|^2."""
    generator = torch.Generator().manual_seed(0)
    truth, sigma, part, k = torch.randn(50, generator=generator), 3.0, 4, 5
    draws = [
        make("gradient_noise_scale").oracle(
            [truth + sigma / part**0.5 * torch.randn(50, generator=generator) for _ in range(k)], part
        )
        for _ in range(2000)
    ]
    noise, square = (np.mean([draw[name] for draw in draws]) for name in ("noise", "square"))
    assert noise == pytest.approx(50 * sigma**2, rel=0.02)  # 2000 draws: standard error 0.2 % and 0.6 %
    assert square == pytest.approx(float(truth.square().sum()), rel=0.03)


def test_the_histogram_takes_zeros_infinities_and_the_smallest_numbers(tmp_path: Path) -> None:
    net = nn.Linear(6, 1, bias=False)
    values = torch.tensor([[0.0, 2.0**-70, -(2.0**-60), 1.0, -2.0, 2.0**30]])
    with probes.record(net, ["parameter_gradient_histogram"], out=tmp_path) as rec:
        net.weight.grad = values
        rec.step()
    found = probes.load(tmp_path)["parameter_gradient_histogram"]["weight"]
    edges, counts = found["edges"][0], found["histogram"][0]
    assert counts.sum() == 6
    for value, expected in ((0.0, 3), (1.0, 1), (-2.0, 1), (2.0**23.99, 1)):  # the last: what lies beyond the edges
        (k,) = np.flatnonzero((edges[:-1] <= value) & (value < edges[1:]))
        assert counts[k] == expected, value


# -------------------------------------------------------------------------------------------------- neutral to the bit

SCHEDULES = {
    "every": probes.every(1),
    "every_third": probes.every(3, start=1),
    "steps": probes.steps([0, 7, 19]),
    "log_spaced": probes.log_spaced(3),
    "while_loss": probes.while_loss(above=1.2),
}
EVERYTHING = [
    *CHANNEL,
    "signal_propagation",
    "weight_gradient_signs",
    "output_gradient",
    "output_moments",
    "parameter_gradient_histogram",
]


@pytest.mark.parametrize("norm", [True, False], ids=["batch_norm", "no_norm"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_recording_never_changes_a_bit(target: Target, schedule: str, norm: bool, tmp_path: Path) -> None:
    plain, probed = make_net(norm, device=target.device), make_net(norm, device=target.device)
    train(plain, 20)
    with probes.record(probed, EVERYTHING, SCHEDULES[schedule], tmp_path) as rec:
        train(probed, 20, rec)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, probed.state_dict()[name]), name
    assert len(probes.load(tmp_path).steps) > 0


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_host_and_device_decide_alike(schedule: str, tmp_path: Path) -> None:
    """Counting steps and deciding by tensors on the device records the same steps and numbers."""
    recorded = []
    for on_device in (False, True):
        net, out = make_net(), tmp_path / str(on_device)
        with probes.record(net, CHANNEL, SCHEDULES[schedule], out, on_device=on_device, first_step=3) as rec:
            train(net, 20, rec)
        recorded.append(probes.load(out))
    host, device = recorded
    np.testing.assert_array_equal(host.steps, device.steps)
    np.testing.assert_array_equal(
        host["activation_moments"]["norm1"]["mean"], device["activation_moments"]["norm1"]["mean"]
    )
    if schedule != "while_loss":
        assert host.steps.tolist() == [step for step in range(3, 23) if SCHEDULES[schedule](step)]
    else:
        assert len(host.steps) >= 3 and host.steps[0] == 3


@pytest.mark.parametrize("schedule", ["every_third", "while_loss"])
def test_steps_before_the_first_record_count(schedule: str, tmp_path: Path) -> None:
    """Layers whose channels show at their first call, in eval mode at first: nothing tells the device, steps pass."""
    recorded = []
    for on_device in (False, True):
        net, out = make_net(norm=False), tmp_path / str(on_device)
        with probes.record(net, CHANNEL, SCHEDULES[schedule], out, on_device=on_device, first_step=2) as rec:
            net.eval()
            for loss in (3.0, 0.5):
                net(batch(0)[0])
                rec.step(torch.tensor(loss))
            train(net.train(), 8, rec)
        recorded.append(probes.load(out).steps.tolist())
    host, device = recorded
    assert host == device
    if schedule == "while_loss":
        assert host and 4 not in host, "the loss before the first record was small"
    else:
        assert host == [4, 7, 10]


def test_schedules() -> None:
    assert [s for s in range(12) if probes.every(4, start=3)(s)] == [3, 7, 11]
    assert sorted(probes.log_spaced(1, until=1000).chosen) == [0, 1, 10, 100, 1000]
    assert max(probes.log_spaced(7, until=500).chosen) <= 500
    assert probes.while_loss(2.0)(5, float("nan")) and not probes.while_loss(2.0)(5, 1.0)
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        probes.every(0)


# ------------------------------------------------------------------------------------------------------- bookkeeping


def test_two_forwards_before_a_backward_are_kept_apart(tmp_path: Path) -> None:
    net = make_net()
    with probes.record(net, CHANNEL, out=tmp_path) as rec:
        for _ in range(2):
            losses = []
            for part in range(2):
                images, labels = batch(part)
                losses.append(F.cross_entropy(net(images), labels))
            sum(losses).backward()
            rec.step()
    found = probes.load(tmp_path)
    assert found.steps.tolist() == [0, 0, 1, 1] and found.calls.tolist() == [0, 1, 0, 1]
    means = found["activation_moments"]["norm1"]["mean"]
    for row, part in enumerate((0, 1, 0, 1)):
        with torch.no_grad():
            np.testing.assert_allclose(means[row], net.conv1(batch(part)[0]).mean((0, 2, 3)), atol=1e-6)
    sums = found["gradient_channel_signs"]["norm1"]["abs_sum"]
    assert not np.array_equal(sums[0], sums[1])
    np.testing.assert_array_equal(sums[:2], sums[2:])


def test_accumulated_parts_stay_within_one_step(tmp_path: Path) -> None:
    net = make_net()
    with probes.record(net, [*CHANNEL, "weight_gradient_signs"], out=tmp_path) as rec:
        for step in range(3):
            for part in range(2):
                images, labels = batch(2 * step + part)
                F.cross_entropy(net(images), labels).backward()
            rec.step()
    found = probes.load(tmp_path)
    assert found.steps.tolist() == [0, 0, 1, 1, 2, 2]
    assert not np.isnan(found["weight_gradient_signs"]["conv2"]["sum"]).any()


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint_recomputation_is_not_another_call(reentrant: bool, tmp_path: Path) -> None:
    recorded = []
    for name in ("plain", "checkpointed"):
        net = make_net()

        def forward(x: Tensor, net: Net = net, name: str = name) -> Tensor:
            return net(x) if name == "plain" else checkpoint(net, x.requires_grad_(), use_reentrant=reentrant)

        with probes.record(net, [*CHANNEL, "weight_gradient_signs"], out=tmp_path / name) as rec:
            train(net, 3, rec, forward)
        recorded.append(probes.load(tmp_path / name))
    plain, again = recorded
    assert again.steps.tolist() == [0, 1, 2]
    for quantity in plain.quantities:
        for layer, arrays in plain[quantity].items():
            for key, values in arrays.items():
                np.testing.assert_array_equal(again[quantity][layer][key], values, f"{quantity} {layer} {key}")


def test_eval_passes_are_ignored_unless_asked(tmp_path: Path) -> None:
    for in_eval, expected in ((False, [0]), (True, [0, 0])):
        net, out = make_net(), tmp_path / str(in_eval)
        with probes.record(net, CHANNEL, out=out, in_eval=in_eval) as rec:
            images, labels = batch(0)
            F.cross_entropy(net(images), labels).backward()
            net.eval()
            with torch.no_grad():
                net(images)
            rec.step()
        assert probes.load(out).steps.tolist() == expected


def test_what_a_step_did_not_record_is_nan(tmp_path: Path) -> None:
    """A forward without a backward leaves no gradients of the step before."""
    net = make_net()
    with probes.record(net, CHANNEL, out=tmp_path) as rec:
        for step in range(2):
            out = net(batch(step)[0])
            if step == 0:
                out.sum().backward()
            rec.step()
    found = probes.load(tmp_path)
    assert not np.isnan(found["activation_moments"]["norm1"]["mean"]).any()
    assert np.isnan(found["gradient_channel_signs"]["norm1"]["sum"][1]).all()


def test_a_layer_that_joins_late(tmp_path: Path) -> None:
    """Layers whose channels show at the first call, and layers first called in a later step, find a place."""
    net = nn.ModuleDict({"a": bnkern.nn.Activation(), "b": bnkern.nn.Activation()})
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    with probes.record(net, CHANNEL, out=tmp_path) as rec:
        for step in range(3):
            y = net["a"](x * (step + 1))
            (net["b"](y[:, :2]) if step == 1 else y).sum().backward()
            rec.step()
    found = probes.load(tmp_path)
    assert found.steps.tolist() == [0, 1, 2]
    means = found["activation_moments"]["b"]["mean"]
    assert np.isnan(means[[0, 2]]).all() and not np.isnan(means[1]).any() and means.shape == (3, 2)


def test_several_recordings_at_once(tmp_path: Path) -> None:
    net, alone = make_net(), make_net()
    with probes.record(alone, CHANNEL, out=tmp_path / "alone") as rec:
        train(alone, 4, rec)
    with probes.record(net, CHANNEL, out=tmp_path / "outer") as outer:
        images, labels = batch(0)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
        for step in range(4):
            images, labels = batch(step)
            with probes.record(net, ["activation_moments"], out=tmp_path / f"inner{step}", first_step=step) as inner:
                F.cross_entropy(net(images), labels).backward()
                inner.step()
            optimizer.step()
            outer.step()
            optimizer.zero_grad()
    expected, found = probes.load(tmp_path / "alone"), probes.load(tmp_path / "outer")
    for quantity in CHANNEL:
        for name, values in expected[quantity]["norm2"].items():
            np.testing.assert_array_equal(found[quantity]["norm2"][name], values, name)
    inner = probes.load(tmp_path / "inner3")
    assert inner.steps.tolist() == [3]
    for name, values in expected["activation_moments"]["norm2"].items():
        np.testing.assert_array_equal(inner["activation_moments"]["norm2"][name][0], values[3], name)
    assert not net.norm1.taps and not net.norm1._forward_hooks and not net.conv1._forward_hooks


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))], ids=["deep", "pickle"])
def test_a_copy_of_a_recorded_model_is_not_recorded(copied: Callable, tmp_path: Path) -> None:
    net = make_net()
    with probes.record(net, [*CHANNEL, "weight_gradient_signs", "signal_propagation"], out=tmp_path) as rec:
        twin = copied(net)
        train(twin, 1)
        images, labels = batch(0)
        F.cross_entropy(net(images), labels).backward()
        rec.step()
    found = probes.load(tmp_path)
    assert found.steps.tolist() == [0] and found.calls.tolist() == [0]
    assert set(net.state_dict()) == set(twin.state_dict())


# ------------------------------------------------------------------------------------------------------------- files


def test_files_are_readable_by_numpy_alone(tmp_path: Path) -> None:
    net = make_net()
    with probes.record(net, CHANNEL, probes.every(2), tmp_path) as rec:
        train(net, 5, rec)
    index = json.loads((tmp_path / "index.json").read_text())
    rows = index["quantities"]["activation_moments"]["rows"]
    with np.load(tmp_path / "part-000000.npz") as part:
        assert part["step"].tolist() == [0, 2, 4]
        values = part["activation_moments/norm2"]
    assert values.shape == (3, len(rows), 6) and values.dtype == np.float64
    assert (values[:, rows.index("count")] == 5 * 4 * 4).all()


def test_load_gives_named_arrays_and_columns(tmp_path: Path) -> None:
    net = make_net()
    with probes.record(net, CHANNEL, out=tmp_path) as rec:
        train(net, 4, rec)
    found = probes.load(tmp_path)
    stacked = found.array("activation_moments", "mean")
    assert stacked.shape == (3, 4, 6)  # layer, step, channel
    columns = found.table("gradient_channel_signs")
    assert {len(column) for column in columns.values()} == {3 * 4 * 6}
    chosen = (columns["layer"] == "norm2") & (columns["step"] == 3) & (columns["channel"] == 5)
    assert columns["abs_sum"][chosen] == found["gradient_channel_signs"]["norm2"]["abs_sum"][3, 5]
    with pytest.raises(KeyError, match="'weight' was not recorded; there are activation_moments"):
        found["weight"]
    with pytest.raises(FileNotFoundError, match=r"no recording in .*there is no index\.json"):
        probes.load(tmp_path / "nowhere")


def test_append_and_truncate_let_a_run_resume(tmp_path: Path) -> None:
    whole, net = tmp_path / "whole", make_net()
    with probes.record(net, CHANNEL, out=whole) as rec:
        train(net, 6, rec)
    resumed, net = tmp_path / "resumed", make_net()
    with probes.record(net, CHANNEL, out=resumed) as rec:
        train(net, 5, rec)
    with (
        pytest.raises(ValueError, match="holds records already; choose another folder, or append=True"),
        probes.record(net, CHANNEL, out=resumed),
    ):
        pass
    assert not net.norm1.taps
    probes.truncate(resumed, 3)
    assert probes.load(resumed).steps.tolist() == [0, 1, 2]
    net = make_net()
    with probes.record(net, CHANNEL, probes.every(1, start=3), resumed, append=True) as rec:
        train(net, 6, rec)
    expected, found = probes.load(whole), probes.load(resumed)
    assert found.steps.tolist() == list(range(6))
    np.testing.assert_array_equal(
        found["activation_moments"]["norm1"]["mean"], expected["activation_moments"]["norm1"]["mean"]
    )


def test_an_exception_in_training_leaves_what_was_closed(tmp_path: Path) -> None:
    net = make_net()
    with pytest.raises(KeyboardInterrupt), probes.record(net, CHANNEL, out=tmp_path) as rec:
        train(net, 3, rec)
        raise KeyboardInterrupt
    assert probes.load(tmp_path).steps.tolist() == [0, 1, 2]
    assert not net.norm1.taps


def test_a_killed_process_leaves_whole_files(tmp_path: Path) -> None:
    """At most what was not flushed is lost, and no part is half written."""
    code = f"""
        import os, signal
        from tests.test_probes import CHANNEL, make_net, train
        from bnkern import probes
        net = make_net()
        with probes.record(net, CHANNEL, out={str(tmp_path)!r}, capacity=3) as rec:
            train(net, 10, rec)
            while len(list(__import__("pathlib").Path({str(tmp_path)!r}).glob("part-*.npz"))) < 3:
                pass
            os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], timeout=120, cwd=Path(__file__).parents[1])
    assert done.returncode == -9
    assert probes.load(tmp_path).steps.tolist() == list(range(9))


def test_a_full_buffer_drops_the_newest_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = make_net()
    monkeypatch.setattr(files.Writer, "busy", lambda self: True)  # a disk that never catches up
    with (
        pytest.warns(UserWarning, match="7 records were dropped"),
        probes.record(net, CHANNEL, out=tmp_path, capacity=3) as rec,
    ):
        train(net, 10, rec)
        assert rec.dropped == 7
    found = probes.load(tmp_path)
    assert found.steps.tolist() == [0, 1, 2] and found.index["dropped"] == 7


def test_small_buffers_are_flushed_in_time(tmp_path: Path) -> None:
    net = make_net()
    with probes.record(net, CHANNEL, out=tmp_path, capacity=2) as rec:
        train(net, 7, rec)
        rec.flush()
        train(net, 2, rec)
    assert probes.load(tmp_path).steps.tolist() == list(range(9))
    assert len(files.parts(tmp_path)) >= 4


@pytest.mark.skipif(os.geteuid() == 0 and not Path("/dev/full").exists(), reason="needs a device that is full")
def test_a_full_disk_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, arrays: dict) -> None:
        with open("/dev/full", "wb") as file:
            file.write(bytes(1 << 16))

    monkeypatch.setattr(files, "write_part", full)
    net = make_net()
    with (
        pytest.raises(OSError, match=r"probes: cannot write to .*No space left"),
        probes.record(net, CHANNEL, out=tmp_path, capacity=1) as rec,
    ):
        train(net, 3, rec)


# ---------------------------------------------------------------------------------------------- layers, names, errors


def test_patterns_choose_layers(tmp_path: Path) -> None:
    net = make_net()
    quantities = [make("activation_moments", layers=["norm1", "*3"]), make("weight_gradient_signs", layers="conv[12]")]
    with probes.record(net, quantities, out=tmp_path, layers=["*1", "conv*"]) as rec:
        train(net, 1, rec)
    found = probes.load(tmp_path)
    assert found.layers("activation_moments") == ["norm1"]
    assert found.layers("weight_gradient_signs") == ["conv1", "conv2"]


def test_layers_that_cannot_be_served_are_named(tmp_path: Path) -> None:
    net = nn.Sequential(bnkern.nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 1))
    with (
        pytest.warns(UserWarning, match=r"2 layers cannot be recorded"),
        probes.record(net, ["activation_moments", "weight_gradient_signs"], out=tmp_path) as rec,
    ):
        assert rec.unserved == {
            ("activation_moments", "1"): "BatchNorm2d is not one of bnkern.nn's norm layers",
            ("weight_gradient_signs", "2"): "the convolution has 2 groups; 1 is served",
        }
        net(torch.randn(2, 4, 5, 5)).sum().backward()
        rec.step()
    assert probes.load(tmp_path).index["unserved"][0][1] == "1"


@pytest.mark.parametrize(
    ("quantities", "options", "message"),
    [
        (["activation"], {}, "no quantity is called 'activation'; there are activation_moments, affine"),
        (["activation_moments"], {"layers": "none*"}, "activation_moments finds no layer that it can serve"),
        (["signal_propagation"], {"layers": "conv*"}, "signal_propagation finds no layer"),
        (["activation_moments"], {"schedule": lambda step, loss: True, "on_device": True}, "one of bnkern.probes' own"),
    ],
)
def test_errors_at_the_door(quantities: list[str], options: dict, message: str, tmp_path: Path) -> None:
    net = make_net()
    with pytest.raises(ValueError, match=message), probes.record(net, quantities, out=tmp_path, **options):
        pass
    assert not net.norm1.taps and not net.conv1._forward_hooks
    with pytest.raises(ValueError, match="form must be one of full, summary, channels; got 'half'"):
        make("weight_gradient_signs", form="half")
    with pytest.raises(ValueError, match="sums must be among sum, abs_sum, sign_sum, nonzero"):
        make("weight_gradient_signs", sums=["squares"])
    with pytest.raises(ValueError, match="centred must be input, gradient or None; got 'both'"):
        make("weight_gradient_signs", centred="both")


def test_a_quantity_of_ones_own(tmp_path: Path) -> None:
    """A class given as it is: recorded like the others, read back by the names of its rows."""

    class Norms(probes.Quantity):
        name, rows = "parameter_norm", ("norm",)

        def concerns(self, module: nn.Module) -> bool:
            return isinstance(module, nn.Conv2d)

        def attach(self, recorder: probes.Recorder, layer: str, module: nn.Module) -> list:
            def measure() -> None:
                recorder.slot(self, layer, 0, (), module.weight.device)[0] = module.weight.detach().norm()

            return [recorder.at_step(measure)]

    probes.QUANTITIES.pop("parameter_norm")
    net = make_net()
    with probes.record(net, [Norms()], out=tmp_path) as rec:
        train(net, 2, rec)
    found = probes.load(tmp_path)["parameter_norm"]["conv2"]["norm"]
    assert found.shape == (2,) and found[1] == pytest.approx(float(net.conv2.weight.detach().norm()), rel=1e-6)


# ---------------------------------------------------------------------------------------- torch.compile, ranks, graphs


def test_torch_compile_recompiles_on_entering_and_never_again(tmp_path: Path) -> None:
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    eager, net = make_net(), make_net()
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    with probes.record(eager, [*CHANNEL, "affine_gradient_signs"], out=tmp_path / "eager") as rec:
        train(eager, 6, rec)
    train(copy.deepcopy(net), 1)
    compiled(batch(0)[0])
    before = counters["stats"]["unique_graphs"]
    net.load_state_dict(make_net().state_dict())
    with probes.record(net, [*CHANNEL, "affine_gradient_signs"], out=tmp_path / "compiled") as rec:
        train(net, 2, rec, compiled)
        assert counters["stats"]["unique_graphs"] == before + 1
    net.load_state_dict(make_net().state_dict())
    with probes.record(net, [*CHANNEL, "affine_gradient_signs"], out=tmp_path / "again") as rec:
        train(net, 6, rec, compiled)
    expected, found = probes.load(tmp_path / "eager"), probes.load(tmp_path / "again")
    assert found.steps.tolist() == list(range(6))
    for quantity in expected.quantities:
        for name, values in expected[quantity]["norm2"].items():
            scale = np.nanmax(np.abs(values))
            np.testing.assert_allclose(found[quantity]["norm2"][name], values, rtol=1e-3, atol=1e-4 * scale)


RANK = """
import sys
import torch.distributed as dist
from tests.test_probes import record_rank
rank, port, out, norm = int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4] == "True"
shares = [int(size) for size in sys.argv[5:]]
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=len(shares))
record_rank(out, norm, shares, rank)
dist.destroy_process_group()
"""
SUMMED = [*CHANNEL, "weight_gradient_signs"]


def record_rank(out: str | Path, norm: bool, shares: list[int], rank: int) -> None:
    """Five steps of batches of 6 images, of which this process takes its share."""
    net = make_net(norm)
    net = bnkern.nn.convert_sync_batchnorm(net) if norm and len(shares) > 1 else net
    quantities = [*SUMMED, "signal_propagation", *["affine_gradient_signs"] * norm]
    part = slice(sum(shares[:rank]), sum(shares[: rank + 1]))
    with (
        probes.record(net, quantities, out=out, capacity=2) as rec,
        probes.record(net, CHANNEL, out=f"{out}-again") as again,
    ):
        for step in range(5):
            images, labels = batch(step, size=6)
            (F.cross_entropy(net(images[part]), labels[part], reduction="sum") / 6).backward()
            rec.step(), again.step()
    assert not rec.unserved


@pytest.mark.parametrize(
    ("norm", "shares"),
    [(False, [2, 4]), (True, [2, 4]), (True, [1, 3, 2]), (True, [5, 0, 1])],
    ids=["2_ranks_no_norm", "2_ranks", "3_ranks", "3_ranks_one_empty"],
)
def test_ranks_are_merged_into_one_file(norm: bool, shares: list[int], tmp_path: Path) -> None:
    """Processes with unequal parts of each batch record what one process records of the whole."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    joint, out = tmp_path / "joint", tmp_path / "ranks"
    arguments = [str(port), str(out), str(norm), *map(str, shares)]
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK, str(rank), *arguments], cwd=Path(__file__).parents[1])
        for rank in range(len(shares))
    ]
    record_rank(joint, norm, [6], 0)
    assert [rank.wait(timeout=120) for rank in ranks] == [0] * len(shares)
    expected, found = probes.load(joint), probes.load(out)
    assert found.steps.tolist() == [0, 1, 2, 3, 4] and found.index["ranks"] == len(shares)
    for quantity in SUMMED + ["affine_gradient_signs"] * norm:
        for layer, arrays in expected[quantity].items():
            for name, values in arrays.items():
                if "ratio" in name:
                    continue  # of a sum that cancels
                # Sums of parts differ from those of the whole by the order of addition in float32.
                scale = np.abs(arrays.get(name.replace("sum", "abs_sum"), values)).max()
                if name == "third":
                    scale = max(scale, arrays["var"].max() ** 1.5)
                np.testing.assert_allclose(
                    found[quantity][layer][name], values, rtol=1e-5, atol=1e-5 * scale, err_msg=f"{layer} {name}"
                )
    assert found["signal_propagation"]["norm3"]["variance"].shape == (5, len(shares)), "not a sum: an axis of ranks"
    again = probes.load(f"{out}-again")
    for quantity in CHANNEL:
        for layer, arrays in found[quantity].items():
            for name, values in arrays.items():
                np.testing.assert_array_equal(again[quantity][layer][name], values, f"again {layer} {name}")


def test_moments_of_parts_merge_to_those_of_the_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(9, 3, 4, 4, generator=generator, dtype=torch.float64) ** 3 + 100
    quantity = make("activation_moments")
    rows = []
    for part in (x, x[:2], x[2:2], x[2:]):
        record = torch.empty(8, 3, dtype=torch.float64)
        with bnkern.use_backend("reference"):
            bnkern.add_act(part, records=bnkern.probes.buffer.Records(activation=record))
        rows.append(record.numpy()[None])
    merged = quantity.merge(np.stack(rows[1:]))
    np.testing.assert_allclose(merged, rows[0], rtol=1e-9)


def test_output_moments_of_parts_merge_to_those_of_the_whole() -> None:
    y = torch.randn(9, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 3 + 100
    quantity = make("output_moments")

    def row(part: Tensor) -> np.ndarray:
        found = quantity.oracle(part)
        return torch.stack([found["count"], found["mean"], found["var"] * found["count"]]).numpy()[None]

    merged = quantity.merge(np.stack([row(part) for part in (y[:2], y[2:5], y[5:])]))
    np.testing.assert_allclose(merged, row(y), rtol=1e-9)  # float64 throughout


@pytest.mark.gpu
def test_a_captured_step_records_by_the_schedule_on_the_device(tmp_path: Path) -> None:
    """The whole step in a CUDA graph with its recording: replays record the steps that the schedule names."""
    recorded = []
    for captured in (False, True):
        net, out = make_net(device="cuda"), tmp_path / str(captured)
        optimizer = torch.optim.SGD(net.parameters(), lr=torch.tensor(0.05, device="cuda"), momentum=0.9, fused=True)
        images, labels = batch(0, device="cuda")

        def step(rec: probes.Recorder, net=net, optimizer=optimizer, images=images, labels=labels) -> None:
            loss = F.cross_entropy(net(images), labels)
            loss.backward()
            optimizer.step()
            rec.step(loss)
            optimizer.zero_grad(set_to_none=False)

        with probes.record(net, CHANNEL, probes.every(3), out, on_device=True) as rec:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    step(rec)
            torch.cuda.current_stream().wait_stream(side)
            if captured:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    step(rec)
                for _ in range(9):
                    graph.replay()
            else:
                for _ in range(9):
                    step(rec)
        recorded.append(probes.load(out))
    eager, graph = recorded
    assert eager.steps.tolist() == graph.steps.tolist() == [0, 3, 6, 9]
    np.testing.assert_array_equal(
        graph["activation_moments"]["norm2"]["mean"], eager["activation_moments"]["norm2"]["mean"]
    )


def test_nothing_warns_in_a_plain_recording(tmp_path: Path) -> None:
    net = make_net()
    with warnings.catch_warnings(), probes.record(net, EVERYTHING, out=tmp_path) as rec:
        warnings.simplefilter("error")
        train(net, 2, rec)


def test_a_ring_that_is_used_again_loses_no_record(tmp_path: Path) -> None:
    """A full ring goes to the writer as it is; what it held must be on the disk whatever is written into it later."""
    model = bnkern.nn.BatchNorm2d(4)
    with bnkern.probes.record(model, ["activation_moments"], out=tmp_path, capacity=4) as recording:
        for k in range(200):
            model(torch.full((2, 4, 3, 3), float(k)))
            recording.step()
    found = bnkern.probes.load(tmp_path)["activation_moments"][""]
    assert found["mean"][:, 0].tolist() == list(range(200))


def test_a_full_ring_comes_back_from_the_writer(tmp_path: Path) -> None:
    model = bnkern.nn.BatchNorm2d(4)
    with bnkern.probes.record(model, ["activation_moments"], out=tmp_path, capacity=4) as recording:
        rings = []
        for k in range(24):
            model(torch.full((2, 4, 3, 3), float(k)))
            recording.step()
            if k % 4 == 3:
                rings.append(recording._buffer.rows.data_ptr())
                recording.flush(wait=True)
    assert len(set(rings)) == 2  # the one being filled and the one being written
    found = bnkern.probes.load(tmp_path)["activation_moments"][""]
    assert found["mean"][:, 0].tolist() == list(range(24))
