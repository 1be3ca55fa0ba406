"""The scripts of examples/, each run once with tiny settings."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import matplotlib
import pytest

from tests import ROOT

EXAMPLES = ROOT / "examples"


def example(name: str) -> ModuleType:
    description = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(description)
    description.loader.exec_module(module)
    return module


def test_every_example_has_its_test_and_is_short() -> None:
    scripts = {path.stem: path.read_text() for path in EXAMPLES.glob("*.py")}
    assert {f"test_{name}" for name in scripts} <= globals().keys()
    assert all(30 <= len(text.splitlines()) <= 60 for text in scripts.values())


def test_fused_block(capsys: pytest.CaptureFixture) -> None:
    example("fused_block").main(["--steps", "8", "--batch", "8"])
    losses = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    assert len(losses) == 8 and losses[-1] < losses[0]


def test_convert_model(capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    example("convert_model").main(["--rounds", "1", "--batch", "2", "--size", "32"])
    message = capsys.readouterr().out
    assert "20 batch norms: " in message and "converted: " in message
    before, after = (float(word) for word in message.partition("loss: ")[2].split()[:5:4])
    assert after == pytest.approx(before, rel=1e-4)  # float32, through 20 batch norms of 2 images each


def test_probe_training(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    matplotlib.use("agg")
    example("probe_training").main(["--steps", "2", "--batch", "4", "--out", str(tmp_path / "run")])
    figure = tmp_path / "run/probes.png"
    assert str(figure) in capsys.readouterr().out and figure.stat().st_size > 1000


def test_train_distributed() -> None:
    """In two processes. With batch norms that are not synchronised the running statistics differ between ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"]
    command += ["--rdzv-endpoint=localhost:0", str(EXAMPLES / "train_distributed.py"), "--steps", "2"]
    environment = os.environ | {"PYTHONPATH": str(EXAMPLES.parent), "OMP_NUM_THREADS": "1"}
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    assert "parameters: 5 of 5 tensors are equal on 2 ranks" in process.stdout
    assert "running statistics: 3 of 3 tensors are equal on 2 ranks" in process.stdout
