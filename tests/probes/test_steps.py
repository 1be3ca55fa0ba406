"""Recording during training: calls and steps, layers and names, errors, torch.compile, ranks, CUDA graphs."""

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import bnkern
from bnkern import probes
from bnkern.probes.quantities import make
from tests import ROOT
from tests.probes.recording_ranks import RANK, SUMMED, record_rank
from tests.support.probing import CHANNEL, batch, make_net, train

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
    result = probes.load(tmp_path)
    assert result.steps.tolist() == [0, 0, 1, 1] and result.calls.tolist() == [0, 1, 0, 1]
    means = result["activation_moments"]["norm1"]["mean"]
    for row, part in enumerate((0, 1, 0, 1)):
        with torch.no_grad():
            np.testing.assert_allclose(means[row], net.conv1(batch(part)[0]).mean((0, 2, 3)), atol=1e-6)
    sums = result["gradient_channel_signs"]["norm1"]["abs_sum"]
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
    result = probes.load(tmp_path)
    assert result.steps.tolist() == [0, 0, 1, 1, 2, 2]
    assert not np.isnan(result["weight_gradient_signs"]["conv2"]["sum"]).any()


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint_recomputation_is_not_another_call(reentrant: bool, tmp_path: Path) -> None:
    recorded = []
    for name in ("plain", "checkpointed"):
        net = make_net()

        def forward(x: Tensor, net: nn.Module = net, name: str = name) -> Tensor:
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
    """A forward without a backward must not keep the gradients of the step before."""
    net = make_net()
    with probes.record(net, CHANNEL, out=tmp_path) as rec:
        for step in range(2):
            out = net(batch(step)[0])
            if step == 0:
                out.sum().backward()
            rec.step()
    result = probes.load(tmp_path)
    assert not np.isnan(result["activation_moments"]["norm1"]["mean"]).any()
    assert np.isnan(result["gradient_channel_signs"]["norm1"]["sum"][1]).all()


def test_a_layer_that_joins_late(tmp_path: Path) -> None:
    """Layers whose channels are known after the first call, and layers that are first called in a later step, are
    recorded.
    """
    net = nn.ModuleDict({"a": bnkern.nn.Activation(), "b": bnkern.nn.Activation()})
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    with probes.record(net, CHANNEL, out=tmp_path) as rec:
        for step in range(3):
            y = net["a"](x * (step + 1))
            (net["b"](y[:, :2]) if step == 1 else y).sum().backward()
            rec.step()
    result = probes.load(tmp_path)
    assert result.steps.tolist() == [0, 1, 2]
    means = result["activation_moments"]["b"]["mean"]
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
    expected, result = probes.load(tmp_path / "alone"), probes.load(tmp_path / "outer")
    for quantity in CHANNEL:
        for name, values in expected[quantity]["norm2"].items():
            np.testing.assert_array_equal(result[quantity]["norm2"][name], values, name)
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
    result = probes.load(tmp_path)
    assert result.steps.tolist() == [0] and result.calls.tolist() == [0]
    assert set(net.state_dict()) == set(twin.state_dict())


# ---------------------------------------------------------------------------------------------- layers, names, errors


def test_patterns_choose_layers(tmp_path: Path) -> None:
    net = make_net()
    quantities = [make("activation_moments", layers=["norm1", "*3"]), make("weight_gradient_signs", layers="conv[12]")]
    with probes.record(net, quantities, out=tmp_path, layers=["*1", "conv*"]) as rec:
        train(net, 1, rec)
    result = probes.load(tmp_path)
    assert result.layers("activation_moments") == ["norm1"]
    assert result.layers("weight_gradient_signs") == ["conv1", "conv2"]


def test_layers_that_cannot_be_served_are_named(tmp_path: Path) -> None:
    net = nn.Sequential(bnkern.nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 1))
    with (
        pytest.warns(UserWarning, match=r"2 layers cannot be recorded"),
        probes.record(net, ["activation_moments", "weight_gradient_signs"], out=tmp_path) as rec,
    ):
        assert rec.unserved == {
            ("activation_moments", "1"): "BatchNorm2d is not one of bnkern.nn's norm layers",
            ("weight_gradient_signs", "2"): "the convolution has 2 groups; only 1 is supported",
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
    """A class that is passed directly is recorded like the others, and read by the names of its entries."""

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
    result = probes.load(tmp_path)["parameter_norm"]["conv2"]["norm"]
    assert result.shape == (2,) and result[1] == pytest.approx(float(net.conv2.weight.detach().norm()), rel=1e-6)


# ---------------------------------------------------------------------------------------- torch.compile, ranks, graphs


def test_torch_compile_recompiles_on_entering_and_never_again(tmp_path: Path) -> None:
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    eager, net = make_net(), make_net()
    quantities = [*CHANNEL, "affine_gradient_signs", "norm_gradient_noise"]
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    with probes.record(eager, quantities, out=tmp_path / "eager") as rec:
        train(eager, 6, rec)
    train(copy.deepcopy(net), 1)
    compiled(batch(0)[0])
    before = counters["stats"]["unique_graphs"]
    net.load_state_dict(make_net().state_dict())
    with probes.record(net, quantities, out=tmp_path / "compiled") as rec:
        train(net, 2, rec, compiled)
        assert counters["stats"]["unique_graphs"] == before + 1
    net.load_state_dict(make_net().state_dict())
    with probes.record(net, quantities, out=tmp_path / "again") as rec:
        train(net, 6, rec, compiled)
    expected, result = probes.load(tmp_path / "eager"), probes.load(tmp_path / "again")
    assert result.steps.tolist() == list(range(6))
    for quantity in expected.quantities:
        for name, values in expected[quantity]["norm2"].items():
            scale = np.nanmax(np.abs(values))
            np.testing.assert_allclose(result[quantity]["norm2"][name], values, rtol=1e-3, atol=1e-4 * scale)


@pytest.mark.parametrize(
    ("norm", "shares"),
    [(False, [2, 4]), (True, [2, 4]), (True, [1, 3, 2]), (True, [5, 0, 1])],
    ids=["2_ranks_no_norm", "2_ranks", "3_ranks", "3_ranks_one_empty"],
)
def test_ranks_are_merged_into_one_file(norm: bool, shares: list[int], tmp_path: Path) -> None:
    """Processes with unequal parts of each batch record the numbers of one process with the whole batch."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    joint, out = tmp_path / "joint", tmp_path / "ranks"
    arguments = [str(port), str(out), str(norm), *map(str, shares)]
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK, str(rank), *arguments], cwd=ROOT) for rank in range(len(shares))
    ]
    record_rank(joint, norm, [6], 0)
    assert [rank.wait(timeout=120) for rank in ranks] == [0] * len(shares)
    expected, result = probes.load(joint), probes.load(out)
    assert result.steps.tolist() == [0, 1, 2, 3, 4] and result.index["ranks"] == len(shares)
    for quantity in SUMMED + ["affine_gradient_signs", "norm_gradient_noise"] * norm:
        for layer, arrays in expected[quantity].items():
            for name, values in arrays.items():
                if "ratio" in name or name == "scale":
                    continue  # the ratio of a sum that cancels
                # Sums of parts differ from those of the whole by the order of addition in float32.
                scale = np.abs(arrays.get(name.replace("sum", "abs_sum"), values)).max()
                if name == "third":
                    scale = max(scale, arrays["var"].max() ** 1.5)
                np.testing.assert_allclose(
                    result[quantity][layer][name], values, rtol=1e-5, atol=1e-5 * scale, err_msg=f"{layer} {name}"
                )
    assert result["signal_propagation"]["norm3"]["variance"].shape == (5, len(shares)), (
        "this has an axis of ranks, because it is no sum"
    )
    again = probes.load(f"{out}-again")
    for quantity in CHANNEL:
        for layer, arrays in result[quantity].items():
            for name, values in arrays.items():
                np.testing.assert_array_equal(again[quantity][layer][name], values, f"again {layer} {name}")


@pytest.mark.gpu
def test_a_captured_step_records_by_the_schedule_on_the_device(tmp_path: Path) -> None:
    """The whole step is a CUDA graph with its recording. Replays record the steps of the schedule."""
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
