"""Whole runs: their files, resuming with the same bits after any interruption, and divergence."""

import os
import random
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bnkern.probes import every, load, record
from bnkern.probes.diagnosis import diagnose
from bnkern.train import checkpoint, loop
from bnkern.train.cifar10 import split_validation
from bnkern.train.config import Config, learning_rate
from bnkern.train.loop import train
from bnkern.train.runlog import outcome, read_json, rows
from tests import ROOT
from tests.train.training import assert_same_run, images, tensors, tiny, untimed


def test_files_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config = tiny(lr=0.02, log_every=4, epochs=3, evaluate_every=2)
    ended = train(config, tmp_path / "a", images())
    assert {file.name for file in (tmp_path / "a").iterdir()} == {
        *("config.json", "env.json", "metrics.jsonl", "checkpoint.pt", "checkpoint.pt.previous", "DONE")
    }
    assert read_json(tmp_path / "a/config.json") == config.to_dict()
    env = read_json(tmp_path / "a/env.json")
    assert env["backend"] and env["threads"] >= 1 and env["seconds"] > 0 and env["processes"] == 1
    written = rows(tmp_path / "a")
    # 6 steps per epoch, and a line every 4 steps and at each end of an epoch
    assert [(r["step"], r["epoch"]) for r in written if r["event"] == "train"] == [
        *((4, 0), (6, 0), (8, 1), (12, 1), (16, 2), (18, 2))
    ]
    assert [r["lr"] for r in written if r["event"] == "train"] == [
        learning_rate(config, r["step"] - 1, 18) for r in written if r["event"] == "train"
    ]
    epochs = [r for r in written if r["event"] == "epoch"]
    assert [("test_accuracy" in r, r["step"]) for r in epochs] == [(False, 6), (True, 12), (True, 18)]
    for row, (four, two) in zip(epochs[:1], [written[:2]], strict=True):
        assert row["train_loss"] == pytest.approx((4 * four["loss"] + 2 * two["loss"]) / 6)
        assert row["train_accuracy"] == pytest.approx((4 * four["accuracy"] + 2 * two["accuracy"]) / 6)
    tests = [r["test_accuracy"] for r in epochs if "test_accuracy" in r]
    assert ended == (18, None, epochs[-1]["train_accuracy"], tests[-1], max(tests))
    out = capsys.readouterr().out
    assert "tiny-seed0: epoch 3/3: loss" in out and "images/s" in out
    assert train(config, tmp_path / "a", images()) == ended  # a finished run is not repeated
    assert len(rows(tmp_path / "a")) == len(written)


def test_the_numbers_in_the_metrics_are_the_networks(tmp_path: Path) -> None:
    """The last line has the test loss and accuracy of the checkpoint's parameters, both in fp32, in other batches."""
    config = tiny(lr=0.02, epochs=1)
    ended = train(config, tmp_path / "a", images())
    network = loop.build(config)
    network.load_state_dict(checkpoint.read(tmp_path / "a/checkpoint.pt")["network"])
    data = images()
    logits = network.eval()(data.normalise(data.test.images))
    assert ended.test_accuracy == (logits.argmax(1) == data.test.labels).double().mean().item()
    last = rows(tmp_path / "a")[-1]
    assert last["test_loss"] == pytest.approx(F.cross_entropy(logits, data.test.labels).item(), rel=1e-5)


def test_it_learns(tmp_path: Path) -> None:
    """Ten coarse patterns with noise are easy to learn. Chance is 10 %."""
    assert train(tiny(epochs=8, lr=0.05, augment=False), tmp_path / "a", images()).train_accuracy > 0.5


@pytest.mark.parametrize(
    "changes",
    [
        {"precision": "bf16", "channels_last": True},
        {"precision": "tf32", "norm": "none", "init": "fixup"},
        {"kernels": "torch", "norm": "final"},
        {"compile": True},
    ],
    ids=str,
)
def test_every_kind_of_run(tmp_path: Path, changes: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses are near those of the plain run. bf16 has 8 bits, so within 0.1 over 6 steps, and within 0.02 at the
    first.
    """
    if "compile" in changes:  # inductor's compiler takes a minute, and is not the subject here
        original = torch.compile
        monkeypatch.setattr(torch, "compile", lambda model: original(model, backend="aot_eager"))
    config = tiny(epochs=1, lr=0.01, log_every=1)
    plain = config.replace(**{k: v for k, v in changes.items() if k in ("norm", "init")})
    train(plain, tmp_path / "plain", images())
    train(config.replace(**changes), tmp_path / "changed", images())
    ours, theirs = ([r["loss"] for r in rows(tmp_path / n) if r["event"] == "train"] for n in ("changed", "plain"))
    assert ours[0] == pytest.approx(theirs[0], abs=0.02)
    assert ours == pytest.approx(theirs, abs=0.1)


def test_switches_of_torch_are_restored(tmp_path: Path) -> None:
    assert not torch.are_deterministic_algorithms_enabled()
    recorded = []

    @contextmanager
    def probe(network, folder, step):
        recorded.append(torch.are_deterministic_algorithms_enabled())
        yield Recorder()

    train(tiny(epochs=1, deterministic=True), tmp_path / "a", images(), probes=probe)
    assert recorded == [True] and not torch.are_deterministic_algorithms_enabled()


# ------------------------------------------------------------------------------------------------ recipe


def test_plateau_and_validation(tmp_path: Path) -> None:
    """The rate is so low that no epoch gains 0.01 %, so it drops after every second epoch."""
    config = tiny(epochs=7, lr=1e-9, plateau=1, drop_factor=0.5, validation=16, batch=16, log_every=2, norm="none")
    train(config, tmp_path / "a", images())
    rates = [r["lr"] / 1e-9 for r in rows(tmp_path / "a") if r["event"] == "train"]
    assert rates == pytest.approx([1, 1, 1, 0.5, 0.5, 0.25, 0.25])
    epochs = [r for r in rows(tmp_path / "a") if r["event"] == "epoch"]
    assert epochs[-1]["step"] == 14  # 32 of the 48 images remain: two steps of 16 in an epoch
    network = loop.build(config)
    network.load_state_dict(checkpoint.read(tmp_path / "a/checkpoint.pt")["network"])
    data = images()
    _, validation = split_validation(data.train, 16, 0)
    loss = F.cross_entropy(network(data.normalise(validation.images)), validation.labels).item()
    assert epochs[-1]["validation_loss"] == pytest.approx(loss, rel=1e-5)


# ------------------------------------------------------------------------------------------------ divergence

# Seven normal steps, then a rate with which the network diverges in the second epoch.
DIVERGING = {"norm": "none", "lr": 16.0, "warmup": 7, "momentum": 0.0, "weight_decay": 0.0, "precision": "fp64"}
DIVERGING |= {"drops": []}


def diverge(folder: Path, **changes: object) -> tuple[Config, dict]:
    config = tiny(**DIVERGING | changes)
    ended = train(config, folder, images())
    assert ended.diverged is not None and 7 < ended.diverged < 11 and (folder / "DONE").exists()
    return config, checkpoint.read(folder / "diverged.pt")


def test_divergence_is_a_result(tmp_path: Path) -> None:
    """The file contains the diverging update: after = before - lr gradient(before, batch), in float64 to rounding."""
    config, saved = diverge(tmp_path / "a", log_every=5)
    step = saved["step"]
    last = rows(tmp_path / "a")[-1]
    assert step > 0 and (last["event"], last["step"], last["diverged"]) == ("diverged", step, True)
    assert float(last["loss"]) > 1e3 and last["epoch"] == step // 6
    assert last["lr"] == saved["lr"] == 16.0
    assert all(r["step"] <= step and not r["diverged"] for r in rows(tmp_path / "a")[:-1] if r["event"] == "train")
    network = loop.build(config)
    losses = {}
    for state, batch_name in (("before", "update"), ("after", "shown")):
        network.load_state_dict(saved[state])
        network.zero_grad()
        batch_data = saved["batches"][batch_name]
        loss = F.cross_entropy(network(batch_data["images"]), batch_data["labels"])
        loss.backward()
        losses[state] = loss.item()
        if state == "before":
            moved = {name: p.detach() - 16.0 * p.grad for name, p in network.named_parameters()}
    for name, value in saved["after"].items():
        torch.testing.assert_close(value, moved[name], rtol=1e-9, atol=1e-12)
    assert saved["velocity"] == {}
    assert losses["before"] < 1e3 and losses["after"] == pytest.approx(float(last["loss"]), rel=1e-9)
    assert (saved["batches"]["shown"]["epoch"], saved["batches"]["shown"]["index"]) == divmod(step, 6)
    assert torch.equal(saved["rng"]["cpu"], checkpoint.read(tmp_path / "a/checkpoint.pt")["rng"]["cpu"])


def test_divergence_does_not_depend_on_when_the_host_checks(tmp_path: Path) -> None:
    for interval in (1, 2, 50):
        config, saved = diverge(tmp_path / str(interval), log_every=interval, momentum=0.5)
    for name, value in saved["after"].items():  # computed with the velocity in float64
        torch.testing.assert_close(
            value, saved["before"][name] - config.lr * saved["velocity"][name], rtol=1e-9, atol=0
        )
    first, *others = (tensors(tmp_path / str(interval), "diverged.pt") for interval in (1, 2, 50))
    for other in others:
        assert first.keys() == other.keys() and len(first) > 30
        assert all(torch.equal(value, other[name]) for name, value in first.items())
    assert len({outcome(tmp_path / str(interval)).diverged for interval in (1, 2, 50)}) == 1


def test_a_flight_recorder_reports_a_divergence(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config, plain = tiny(norm="none", lr=16.0, warmup=7, drops=[], log_every=5), tmp_path / "plain"
    train(config, plain, images())
    train(config, tmp_path / "flown", images(), flight_steps=64)
    assert untimed(plain) == untimed(tmp_path / "flown")
    report, step = diagnose(tmp_path / "flown/flight"), outcome(plain).diverged
    assert report.flight.steps[0] == 0 and step in report.flight.steps
    assert report.reason == f"a loss of {float(rows(plain)[-1]['loss']):.4g}" and report.events == []
    assert report.sentence.startswith(f"The training ended with {report.reason}. No value in the last")
    assert report.sentence in capsys.readouterr().out
    assert (tmp_path / "flown/flight/report.txt").read_text().startswith(report.sentence)


def test_a_flight_recorder_writes_nothing_when_a_run_ends_or_stops(tmp_path: Path) -> None:
    def stop(steps: int) -> None:
        raise loop.Stopped

    with pytest.raises(loop.Stopped):
        train(tiny(), tmp_path / "a", images(), flight_steps=8, watch=stop)
    train(tiny(), tmp_path / "a", images(), flight_steps=8)
    assert outcome(tmp_path / "a").diverged is None and not list((tmp_path / "a").glob("flight*"))


# ------------------------------------------------------------------------------------------------ resume


class Crash(BaseException):
    """Represents a power failure."""


def crash_at(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Raises Crash in place of the ``count``-th rename, removal or sync."""
    remaining = [count]
    for name in ("replace", "fsync"):
        original = getattr(os, name)

        def limited(*args, original=original):
            remaining[0] -= 1
            if remaining[0] == 0:
                raise Crash
            return original(*args)

        monkeypatch.setattr(checkpoint.os, name, limited)


@pytest.mark.parametrize("changes", [{}, DIVERGING | {"precision": "fp32"}], ids=["to the end", "to its divergence"])
def test_a_crash_at_any_file_operation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict) -> None:
    """The run is interrupted at each rename and each sync in turn. The resumed run always has the same results."""
    config = tiny(checkpoint_every=4, log_every=3, lr=0.02, deterministic=True).replace(**changes)
    whole = tmp_path / "whole"
    train(config, whole, images())
    last = "diverged.pt" if changes else "checkpoint.pt"
    assert (whole / last).exists()
    for count in range(1, 200):
        folder = tmp_path / str(count)
        with monkeypatch.context() as patch:
            crash_at(patch, count)
            try:
                train(config, folder, images())
            except Crash:
                pass
            else:
                break  # the run has fewer operations
        train(config, folder, images())
        assert_same_run(whole, folder, last)
    assert count > 15


def test_metrics_are_cut_back_to_the_checkpoint(tmp_path: Path) -> None:
    """Later lines, an incomplete line, and a premature end are removed."""
    config = tiny(checkpoint_every=4, log_every=2, lr=0.02, deterministic=True)
    train(config, tmp_path / "whole", images())
    train(config, tmp_path / "a", images())
    (tmp_path / "a/DONE").unlink()
    (tmp_path / "a/checkpoint.pt").unlink()
    with (tmp_path / "a/metrics.jsonl").open("a") as file:
        file.write('{"event": "diverged", "step": 8, "diverged": true}\n{"event": "tra')
    train(config, tmp_path / "a", images())
    assert_same_run(tmp_path / "whole", tmp_path / "a")


# So long that no machine finishes between two reads of the metrics.
KILLED_SETTINGS = {"epochs": 12, "checkpoint_every": 2, "log_every": 3, "lr": 0.02, "deterministic": True}
KILLED = f"""
import sys, torch
torch.set_num_threads(1)
from pathlib import Path
from bnkern.train.loop import train
from tests.train.training import images, tiny
train(tiny(**{KILLED_SETTINGS}), Path(sys.argv[1]), images())
"""


def test_kill_at_random_moments(tmp_path: Path) -> None:
    """kill -9 three times, each at a random time after the metrics have grown by some lines."""
    draw = random.Random(5)
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    train(tiny(**KILLED_SETTINGS), whole, images())
    command = [sys.executable, "-c", KILLED, str(folder)]
    killed = []
    for more in (1, 6, 5):
        target = len(rows(folder)) + more
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        while process.poll() is None and len(rows(folder)) < target:
            time.sleep(0.005)
        time.sleep(draw.uniform(0, 0.06))
        process.send_signal(signal.SIGKILL)
        killed.append(process.wait())
        assert not (folder / "DONE").exists()
    assert killed == [-signal.SIGKILL] * 3
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    assert_same_run(whole, folder)


def test_another_number_of_threads_is_a_warning(tmp_path: Path, threads: None) -> None:
    config = tiny(deterministic=True, epochs=1, checkpoint_every=2)
    train(config, tmp_path / "a", images())
    (tmp_path / "a/DONE").unlink()
    (tmp_path / "a/checkpoint.pt").unlink()
    torch.set_num_threads(2)
    with pytest.warns(RuntimeWarning, match="1 threads and has 2 now"):
        train(config, tmp_path / "a", images())


def test_a_folder_with_another_run_is_refused(tmp_path: Path) -> None:
    train(tiny(epochs=1), tmp_path / "a", images())
    with pytest.raises(ValueError, match=r"another run \(other epochs, lr\)"):
        train(tiny(epochs=2, lr=0.2), tmp_path / "a", images())
    train(tiny(epochs=1, lr=0.2), tmp_path / "a", images(), resume=False)
    assert read_json(tmp_path / ".old/a~1/config.json")["lr"] == 0.1
    assert read_json(tmp_path / "a/config.json")["lr"] == 0.2


def test_data_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="data='cifar10', but 'synthetic' was loaded"):
        train(tiny(data="cifar10"), tmp_path / "a", images())
    with pytest.raises(ValueError, match="a batch of 64 is more than the 48 training images"):
        train(tiny(batch=64), tmp_path / "b", images())


# ------------------------------------------------------------------------------------------------ probes, mirror


class Recorder:
    """The functions of a recorder that the loop uses."""

    def __init__(self) -> None:
        self.steps, self.flushes = 0, []

    def step(self, loss: torch.Tensor) -> None:
        assert loss.requires_grad
        self.steps += 1

    def flush(self, wait: bool = False) -> None:
        assert wait
        self.flushes.append(self.steps)


def test_probes_are_called_and_change_nothing(tmp_path: Path) -> None:
    config = tiny(checkpoint_every=4)
    recorder, requested = Recorder(), []

    @contextmanager
    def probes(network: torch.nn.Module, folder: Path, step: int):
        requested.append((type(network).__name__, folder, step))
        yield recorder
        requested.append("closed")

    train(config, tmp_path / "plain", images())
    train(config, tmp_path / "a", images(), probes=probes)
    assert requested == [("ResNet", tmp_path / "a/probes", 0), "closed"]
    assert recorder.steps == 12 and recorder.flushes == [4, 6, 8, 12]
    assert_same_run(tmp_path / "plain", tmp_path / "a")


def test_records_of_a_resumed_run_equal_those_of_an_uninterrupted_one(tmp_path: Path) -> None:
    """Probe files are truncated to the step of the checkpoint, and are written before the checkpoint is valid."""
    config = tiny(checkpoint_every=4, deterministic=True)

    def probes(network: torch.nn.Module, folder: Path, step: int):
        return record(network, ["activation_moments"], every(1), folder, first_step=step, append=step > 0)

    train(config, tmp_path / "whole", images(), probes=probes)

    @contextmanager
    def crashing(network: torch.nn.Module, folder: Path, step: int):
        with probes(network, folder, step) as recorder:
            close, recorder.step = recorder.step, lambda loss: (close(loss), 1 / (recorder._step < 11))
            yield recorder

    with pytest.raises(ZeroDivisionError):
        train(config, tmp_path / "resumed", images(), probes=crashing)
    assert load(tmp_path / "resumed/probes").steps.tolist() == list(range(11)), (
        "there are records after the checkpoint at step 8"
    )
    train(config, tmp_path / "resumed", images(), probes=probes)
    assert_same_run(tmp_path / "whole", tmp_path / "resumed")
    expected, result = load(tmp_path / "whole/probes"), load(tmp_path / "resumed/probes")
    assert expected.steps.tolist() == result.steps.tolist() == list(range(12))
    for layer, arrays in expected["activation_moments"].items():
        for name, values in arrays.items():
            np.testing.assert_array_equal(result["activation_moments"][layer][name], values)


def test_a_stopped_run_continues_with_the_same_bits(tmp_path: Path) -> None:
    """Wherever metrics are written it can be stopped, also where it would not have saved. The end cannot be stopped."""
    config, finished, started = tiny(deterministic=True), [], []
    train(config, tmp_path / "whole", images(), watch=finished.append)
    assert finished == [4, 6, 8], "at every line of metrics but the last"

    def stop(done: int) -> None:
        finished.append(done)
        raise loop.Stopped

    def start(network: torch.nn.Module, step: int) -> None:
        assert network.training and len(list(network.parameters())) > 10
        started.append(step)

    for done in (4, 6, 8):
        with pytest.raises(loop.Stopped):
            train(config, tmp_path / "parts", images(), watch=stop, before_step=start)
        assert finished[-1] == done and started == list(range(done))
        assert not (tmp_path / "parts/DONE").exists()
    train(config, tmp_path / "parts", images(), watch=stop, before_step=start)
    assert started == list(range(12))
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


def test_a_mirror_without_tensorboard_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(RuntimeError, match="need tensorboard: pip install tensorboard"):
        train(tiny(), tmp_path / "a", images(), tensorboard=True)


def test_tensorboard_mirror(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tiny(epochs=1), tmp_path / "a", images(), tensorboard=True)
    mirror = EventAccumulator(str(tmp_path / "a/tensorboard"))
    mirror.Reload()
    written = [r for r in untimed(tmp_path / "a") if r["event"] == "train"]
    recorded = mirror.Scalars("train/loss")
    assert [(s.step, s.value) for s in recorded] == [(r["step"], pytest.approx(r["loss"])) for r in written]
