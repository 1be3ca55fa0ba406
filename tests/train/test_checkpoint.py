"""Checkpoint files are complete or refused, execute no code, and the previous one is kept."""

import pickle
from pathlib import Path

import pytest
import torch

from bnkern.train import checkpoint
from bnkern.train.checkpoint import CheckpointError, load, read, save, write


def state(number: int) -> dict:
    return {"config": {"lr": 0.1, "seed": 0}, "number": number, "t": torch.arange(1000.0), "inside": {"flag": True}}


def test_a_written_state_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    assert load(path) is None
    write(path, state(1))
    restored = read(path)
    assert (
        restored["number"] == 1 and restored["inside"] == {"flag": True} and torch.equal(restored["t"], state(1)["t"])
    )
    assert [file.name for file in tmp_path.iterdir()] == ["c.pt"]


def test_the_previous_checkpoint_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    for number in range(3):
        save(path, state(number))
    assert load(path)["number"] == 2
    path.unlink()  # the state after a crash between the two renames
    assert load(path)["number"] == 1


DAMAGES = {
    "cut short": lambda content: content[: len(content) // 2],
    "cut in the first line": lambda content: content[:5],
    "cut in the checksum": lambda content: content[:60],
    "one bit over": lambda content: content[:-100] + bytes([content[-100] ^ 1]) + content[-99:],
    "something more": lambda content: content + b"\0",
    "nothing": lambda content: b"",
    "another file": lambda content: b"PK\x03\x04" + content,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_and_the_previous_one_is_used(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "c.pt"
    save(path, state(1))
    save(path, state(2))
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    with pytest.raises(CheckpointError, match=r"is not a checkpoint of bnkern|is truncated or damaged"):
        read(path)
    with pytest.warns(RuntimeWarning, match=r"c\.pt is .*; continuing from the previous one, c\.pt\.previous"):
        assert load(path)["number"] == 1
    (tmp_path / "c.pt.previous").write_bytes(b"")
    with pytest.raises(CheckpointError, match="no valid checkpoint is left: remove the files"):
        load(path)


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    save(path, state(1))
    save(path, state(2) | {"config": {"lr": 0.2, "seed": 0}})
    with pytest.warns(RuntimeWarning, match=r"c\.pt belongs to another run: its lr differ"):
        assert load(path, {"lr": 0.1, "seed": 0})["number"] == 1


class _Harmful:
    def __reduce__(self):
        return (print, ("executed",))


def test_nothing_in_a_file_is_executed(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "c.pt"
    write(path, {"harmful": _Harmful()})
    with pytest.raises((CheckpointError, pickle.UnpicklingError)):
        read(path)
    assert "executed" not in capsys.readouterr().out


def test_a_crash_while_writing_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c.pt"
    write(path, state(1))

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write(path, state(2))
    assert read(path)["number"] == 1
