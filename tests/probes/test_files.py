"""The files of a recording, and the buffers that are written to them."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

import bnkern
from bnkern import probes
from bnkern.probes import files
from tests import ROOT
from tests.support.probing import CHANNEL, make_net, train

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
    result = probes.load(tmp_path)
    stacked = result.array("activation_moments", "mean")
    assert stacked.shape == (3, 4, 6)  # layer, step, channel
    columns = result.table("gradient_channel_signs")
    assert {len(column) for column in columns.values()} == {3 * 4 * 6}
    chosen = (columns["layer"] == "norm2") & (columns["step"] == 3) & (columns["channel"] == 5)
    assert columns["abs_sum"][chosen] == result["gradient_channel_signs"]["norm2"]["abs_sum"][3, 5]
    with pytest.raises(KeyError, match="'weight' was not recorded; there are activation_moments"):
        result["weight"]
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
        pytest.raises(ValueError, match="has records already; choose another folder, or append=True"),
        probes.record(net, CHANNEL, out=resumed),
    ):
        pass
    assert not net.norm1.taps
    probes.truncate(resumed, 3)
    assert probes.load(resumed).steps.tolist() == [0, 1, 2]
    net = make_net()
    with probes.record(net, CHANNEL, probes.every(1, start=3), resumed, append=True) as rec:
        train(net, 6, rec)
    expected, result = probes.load(whole), probes.load(resumed)
    assert result.steps.tolist() == list(range(6))
    np.testing.assert_array_equal(
        result["activation_moments"]["norm1"]["mean"], expected["activation_moments"]["norm1"]["mean"]
    )


def test_an_exception_in_training_leaves_what_was_closed(tmp_path: Path) -> None:
    net = make_net()
    with pytest.raises(KeyboardInterrupt), probes.record(net, CHANNEL, out=tmp_path) as rec:
        train(net, 3, rec)
        raise KeyboardInterrupt
    assert probes.load(tmp_path).steps.tolist() == [0, 1, 2]
    assert not net.norm1.taps


def test_a_killed_process_leaves_whole_files(tmp_path: Path) -> None:
    """Only records that were not flushed are lost, and no part is incomplete."""
    code = f"""
        import os, signal
        from tests.support.probing import CHANNEL, make_net, train
        from bnkern import probes
        net = make_net()
        with probes.record(net, CHANNEL, out={str(tmp_path)!r}, capacity=3) as rec:
            train(net, 10, rec)
            while len(list(__import__("pathlib").Path({str(tmp_path)!r}).glob("part-*.npz"))) < 3:
                pass
            os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], timeout=120, cwd=ROOT)
    assert done.returncode == -9
    assert probes.load(tmp_path).steps.tolist() == list(range(9))


def test_an_unclosed_recording_is_written_before_the_interpreter_ends(tmp_path: Path) -> None:
    """The interpreter waits for the thread that writes, which is slow here."""
    code = f"""
        import time
        from tests.support.probing import CHANNEL, make_net, train
        from bnkern import probes
        from bnkern.probes import files
        write = files.write_part
        def slowly(path, arrays):
            time.sleep(0.2)
            write(path, arrays)
        files.write_part = slowly
        net = make_net()
        recording = probes.record(net, CHANNEL, out={str(tmp_path)!r}, capacity=3)
        rec = recording.__enter__()
        train(net, 9, rec)
        rec.flush()
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], timeout=120, cwd=ROOT)
    assert done.returncode == 0
    assert probes.load(tmp_path).steps.tolist() == list(range(9))


def test_a_full_buffer_drops_the_newest_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = make_net()
    monkeypatch.setattr(files.Writer, "busy", lambda self: True)  # a disk that is never fast enough
    with (
        pytest.warns(UserWarning, match="7 records were dropped"),
        probes.record(net, CHANNEL, out=tmp_path, capacity=3) as rec,
    ):
        train(net, 10, rec)
        assert rec.dropped == 7
    result = probes.load(tmp_path)
    assert result.steps.tolist() == [0, 1, 2] and result.index["dropped"] == 7


def test_small_buffers_are_flushed_in_time(tmp_path: Path) -> None:
    net = make_net()
    with probes.record(net, CHANNEL, out=tmp_path, capacity=2) as rec:
        train(net, 7, rec)
        rec.flush()
        train(net, 2, rec)
    assert probes.load(tmp_path).steps.tolist() == list(range(9))
    assert len(files.parts(tmp_path)) >= 4


@pytest.mark.skipif(
    os.geteuid() == 0 and not Path("/dev/full").exists(), reason="this needs a device that is always full"
)
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


def test_a_ring_that_is_used_again_loses_no_record(tmp_path: Path) -> None:
    """A full ring is passed to the writer without a copy.

    Its records must be on the disk, whatever is recorded later.
    """
    model = bnkern.nn.BatchNorm2d(4)
    with bnkern.probes.record(model, ["activation_moments"], out=tmp_path, capacity=4) as recording:
        for k in range(200):
            model(torch.full((2, 4, 3, 3), float(k)))
            recording.step()
    result = bnkern.probes.load(tmp_path)["activation_moments"][""]
    assert result["mean"][:, 0].tolist() == list(range(200))


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
    assert len(set(rings)) == 2  # one ring is filled while the other is written
    result = bnkern.probes.load(tmp_path)["activation_moments"][""]
    assert result["mean"][:, 0].tolist() == list(range(24))
