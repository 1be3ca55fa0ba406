"""Every recorded quantity against its oracle, the schedules, and unchanged bits of the training."""

import copy
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnkern
from bnkern import probes
from bnkern.probes.quantities import make
from tests.support.cases import TARGETS, Target
from tests.support.probing import CHANNEL, batch, make_net, train


@pytest.fixture(params=TARGETS, ids=str)
def target(request: pytest.FixtureRequest) -> Iterator[Target]:
    with bnkern.use_backend(request.param.backend):
        yield request.param


# ---------------------------------------------------------------------------------------- quantities and their oracles


class Seen:
    """The inputs, outputs and their gradients of one forward and backward by layer, from plain hooks."""

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
    """Compares with float64 sums over the same stored values.

    fp32 partial sums of some hundred summands are exact to a few 1e-7 of the sum of magnitudes. For signed values,
    which cancel, this is the floor.
    """
    for name, expected in oracle.items():
        expected, result = np.asarray(expected, dtype=float), ours[name][0]
        assert result.shape == expected.shape, (what, name)
        if name in ("count", "positive", "negative", "zero", "min", "max", "abs_max", "histogram") or (
            name.endswith(("sign_sum", "nonzero"))
        ):
            np.testing.assert_array_equal(result, expected, f"{what} {name}")
            continue
        scale = np.abs(expected).max()
        if name in ("sum", "bias_sum", "weight_sum") and name.replace("sum", "abs_sum") in oracle:
            scale = np.asarray(oracle[name.replace("sum", "abs_sum")]).max()
        elif name.endswith("ratio"):
            scale = max(scale, 1)
        elif name == "third":
            scale = max(scale, np.asarray(oracle["var"]).max() ** 1.5)
        np.testing.assert_allclose(result, expected, rtol=1e-5, atol=2e-6 * scale, err_msg=f"{what} {name}")


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("norm", [True, False], ids=["batch_norm", "no_norm"])
def test_quantities_agree_with_their_oracles(target: Target, norm: bool, layout: str, tmp_path: Path) -> None:
    net = make_net(norm, layout, target.device)
    wanted = [*CHANNEL, "signal_propagation", "weight_gradient_signs", "parameter_gradient_histogram"]
    wanted += [make("output_gradient", layers="fc"), make("output_moments", layers=["fc", "norm1"])]
    wanted += ["affine_gradient_signs", "norm_gradient_noise"] if norm else []
    with probes.record(net, wanted, out=tmp_path) as rec:
        recorded = Seen(net)
        images, labels = batch(0, device=target.device)
        F.cross_entropy(net(images), labels).backward()
        rec.step()
    result = probes.load(tmp_path)
    assert result.quantities == [q if isinstance(q, str) else q.name for q in wanted]

    for layer in ("norm1", "norm2", "norm3"):
        module, conv = getattr(net, layer), layer.replace("norm", "conv")
        x, y = recorded.x[layer], recorded.y[layer]
        oracle = make("activation_moments").oracle(x, y)
        compare(result["activation_moments"][layer], oracle, layer)
        compare(
            result["gradient_channel_signs"][layer], make("gradient_channel_signs").oracle(recorded.dy[conv]), layer
        )
        if norm:
            var, mean = torch.var_mean(x, (0, 2, 3), correction=0, keepdim=True)
            xhat = (x - mean) * torch.rsqrt(var + vars(module)["eps"])
            g = recorded.dy[layer] * (y > 0) if module.act else recorded.dy[layer]
            signs = make("affine_gradient_signs").oracle(g, xhat)
            compare(result["affine_gradient_signs"][layer], signs, layer)
            noise = make("norm_gradient_noise").oracle(g, xhat)
            compare(result["norm_gradient_noise"][layer], noise, layer)
            np.testing.assert_allclose(
                result["affine_gradient_signs"][layer]["bias_sum"][0], module.bias.grad, rtol=1e-5, atol=1e-7
            )
    for layer in ("conv1", "conv2", "conv3"):
        module = getattr(net, layer)
        oracle = make("weight_gradient_signs").oracle(recorded.x[layer], recorded.dy[layer], module)
        ours = result["weight_gradient_signs"][layer]
        # The ratio of a sum that cancels has the relative error of the sum. It is compared if the sum is not only
        # rounding.
        oracle = {name: value.numpy() for name, value in oracle.items()}
        safe = np.abs(oracle["sum"]) > 1e-3 * oracle["abs_sum"]
        ratio, expected = ours.pop("ratio")[0], oracle.pop("ratio")
        np.testing.assert_allclose(ratio[safe], expected[safe], rtol=1e-2)
        compare(ours, oracle, layer)
        np.testing.assert_allclose(ours["sum"][0], module.weight.grad, rtol=1e-4, atol=1e-6)
    compare(result["output_gradient"]["fc"], make("output_gradient").oracle(recorded.dy["fc"]), "fc")
    for layer in ("fc", "norm1"):
        compare(result["output_moments"][layer], make("output_moments").oracle(recorded.y[layer]), layer)
    for name, parameter in net.named_parameters():
        oracle = make("parameter_gradient_histogram").oracle(parameter.grad)
        compare(result["parameter_gradient_histogram"][name], oracle, name)
    x, y, residual = recorded.x["norm3"], recorded.y["norm3"], recorded.residual["norm3"]
    branch = y - residual if norm else x
    compare(result["signal_propagation"]["norm3"], make("signal_propagation").oracle(y, branch, residual), "norm3")
    assert result.layers("signal_propagation") == ["norm3"], "only norm layers that add a residual end a block"


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
    """The oracle uses x or dy without their channel means. The gradient itself does not change."""
    net, plain = make_net(device=target.device), make_net(device=target.device)
    quantity = make("weight_gradient_signs", layers="conv[23]", centred=centred)
    images, labels = batch(0, device=target.device)
    F.cross_entropy(plain(images), labels).backward()
    with probes.record(net, [quantity], out=tmp_path) as rec:
        recorded = Seen(net)
        F.cross_entropy(net(images), labels).backward()
        rec.step()
    for layer in ("conv2", "conv3"):
        x, dy = (t - t.mean((0, 2, 3), keepdim=True) * (which == centred) for which, t in (
            ("input", recorded.x[layer]), ("gradient", recorded.dy[layer])
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
    result = probes.load(tmp_path)["gradient_noise_scale"][""]
    for step in range(2):
        for name, value in noise.oracle(parts[3 * step : 3 * step + 3], part=5).items():
            np.testing.assert_allclose(result[name][step], value, rtol=1e-4, err_msg=name)


def test_gradient_noise_of_known_gaussians() -> None:
    """The estimator is unbiased: its means over many draws are tr Sigma and |G|^2."""
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
    result = probes.load(tmp_path)["parameter_gradient_histogram"]["weight"]
    edges, counts = result["edges"][0], result["histogram"][0]
    assert counts.sum() == 6
    for value, expected in ((0.0, 3), (1.0, 1), (-2.0, 1), (2.0**23.99, 1)):  # the last one is outside of the edges
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
    "parameter_norms",
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
    """A schedule on the host and one on the device record the same steps and numbers."""
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
    """Layers whose channels are known only after the first call, first in eval mode.

    The device counts these steps too.
    """
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


def test_nothing_warns_in_a_plain_recording(tmp_path: Path) -> None:
    net = make_net()
    with warnings.catch_warnings(), probes.record(net, EVERYTHING, out=tmp_path) as rec:
        warnings.simplefilter("error")
        train(net, 2, rec)


def test_moments_of_parts_merge_to_those_of_the_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(9, 3, 4, 4, generator=generator, dtype=torch.float64) ** 3 + 100
    quantity = make("activation_moments")
    rows = []
    for part in (x, x[:2], x[2:2], x[2:]):
        record = torch.empty(len(quantity.rows), 3, dtype=torch.float64)
        with bnkern.use_backend("reference"):
            bnkern.add_act(part, records=bnkern.backends.records.Records(activation=record))
        rows.append(record.numpy()[None])
    merged = quantity.merge(np.stack(rows[1:]))
    np.testing.assert_allclose(merged, rows[0], rtol=1e-9)


def test_parameter_norms(tmp_path: Path) -> None:
    """Every step has the parameters of its forward, the update before it and the gradient after it."""
    net = make_net()
    net.fc.bias.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.05, momentum=0.9)
    previous = {name: p.detach().clone() for name, p in net.named_parameters()}
    steps = []
    with probes.record(net, ["parameter_norms"], out=tmp_path) as rec:
        for step in range(3):
            before = {name: p.detach().clone() for name, p in net.named_parameters()}
            for part in range(2):
                images, labels = batch(2 * step + part)
                F.cross_entropy(net(images), labels).backward()
            gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in net.named_parameters()}
            oracle = make("parameter_norms").oracle
            steps.append([oracle(p, gradients[name], previous[name]) for name, p in before.items()])
            optimizer.step()
            rec.step()
            optimizer.zero_grad()
            previous = before
    recording = probes.load(tmp_path)
    names = recording.index["quantities"]["parameter_norms"]["options"]["names"]
    assert names == [name for name, _ in net.named_parameters()]
    recorded = recording["parameter_norms"][""]
    rows = np.flatnonzero(recording.calls == 0)
    for row in ("weight", "gradient", "update", "relative_update"):
        expected = np.array([[float(one[row]) for one in step] for step in steps])
        if row == "gradient":
            expected[:, names.index("fc.bias")] = np.nan
        zero = np.array([[float(one["update"]) == float(one["weight"]) for one in step] for step in steps])
        if row == "relative_update":
            expected[np.isinf(expected) | zero] = np.nan  # the parameter was 0 before
        np.testing.assert_allclose(recorded[row][rows], expected, rtol=1e-5, atol=1e-9, err_msg=row)


def test_a_recording_without_the_newest_rows(tmp_path: Path) -> None:
    """Rows that an older version did not record are NaN, and the others keep their names."""
    net = make_net()
    with probes.record(net, ["activation_moments"], out=tmp_path) as rec:
        train(net, 2, rec)
    whole = probes.load(tmp_path)["activation_moments"]["norm1"]
    index = json.loads((tmp_path / "index.json").read_text())
    kept = [k for k, row in enumerate(index["quantities"]["activation_moments"]["rows"]) if row != "nonfinite"]
    (part,) = tmp_path.glob("part-*.npz")
    arrays = {name: a[:, kept] if "/" in name else a for name, a in np.load(part).items()}
    np.savez(part, **arrays)
    rows = index["quantities"]["activation_moments"]["rows"]
    index["quantities"]["activation_moments"]["rows"] = [rows[k] for k in kept]
    (tmp_path / "index.json").write_text(json.dumps(index))
    older = probes.load(tmp_path)["activation_moments"]["norm1"]
    assert np.isnan(older["nonfinite"]).all() and not whole["nonfinite"].any()
    for name in whole.keys() - {"nonfinite"}:
        np.testing.assert_array_equal(older[name], whole[name], err_msg=name)


def test_output_moments_of_parts_merge_to_those_of_the_whole() -> None:
    y = torch.randn(9, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 3 + 100
    quantity = make("output_moments")

    def row(part: Tensor) -> np.ndarray:
        result = quantity.oracle(part)
        return torch.stack([result["count"], result["mean"], result["var"] * result["count"]]).numpy()[None]

    merged = quantity.merge(np.stack([row(part) for part in (y[:2], y[2:5], y[5:])]))
    np.testing.assert_allclose(merged, row(y), rtol=1e-9)  # float64 in all operations
