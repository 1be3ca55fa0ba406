"""Training on a GPU: the bits of a CUDA graph of the step, the bits of a resumed run, and divergence in replays."""

from functools import partial
from pathlib import Path

import pytest
import torch

from bnkern import probes
from bnkern.train import checkpoint, loop
from bnkern.train.loop import train
from bnkern.train.runlog import Outcome
from bnkern.train.step import Step
from tests.train.training import images, tensors, tiny, untimed

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")]
PRECISIONS = ["fp32", "bf16"]


def run(folder: Path, **changes: object) -> Outcome:
    return train(tiny(deterministic=True, **changes), folder, images(), "cuda")


def assert_same_tensors(first: Path, second: Path, name: str = "checkpoint.pt") -> None:
    a, b = tensors(first, name), tensors(second, name)
    assert a.keys() == b.keys()
    assert not [k for k in a if not torch.equal(a[k].nan_to_num(), b[k].nan_to_num())]


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_graph_trains_to_the_same_bits(tmp_path: Path, precision: str, channels_last: bool) -> None:
    for graph in (False, True):
        run(tmp_path / str(graph), graph=graph, precision=precision, channels_last=channels_last)
    assert untimed(tmp_path / "True") == untimed(tmp_path / "False")
    assert_same_tensors(tmp_path / "True", tmp_path / "False")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_an_interrupted_run_has_the_bits_of_a_whole_one(
    tmp_path: Path, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"precision": precision, "channels_last": True, "checkpoint_every": 4}
    run(tmp_path / "whole", **settings)
    call, calls = Step.__call__, []

    def interrupted(step: Step) -> None:
        calls.append(None)
        if len(calls) == 10:
            raise KeyboardInterrupt
        call(step)

    with monkeypatch.context() as patch:
        patch.setattr(Step, "__call__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "parts", **settings)
    run(tmp_path / "parts", **settings)
    assert untimed(tmp_path / "parts") == untimed(tmp_path / "whole")
    assert_same_tensors(tmp_path / "parts", tmp_path / "whole")


def test_a_stopped_run_has_the_bits_of_a_whole_one(tmp_path: Path) -> None:
    """It is stopped between two checkpoints, and captured again. Work between the replays changes no bit either."""
    settings = {"precision": "bf16", "channels_last": True, "log_every": 2}
    data, stops = images(), [2, 8]

    def backward(network: torch.nn.Module, step: int) -> None:
        gradients = [parameter.grad for parameter in network.parameters()]
        statistics = {name: t.clone() for name, t in network.named_buffers()}
        network.zero_grad()
        network(data.normalise(data.train.images[:8].cuda())).sum().backward()
        for parameter, gradient in zip(network.parameters(), gradients, strict=True):
            parameter.grad = gradient
        for name, t in network.named_buffers():
            t.copy_(statistics[name])

    def watch(done: int) -> None:
        if done in stops:
            stops.remove(done)
            raise loop.Stopped

    run(tmp_path / "whole", **settings)
    for _ in range(2):
        with pytest.raises(loop.Stopped):
            train(
                tiny(deterministic=True, **settings),
                tmp_path / "parts",
                data,
                "cuda",
                watch=watch,
                before_step=backward,
            )
    train(tiny(deterministic=True, **settings), tmp_path / "parts", data, "cuda", watch=watch, before_step=backward)
    assert untimed(tmp_path / "parts") == untimed(tmp_path / "whole")
    assert_same_tensors(tmp_path / "parts", tmp_path / "whole")


def test_divergence_is_found_in_replays(tmp_path: Path) -> None:
    """The step, and the parameters before and after the diverging update, are those of a run without a graph."""
    for graph in (False, True):
        outcome = run(tmp_path / str(graph), graph=graph, norm="none", lr=1e3)
        assert outcome.diverged is not None
    assert_same_tensors(tmp_path / "True", tmp_path / "False", "diverged.pt")
    states = [checkpoint.read(tmp_path / str(graph) / "diverged.pt") for graph in (False, True)]
    assert states[0]["step"] == states[1]["step"] > 0


def test_a_recorded_graph_records_what_the_host_does(tmp_path: Path) -> None:
    quantities = ("activation_moments", "gradient_channel_signs", "affine_gradient_signs")
    results = []
    for on_device in (False, True):
        recorder = partial(record, quantities=quantities, on_device=on_device)
        folder = tmp_path / str(on_device)
        train(tiny(deterministic=True), folder, images(), "cuda", probes=recorder)
        results.append(probes.load(folder / "probes"))
    host, device = results
    assert device.steps.tolist() == host.steps.tolist() == list(range(12))
    for quantity in quantities:
        for layer, columns in host[quantity].items():
            for name, values in columns.items():
                assert (device[quantity][layer][name] == values).all(), (quantity, layer, name)


def record(network: torch.nn.Module, folder: Path, first: int, quantities: tuple[str, ...], on_device: bool):
    return probes.record(
        network, quantities, probes.every(1), folder, first_step=first, append=first > 0, on_device=on_device
    )
