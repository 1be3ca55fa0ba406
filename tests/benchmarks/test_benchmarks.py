"""The benchmarks' statistics on a fake clock, bytes computed by hand, and one quick run with its results file."""

import json
import os
import subprocess
import sys
from math import prod
from pathlib import Path

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.cases import traffic
from benchmarks.cases.norms import differentiate, relative_errors
from benchmarks.cases.peers import Eager, EagerInPlace
from benchmarks.cases.shapes import GROWTH, QUICK, SETS, SHAPES, Case, Inputs, named
from benchmarks.report import tables
from benchmarks.tools.measurements import measured, targets
from benchmarks.tools.timing import Comparison, rounds_within, wall
from tests import ROOT


class Clock:
    """A clock that advances only when a test calls one of the functions of ``call``."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def call(self, *seconds: float):
        """A function whose calls take these times in turn."""
        turns = 0

        def advance() -> None:
            nonlocal turns
            self.now += seconds[turns % len(seconds)]
            turns += 1

        return advance


def compared(samplers: dict, rounds: int) -> Comparison:
    comparison = Comparison(samplers)
    for _ in range(rounds):
        comparison.sample_peers()
        comparison.sample_first()
    return comparison


def test_wall_times_one_call_and_warms_up_only_on_request() -> None:
    clock = Clock()
    assert wall(clock.call(3.0, 1.0), warm=False, clock=clock)() == 3.0
    assert wall(clock.call(3.0, 1.0), warm=True, clock=clock)() == 1.0


def test_summary_is_the_median_and_the_percentiles() -> None:
    clock = Clock()
    times = [wall(clock.call(*(k / 1000 for k in (5, 1, 3, 2, 4))), warm=False, clock=clock)]
    summary = compared({"ours": times[0]}, rounds=5).summary("ours")
    assert summary == pytest.approx((3.0, 1.8, 4.2, 5))  # of 1..5 ms; percentiles interpolate linearly


def test_ratio_is_formed_within_rounds_so_that_drift_cancels() -> None:
    """The machine becomes ten times slower, and each round still has a ratio of two."""
    clock = Clock()
    drift = (1.0, 2.0, 4.0, 7.0, 10.0)
    samplers = {
        "ours": wall(clock.call(*drift), warm=False, clock=clock),
        "eager": wall(clock.call(*(2 * t for t in drift)), warm=False, clock=clock),
    }
    comparison = compared(samplers, rounds=5)
    assert comparison.ratio("eager", "ours") == 2.0
    assert comparison.ratio("ours", "ours") == 1.0


def test_peers_take_turns_and_each_round_begins_with_another() -> None:
    order = []
    samplers = {name: lambda name=name: order.append(name) or 1.0 for name in ("ours", "a", "b", "c")}
    comparison = compared(samplers, rounds=3)
    assert order == ["a", "b", "c", "ours", "b", "c", "a", "ours", "c", "a", "b", "ours"]
    assert all(len(seconds) == 3 for seconds in comparison.seconds.values())


def test_a_failing_peer_is_listed_and_a_failure_of_ours_raises() -> None:
    def broken() -> float:
        raise RuntimeError("no compiler\nand a long story")

    comparison = Comparison({"ours": lambda: 1.0, "compile": broken})
    comparison.warm_up()
    assert comparison.missing == {"compile": "RuntimeError: no compiler"}
    assert list(comparison.samplers) == ["ours"]
    with pytest.raises(RuntimeError, match="no compiler"):
        Comparison({"ours": broken}).warm_up()


def test_rounds_fit_the_budget_between_two_bounds() -> None:
    assert rounds_within(2.0, 0.1) == 20
    assert rounds_within(2.0, 1.0) == 5
    assert rounds_within(2.0, 1e-6) == 300


@pytest.mark.parametrize(
    ("call", "op", "itemsize", "least", "phased"),
    [  # computed by hand for 800 elements: a tensor has 3200 bytes in fp32 and 1600 in bf16, the mask has 100
        ("moments", "bn", 4, 3200, 3200),
        ("normalize", "bn", 4, 6400, 6400),
        ("normalize", "bn_add_relu", 2, 4900, 4900),
        ("grad_sums", "bn_add_relu", 4, 6500, 6500),
        ("grad_input", "bn_add_relu", 4, 12900, 12900),
        ("forward", "bn", 4, 6400, 9600),
        ("forward", "bn_add_relu", 4, 9700, 12900),
        ("backward", "bn", 4, 9600, 16000),
        ("backward", "bn_add_relu", 2, 6500, 9800),
    ],
)
def test_bytes(call: str, op: str, itemsize: int, least: int, phased: int) -> None:
    assert traffic.minimal_bytes(call, op, 800, itemsize) == least
    assert traffic.phased_bytes(call, op, 800, itemsize) == phased


def test_measurement_has_rate_share_and_speedup() -> None:
    samplers = {"bnkern": lambda: 0.002, "eager": lambda: 0.006, "eager in place": lambda: 0.004, "copy": lambda: 0.01}
    moved = {"bnkern": {"bytes": 16_000_000}, "copy": {"bytes": 100_000_000}}
    measurement = measured(compared(samplers, rounds=3), "bnkern", moved.__getitem__)
    assert measurement["speedup"] == pytest.approx({"eager": 3.0, "eager in place": 2.0, "best": 2.0})
    assert measurement["gb_per_s"] == pytest.approx(8.0)
    assert measurement["share_of_copy"] == pytest.approx(0.8)  # the copy moves 10 GB/s


def test_targets_are_geometric_means_and_worst_cases() -> None:
    label = {"bench": "batch_norm", "op": "bn_add_relu", "mode": "call", "provider": "bnkern"}
    measurements = [label | {"speedup": {"eager": ratio, "best": ratio / 2}} for ratio in (2.0, 8.0)]
    results = {target["name"]: target for target in targets(measurements)}
    mean = results["bn_add_relu forward + backward over the better eager form, geometric mean"]
    assert mean["value"] == pytest.approx(2.0)
    assert not mean["holds"]
    assert results["bn_add_relu forward + backward over eager, geometric mean"]["value"] == pytest.approx(4.0)
    assert results["bn_add_relu forward + backward over eager, slowest case"]["holds"]


def test_random_data_has_the_layout_and_the_dtype() -> None:
    for case in (*QUICK, Case("tiny", "channels_last", "bf16")):
        for x in Inputs.random(case, torch.device("cpu")):
            assert x.shape == SHAPES["tiny"] == case.size
            assert x.nbytes == case.nbytes
            assert (x.stride(1) == 1) == (case.layout == "channels_last")
            assert (x != 0).float().mean() > 0.99


def test_relative_errors_include_a_wrong_result() -> None:
    module = Eager(16, "relu").double()
    inputs = Inputs.random(QUICK[0], torch.device("cpu"))
    inputs = Inputs(*(t.double() for t in inputs)).requiring_grad()
    results = differentiate(module, inputs)
    assert max(relative_errors(results, module, inputs).values()) < 1e-12
    results["dx"] = results["dx"] * 1.01
    assert relative_errors(results, module, inputs)["dx"] == pytest.approx(0.01)


def test_eager_forms_agree() -> None:
    inputs = Inputs.random(QUICK[0], torch.device("cpu")).requiring_grad()
    results = [differentiate(form(16, "relu"), inputs) for form in (Eager, EagerInPlace)]
    for name in results[0]:
        torch.testing.assert_close(results[0][name], results[1][name], rtol=0, atol=0)


def test_quick_run_writes_its_file_and_the_table_reads_it(tmp_path: Path, monkeypatch, capsys) -> None:
    path = tmp_path / "results.json"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    options = ["--quick", f"--bnkern-json={path}", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", "benchmarks/norm/bench_batch_norm.py", *options]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    results = json.loads(path.read_text())
    assert results["quick"] and results["environment"]["versions"]["torch"] == torch.__version__
    missing = {m["provider"]: m["missing"] for m in results["rows"] if "missing" in m}
    assert {"compile", "attorch", "FlagGems", "Apex groupbn"} <= missing.keys()
    measured = [m for m in results["rows"] if "missing" not in m]
    assert {m["provider"] for m in measured} - {"inplace_abn"} == {
        "bnkern",
        "eager",
        "eager in place",
    }
    assert all(m["p20_ms"] <= m["median_ms"] <= m["p80_ms"] for m in measured)
    monkeypatch.setattr(sys, "argv", ["benchmarks", "table", str(path)])
    main()
    table = capsys.readouterr().out
    assert "| bn_add_relu tiny channels_last fp32 |" in table
    assert "compile (left out by --quick)" in table
    assert table.strip() in run.stdout  # the summary at the end of the run is this table


def test_every_shape_is_in_a_set_or_named_by_a_benchmark_and_every_set_has_shapes() -> None:
    by_name = {"large64", "images", "images32", "tiny"} | {name for axis in GROWTH.values() for name in axis}
    assert {name for names in SETS.values() for name in names} | by_name == SHAPES.keys()
    assert named(["cifar", "stage1", "odd"]) == ["stage1", "stage2", "stage3", *SETS["odd"]]
    assert set(named(["all"])) == {name for names in SETS.values() for name in names}
    with pytest.raises(ValueError, match="no shape or set is called 'stage9'"):
        named(["cifar", "stage9"])


def test_growth_reaches_the_same_sizes_along_each_axis() -> None:
    for sizes in GROWTH.values():
        elements = [prod(size) for size in sizes.values()]
        assert elements == [100352 * 4**k for k in range(5)]


def test_table_of_batches_has_images_per_second() -> None:
    label = {"bench": "augment", "op": "augment", "shape": "images", "layout": "nchw", "dtype": "fp32"}
    times = {"median_ms": 0.25, "p20_ms": 0.2, "p80_ms": 0.3, "images": 128, "speedup": {"eager": 4.0, "best": 2.0}}
    lines = list(tables._batches([label | {"provider": "bnkern"} | times, label | {"provider": "a", "missing": "b"}]))
    assert lines[-2] == "| augment images nchw fp32 | bnkern | 0.25 (0.2 to 0.3) | 512 | 2.00x |"
    assert lines[-1] == "| augment images nchw fp32 | a | missing: b |  |  |"
