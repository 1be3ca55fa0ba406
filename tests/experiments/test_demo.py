"""``python -m experiments demo`` at its smallest scale: its output and its files."""

from pathlib import Path

import pytest

from bnkern.probes import load
from bnkern.train import cifar10
from experiments import demo as demo_module
from experiments.__main__ import main


@pytest.fixture(autouse=True)
def no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """The developer's environment must not determine the images."""
    monkeypatch.delenv("BNKERN_DATA", raising=False)


def test_demo_without_data_says_so_and_runs_twice(tmp_path: Path, monkeypatch, capsys) -> None:
    """Without CIFAR-10 the demo uses synthetic images. A second call reuses the runs of the first."""

    def unavailable(data: str | None) -> cifar10.Cifar10:
        if data == "synthetic":
            return cifar10.synthetic()
        raise cifar10.DataError("CIFAR-10 is not available.")

    monkeypatch.setattr(cifar10, "load", unavailable)
    command = ["demo", "--scale", "smoke", "--device", "cpu", "--out", str(tmp_path)]
    assert main(command) == 0
    message = capsys.readouterr()
    assert "CIFAR-10 is not available" in message.err and "The images are synthetic" in message.out
    figure = tmp_path / "synthetic/demo.png"
    assert f"figure: {figure}\n" in message.out and figure.stat().st_size > 1000
    assert all(f"\n{layer} " in message.out for layer in (18, 54, 90)) and "251.8" in message.out
    for norm in ("batch", "none"):
        recorded = load(tmp_path / f"synthetic/probes-{norm}")
        assert list(recorded.steps) == list(range(demo_module.SETTINGS["smoke"]["steps"]))
    assert main(command) == 0
    assert "2 finished before" in capsys.readouterr().out


def test_demo_with_a_wrong_folder_stops(tmp_path: Path, capsys) -> None:
    """Synthetic images never replace requested data."""
    assert main(["demo", "--scale", "smoke", "--data", str(tmp_path / "nothing"), "--out", str(tmp_path)]) == 1
    assert "no CIFAR-10 in" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
