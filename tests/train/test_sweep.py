"""Sweeps: a failure does not affect other runs, restarts skip finished runs, in one or more processes and on Ray; the
command line.
"""

import json
import sys
from pathlib import Path

import pytest

from bnkern.train import cifar10
from bnkern.train import sweep as sweeping
from bnkern.train.__main__ import main
from bnkern.train.config import Config
from bnkern.train.runlog import outcome, put_aside, read_json
from bnkern.train.sweep import sweep
from tests.train.training import images, tiny, untimed


@pytest.fixture(autouse=True)
def small_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeping, "_load", lambda where: images())
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def configs() -> list[Config]:
    """The second config must fail, because its batch has more images than any synthetic set."""
    good = tiny(epochs=1, norm="none", lr=0.01)
    return [good, good.replace(name="broken", batch=6000), good.replace(seed=1)]


def test_one_failed_run_does_not_stop_the_others(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert sweep(configs(), tmp_path) == 1
    finished = [(tmp_path / config.title / "DONE").exists() for config in configs()]
    assert finished == [True, False, True]
    error = (tmp_path / "broken-seed0/error.txt").read_text()
    assert "Traceback" in error and "ValueError: a batch of 6000 is more than the 48 training images" in error
    out = capsys.readouterr().out
    assert "3 runs: 0 finished before, 3 to do" in out
    assert "[2/3] broken-seed0: FAILED: ValueError: a batch of 6000" in out
    assert "[3/3] tiny-seed1: test " in out and "in the last epoch, best" in out


def test_a_restart_skips_finished_runs(tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture) -> None:
    sweep(configs(), tmp_path)
    started = []
    original = sweeping.train
    monkeypatch.setattr(sweeping, "train", lambda config, *rest, **named: started.append(config.title))
    assert sweep(configs(), tmp_path) == 0
    assert started == ["broken-seed0"]
    assert not (tmp_path / "broken-seed0/error.txt").exists()  # this run succeeds
    monkeypatch.setattr(sweeping, "train", original)
    before = untimed(tmp_path / "tiny-seed1")
    assert sweep(configs()[2:], tmp_path, resume=False) == 0
    assert untimed(tmp_path / "tiny-seed1") == before  # the run was repeated, and the first one was moved aside
    assert (tmp_path / ".old/tiny-seed1~1/DONE").exists()


def test_a_diverged_run_is_a_result(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert sweep([tiny(epochs=1, norm="none", lr=100.0)], tmp_path) == 0
    assert "[1/1] tiny-seed0: diverged at step 1" in capsys.readouterr().out


def test_impossible_sweeps_are_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tiny-seed0 occurs twice"):
        sweep([tiny(), tiny(lr=0.2)], tmp_path)
    sweep([tiny(epochs=1, norm="none")], tmp_path)
    with pytest.raises(ValueError, match=r"has another run \(other lr\)"):
        sweep([tiny(seed=1), tiny(epochs=1, norm="none", lr=0.2)], tmp_path)
    assert not (tmp_path / "tiny-seed1").exists()


def process_configs() -> list[Config]:
    """Configs for separate processes, which use the whole synthetic set. They diverge at the second step."""
    return [config.replace(lr=100.0) for config in configs()]


def test_several_processes(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Three runs, two at a time, one of which fails."""
    assert sweep(process_configs(), tmp_path, processes=2) == 1
    assert [(tmp_path / config.title / "DONE").exists() for config in process_configs()] == [True, False, True]
    assert "a batch of 6000 is more than the 5000" in (tmp_path / "broken-seed0/error.txt").read_text()
    out = capsys.readouterr().out
    assert "broken-seed0: FAILED" in out and "a batch of 6000" in out and "[3/3]" in out
    assert "tiny-seed1: diverged at step 1" in out
    assert "diverged at step 1" in (tmp_path / "tiny-seed0.log").read_text()
    assert read_json(tmp_path / "tiny-seed0/env.json")["threads"] == 1


def test_a_killed_process_is_a_failed_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import bnkern.train.sweep as of_sweep

    code = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    monkeypatch.setattr(of_sweep, "command", lambda *arguments: [sys.executable, "-c", code])
    assert sweep(configs()[::2], tmp_path, processes=2) == 2
    assert (tmp_path / "tiny-seed0/error.txt").read_text() == "killed by signal 9\n"


def test_without_data_nothing_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(sweeping, "_load", cifar10.load)
    argv = ["final-0.03", "fixup-0.1", "--data", str(tmp_path), "--out", str(tmp_path / "out")]
    assert main(argv) == 1
    assert f"DataError: no CIFAR-10 in {tmp_path}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_ray_is_requested_but_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(RuntimeError, match=r"pip install 'bnkern\[ray\]'"):
        sweep(configs(), tmp_path, ray="auto")


@pytest.mark.slow
def test_on_ray(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    assert sweep(process_configs(), tmp_path, ray="local", gpus=0) == 1
    assert [(tmp_path / config.title / "DONE").exists() for config in process_configs()] == [True, False, True]
    assert (tmp_path / "broken-seed0/error.txt").exists()


# ------------------------------------------------------------------------------------------------ command line


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["--list"]) == 0
    assert "fig1-batch-0.1     ResNet-110, norm batch, lr 0.1, 165 epochs" in capsys.readouterr().out
    argv = ["fig1-none-0.0001", "--laptop", "--seeds", "2", "--set", "depth=8", "epochs=1", "batch=8"]
    argv += ["--data", "synthetic", "--out", str(tmp_path)]
    assert main([*argv, "--print"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [run["seed"] for run in printed] == [0, 1] and not list(tmp_path.iterdir())
    assert (printed[0]["norm"], printed[0]["lr"], printed[0]["data"]) == ("none", 0.0001, "synthetic")
    (tmp_path / "runs.json").write_text(json.dumps(printed))
    assert main([str(tmp_path / "runs.json"), "--out", str(tmp_path)]) == 0
    assert "2 runs: 0 finished before, 2 to do" in capsys.readouterr().out
    assert main([*argv, "--device", "cpu"]) == 0
    assert "2 finished before, 0 to do" in capsys.readouterr().out
    assert outcome(tmp_path / "fig1-none-0.0001-laptop-seed1").steps == 6


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "name a run; --list lists the presets"),
        (["fig1"], "no preset 'fig1'; did you mean"),
        (["final-0.03", "--set", "lr"], "--set takes KEY=VALUE, got 'lr'"),
        (["final-0.03", "--set", "lr=high"], "lr must be float, got 'high'"),
        (["nowhere.json"], "No such file"),
        (['{"name": "a", "deep": 3}'], "no setting 'deep'; did you mean 'depth'"),
    ],
)
def test_mistakes_are_explained(argv: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_exit_status(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    broken = json.dumps(configs()[1].to_dict())
    assert main([broken, "--out", str(tmp_path)]) == 1
    put_aside(tmp_path / "broken-seed0")
    again = json.dumps(configs()[0].to_dict())
    assert main([again, again, "--out", str(tmp_path)]) == 1
    assert "occurs twice" in capsys.readouterr().err
