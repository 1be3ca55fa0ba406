"""``make gpu-check`` without a GPU: its runner, its packs, and the tables that it makes from the output of tools.

The whole command runs on a stand-in for the GPU (tests/benchmarks/stand_in), which is slow.
"""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.cases.shapes import named
from benchmarks.gpu import __main__ as gpu_check
from benchmarks.gpu import attempts, counters, device, fresh, parts, profile, rules, state, summary, targets
from benchmarks.gpu.state import MODULE, Record, State, pack, unpack
from bnkern import _native as native
from bnkern.backends import cuda
from tests import ROOT

SAMPLES = Path(__file__).parent / "stand_in" / "samples"


# ---------------------------------------------------------------------------------------------------- running parts


def test_a_part_is_stopped_when_its_time_is_over(tmp_path: Path) -> None:
    def part(code: str, seconds: float) -> tuple[str, str]:
        log = tmp_path / "part.log"
        record = gpu_check.run("part", [sys.executable, "-uc", code], log, dict(os.environ), seconds)
        return record.result, log.read_text().strip()

    assert part("print(1)", 60) == ("ok", "1")
    assert part("print(1); raise SystemExit(3)", 60) == ("FAILED", "1")
    result, log = part("import time; print(1); time.sleep(60)", 3)
    assert result == "out of time"
    assert log.startswith("1") and "KeyboardInterrupt" in log  # it was interrupted, and had time to end


def test_a_process_that_outlives_its_part_does_not_delay_the_next_one(tmp_path: Path) -> None:
    code = "import subprocess; subprocess.Popen(['sleep', '60'], start_new_session=True); print('left', flush=True)"
    start = time.perf_counter()
    record = gpu_check.run("part", [sys.executable, "-c", code], tmp_path / "log", dict(os.environ), 30)
    assert (record.result, (tmp_path / "log").read_text()) == ("ok", "left\n")
    assert time.perf_counter() - start < 30


def test_a_part_that_ignores_the_signal_is_killed(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(gpu_check, "GRACE", 1)
    code = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    record = gpu_check.run("part", [sys.executable, "-c", code], tmp_path / "log", dict(os.environ), 2)
    assert (record.result, record.status) == ("out of time", -9)


def test_a_missing_tool_fails_only_its_part(tmp_path: Path) -> None:
    record = gpu_check.run("part", ["no-such-sanitizer"], tmp_path / "log", dict(os.environ), 60)
    assert record.result == "FAILED" and record.ran


def test_parts_name_existing_files_and_fit_the_two_commands() -> None:
    assert len(set(parts.NAMES)) == len(parts.NAMES) and parts.NAMES[0] == "build" and parts.PARTS[-1].seconds is None
    for part in parts.PARTS[1:]:
        argv = parts.command(part, Path("out"))
        files = [argument for argument in argv if argument.startswith(("benchmarks/", "tests/"))]
        assert all((ROOT / file).exists() for file in files), part.name
        named(
            [
                argument
                for option in part.arguments
                if option.startswith("--shapes=")
                for argument in option[9:].split(",")
            ]
        )
        assert not [argument for argument in argv if "{" in argument]
    first = parts.NAMES.index("replicas")
    second = parts.NAMES.index("host")
    assert sum(part.least for part in parts.PARTS[:first]) <= parts.COMMANDS[0]
    assert sum(part.least for part in parts.PARTS[first:second]) <= parts.COMMANDS[1]


class Clock:
    """The time of run_parts. Each part takes the seconds that are given for it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, out: Path, results: dict[str, tuple[str, float]]) -> None:
        self.now, self.limits = 0.0, {}
        monkeypatch.setattr(gpu_check.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(gpu_check, "run", self.run)
        monkeypatch.setattr(gpu_check, "has_data", lambda data: True)
        monkeypatch.setattr(state, "sources", lambda: "these sources")
        monkeypatch.setattr(state, "put", lambda source, target: target.touch())
        self.results = results

    def run(self, name: str, argv: list[str], log: Path, env: dict, seconds: float) -> Record:
        result, duration = self.results.get(name, ("ok", 1.0))
        self.now += duration
        self.limits[name] = seconds
        return Record(name, result, 0 if result == "ok" else 1, duration)

    def command(self, out: Path, minutes: float) -> list[str]:
        """Runs the parts that are left, and returns the names of those that ran."""
        self.limits = {}
        args = gpu_check.argparse.Namespace(stretch=1, data=None, pack=None)
        gpu_check.run_parts(State(out).remaining(), State(out), self.now + 60 * minutes, {}, args)
        return list(self.limits)


def test_a_second_command_continues_where_the_first_one_stopped(tmp_path: Path, monkeypatch) -> None:
    results = {"profile": ("FAILED", 60), "graphs": ("out of time", 250), "figure1": ("out of time", 50)}
    clock = Clock(monkeypatch, tmp_path, results)
    first = clock.command(tmp_path, 5)
    assert first == parts.NAMES[: parts.NAMES.index("graphs") + 1]
    second = clock.command(tmp_path, 600)
    assert second[:-3] == [name for name in parts.NAMES if name not in {*first, "figure1"}]
    assert second[-3:] == ["profile", "graphs", "figure1"]  # those that failed come last, before the part that resumes
    assert clock.command(tmp_path, 600) == ["profile", "graphs", "figure1"]


def test_a_part_that_does_not_fit_is_skipped_for_one_that_does(tmp_path: Path, monkeypatch) -> None:
    clock = Clock(monkeypatch, tmp_path, {"build": ("ok", 40)})
    ran = clock.command(tmp_path, (75 + 50) / 60)
    assert ran[:2] == ["build", "machine"]
    assert {"smoke", "compiled"} & set(ran) == {"smoke"}  # 40 of the 84 seconds that are left


def test_nothing_runs_after_a_failed_build(tmp_path: Path, monkeypatch) -> None:
    clock = Clock(monkeypatch, tmp_path, {"build": ("FAILED", 5)})
    assert clock.command(tmp_path, 9) == ["build"]
    assert clock.command(tmp_path, 9) == ["build"]


def test_the_last_part_takes_the_time_that_is_left(tmp_path: Path, monkeypatch) -> None:
    clock = Clock(monkeypatch, tmp_path, {})
    clock.command(tmp_path, 60)
    assert clock.limits["figure1"] == pytest.approx(3600 - (len(parts.PARTS) - 1) - gpu_check.GRACE)


def test_a_changed_source_is_built_again(tmp_path: Path, monkeypatch) -> None:
    clock = Clock(monkeypatch, tmp_path, {})
    clock.command(tmp_path, 600)
    assert State(tmp_path).built()
    monkeypatch.setattr(state, "sources", lambda: "other sources")
    assert [part.name for part in State(tmp_path).remaining()] == ["build"]
    (tmp_path / MODULE).unlink()
    monkeypatch.setattr(state, "sources", lambda: "these sources")
    assert not State(tmp_path).built()


def test_a_module_is_replaced_while_a_process_has_it_open(tmp_path: Path) -> None:
    target = tmp_path / "loaded.so"
    target.write_text("old")
    with target.open() as loaded:
        (tmp_path / "built.so").write_text("new")
        state.put(tmp_path / "built.so", target)
        assert loaded.read() == "old" and target.read_text() == "new"


def test_attempts_are_numbered(tmp_path: Path) -> None:
    paths = []
    for _ in range(3):
        paths.append(fresh(tmp_path, "bench-graphs.json"))
        paths[-1].touch()
    fresh(tmp_path, "bench-graphs-fp32.json").touch()
    assert [path.name for path in paths] == ["bench-graphs.json", "bench-graphs-2.json", "bench-graphs-3.json"]
    assert attempts(tmp_path, "bench-graphs.json") == paths


def test_a_pack_restores_the_folder(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(state, "PIECE", 3000)
    out, file = tmp_path / "out", tmp_path / "packs" / "pack"
    (out / "figure1").mkdir(parents=True)
    (out / "noise").write_bytes(os.urandom(10_000))
    (out / "figure1" / "checkpoint.pt").write_text("state")
    (out / "figure1" / "checkpoint.pt.previous").write_text("older")
    pack(out, file)
    assert len(list(file.parent.iterdir())) == 4 and not list(file.parent.glob("*.part"))
    unpack(file, tmp_path / "restored")
    assert (tmp_path / "restored" / "noise").read_bytes() == (out / "noise").read_bytes()
    assert [path.name for path in (tmp_path / "restored" / "figure1").iterdir()] == ["checkpoint.pt"]
    (out / "noise").unlink()
    pack(out, file)
    assert [path.name for path in file.parent.iterdir()] == ["pack.00"]  # no piece of the larger pack is left
    with pytest.raises(SystemExit, match="there is no"):
        unpack(tmp_path / "packs" / "other", tmp_path)


def without(module: str, *argv: str) -> subprocess.CompletedProcess:
    """The command line in a Python that cannot import a module."""
    code = (
        f"import runpy, sys; sys.modules[{module!r}] = None; sys.argv[1:] = {[*argv]!r};"
        "runpy.run_module('benchmarks.gpu', None, '__main__')"
    )
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)


def test_the_tables_need_no_native_module(tmp_path: Path) -> None:
    """On a bare machine the command starts before the module is built, and prints its tables if the build fails."""
    process = without("bnkern._native", "--summary", "--out", str(tmp_path))
    assert process.returncode == 0 and "not measured" in process.stdout, process.stderr


def test_the_plan_needs_no_torch() -> None:
    process = without("torch", "--plan")
    assert process.returncode == 0 and process.stdout.count("\n") > len(parts.PARTS), process.stderr


# --------------------------------------------------------------------------------------------------- output of tools


def test_kernels_of_a_trace_are_summed_by_name_and_step() -> None:
    rows = {row["name"]: row for row in profile.kernels(json.loads((SAMPLES / "trace.json").read_text()), steps=3)}
    forward = next(row for name, row in rows.items() if "rows_forward" in name)
    assert (forward["calls"], forward["us"], forward["kind"]) == (3, 3 * 9.5, "batch norm, bnkern")
    kinds = {row["kind"] for row in rows.values()}
    assert {kind for kind, _ in profile.KINDS} - kinds == {
        "linear",
        "batch of images",
        "reductions, loss, metrics",
        "Inductor",
    }
    assert "other" not in kinds
    assert not any(row["name"].startswith("cuda") for row in rows.values())  # calls of the host are not kernels
    lines = profile.table({"a": {"step_us": 700.0, "kernels": list(rows.values())}})
    total = sum(row["us"] for row in rows.values())
    assert lines[-2].split()[-3:] == [f"{total:.0f}", "(", "30)"] and lines[-1].split()[-1] == "700"


@pytest.mark.parametrize(
    ("name", "kind"),
    [  # names of torch 2.11's, cuDNN's, cuBLAS's and Inductor's kernels
        ("triton_poi_fused_convolution_relu_0", "Inductor"),
        ("_augment_kernel", "batch of images"),
        ("void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float>>(int)", "reductions, loss, metrics"),
        ("nvjet_sm90_tst_64x8_64x16_4x1_v_bz_TNT", "linear"),
        ("ampere_sgemm_32x32_sliced1x4_tn", "linear"),
        ("cudnn::bn_bw_1C11_singleread_specialized<__nv_bfloat16>", "batch norm, torch"),
        ("void cudnn::cnn::wgrad2d_grouped_direct_kernel<float>", "convolution, weight gradient"),
    ],
)
def test_kinds_of_kernels(name: str, kind: str) -> None:
    assert profile.kind_of(name) == kind


def test_counters_are_read_from_ncus_table() -> None:
    text = (SAMPLES / "ncu.csv").read_text()
    kernels = counters.read(text)
    assert len(kernels) == sum(counted.kernels for counted in counters.CALLS) == 12
    first, planes = kernels[0], kernels[6]
    assert (first["us"], first["registers"], first["grid"], first["cluster"]) == (9.5, 101, 132, 0)
    assert (planes["cluster"], planes["clusters at once"]) == (8, 15)
    assert list(first["stalls"])[:2] == ["long_scoreboard", "barrier"] and "selected" not in first["stalls"]
    assert counters.read(text.replace('"us"', '"ns"'))[0]["us"] == pytest.approx(9.5e-3)
    assert counters.labelled(kernels)[-1]["call"] == "backward stage1 channels_last, two kernels"
    assert {kernel["call"] for kernel in counters.labelled(kernels[:-1])} == {"?"}
    assert len(counters.table(counters.labelled(kernels))) == 13
    with pytest.raises(ValueError, match="no table in ncu's output"):
        counters.read("==ERROR== ERR_NVGPUCTRPERM")
    with pytest.raises(ValueError, match="no duration or no stall reasons"):
        counters.read(text.replace('"9.50"', '"n/a"'))


def test_counters_are_parsed_as_numbers() -> None:
    assert [counters.number(text) for text in ("1,048,576", "3.5", "n/a", "", "PolicySpread")] == [
        1048576,
        3.5,
        None,
        None,
        None,
    ]


def test_output_of_the_device_program_is_read() -> None:
    found = device.read((SAMPLES / "device.txt").read_text())
    assert found["layouts"] == {"mma.m16n8k16": 0, "ldmatrix.trans": 0}
    lines = device.table(found["occupancy"])
    assert len(lines) == 1 + 12 * 2 * 3  # kernels, numbers of threads, sizes of shared memory
    assert lines[1].endswith("; 66 of 2, 33 of 4, 15 of 8, 7 of 16")
    with pytest.raises(ValueError, match="no results in the output"):
        device.read("layout,mma.m16n8k16,0\n")


def test_device_checks_name_kernels_of_the_module() -> None:
    if not native.build_info()["cuda"]:
        pytest.skip("built without CUDA")
    kernels = re.findall(r'\{"\w+", "(\w+_kernel\w+)", (?:true|false)\}', device.SOURCE.read_text())
    assert len(kernels) == 12
    module = Path(native.__file__).read_bytes()
    assert [kernel for kernel in kernels if kernel.encode() not in module] == []


def test_device_checks_compile(tmp_path: Path) -> None:
    if not gpu_check.shutil.which("nvcc"):
        pytest.skip("nvcc is not installed")
    command = ["nvcc", "-arch=sm_90", "-std=c++20", "-o", tmp_path / "device", device.SOURCE]
    subprocess.run(command, check=True)


# ------------------------------------------------------------------------------------------------ rules and targets


def strategies(times: dict[int, tuple[float, float]]) -> list[dict]:
    """Measurements of both strategies by size."""
    label = {"bench": "strategies", "mode": "graph", "op": "forward, warm", "layout": "nchw", "dtype": "bf16"}
    return [
        label | {"shape": str(size), "tensor_bytes": size, "provider": provider, "median_ms": ms}
        for size, both in times.items()
        for provider, ms in zip((rules.ONE, rules.TWO), both, strict=True)
    ]


@pytest.mark.parametrize(
    ("times", "size", "loss"),
    [
        ({1: (1.0, 2.0), 8: (1.0, 3.0)}, 0, 1.0),
        ({1: (2.0, 1.0), 8: (1.0, 1.0), 64: (1.0, 2.0)}, 8, 1.0),
        ({1: (2.0, 1.0), 8: (2.0, 1.0)}, rules.NEVER, 1.0),
        ({1: (1.0, 4.0), 8: (2.0, 1.0)}, 0, 2**0.5),  # one size cannot serve both; the loss says so
        ({1: (1.0, 1.0), 8: (1.0, 1.0)}, 0, 1.0),
    ],
)
def test_the_rule_has_the_least_loss(times: dict, size: int, loss: float) -> None:
    measured = strategies(times)
    measured.append(measured[0] | {"mode": "call", "median_ms": 99.0})
    measured.append({**measured[0], "shape": "x", "provider": "Triton"})
    rule = rules.best(rules.pairs(measured))
    assert rule.single_read_from == size and rule.loss == pytest.approx(loss)
    assert len(rule.pairs) == len(times)


def test_the_table_of_rules_is_what_the_backend_reads(tmp_path: Path) -> None:
    assert cuda.rule_of("an unknown GPU").source.startswith("not measured")
    table = tmp_path / "rules.json"
    table.write_text('{"B": {"single_read_from": 3, "source": "s"}}')
    rule = rules.best(rules.pairs(strategies({1: (2.0, 1.0), 8: (1.0, 2.0)})))
    entries = json.loads(rules.table_with("A", rule, "make gpu-check, 2026-11-29", [66, 32, 15], table))
    read = {name: cuda.Rule(**entry) for name, entry in entries.items()}
    assert list(read) == ["A", "B"] and read["A"].single_read_from == 8 and read["B"] == cuda.Rule(3, "s")
    assert read["A"].clusters == [66, 32, 15] and read["B"].clusters is None
    assert "2 calls, 1.000 times" in read["A"].source
    assert rules.TABLE.exists() and all(cuda.Rule(**entry) for entry in json.loads(rules.TABLE.read_text()).values())


def test_targets_of_an_earlier_run() -> None:
    """The committed file of an H200, in which "bnkern" is Triton's kernels."""
    results = json.loads((ROOT / "benchmarks" / "results" / "nvidia-h200-2026-11-27.json").read_text())
    run = targets.Run(results["rows"], {"cuda-tests": 0, "memcheck": 3, "train-tests": None})
    verdicts = {target.name: target.verdict(run) for target in targets.TARGETS}
    assert len(verdicts) == len(targets.TARGETS)
    assert verdicts["ResNet-110 step in a graph, torch's best form over ours"] == (
        "missed",
        pytest.approx(1.094, abs=2e-3),
    )
    assert verdicts["ResNet-110 step in a graph, ms, no slower than before (+3 %)"][0] == "missed"  # 9.94 ms
    assert verdicts["Calls one by one, speed over torch's, geometric mean"][0] == "missed"
    assert verdicts["Batch norm in a graph over its bytes at a copy's rate, largest"] == (
        "missed",
        pytest.approx(10.24, abs=0.01),
    )
    assert verdicts["ResNet-20, images/s of four replicas over one"] == ("not measured", None)
    assert verdicts["Failed tests of the CUDA kernels"] == ("held", 0)
    assert verdicts["Failed tests under memcheck"] == ("missed", 3)
    assert verdicts["Failed tests of training on a GPU"] == ("not measured", None)
    assert verdicts["Failed tests under racecheck"] == ("not measured", None)


def graph(provider: str, ms: float, bench: str = "graph") -> dict:
    return {"bench": bench, "op": "resnet110", "dtype": "bf16", "provider": provider, "median_ms": ms}


def test_compiled_forms_are_among_torchs_best() -> None:
    rows = [graph("bnkern", 5.0), graph("eager", 10.0), graph("eager nchw", 20.0)]
    assert targets.over_best_of_torch(targets.Run(rows, {}), "resnet110") == 2.0
    rows += [graph("bnkern", 5.5, "compiled_graph"), graph("compile", 6.6, "compiled_graph")]
    assert targets.over_best_of_torch(targets.Run(rows, {}), "resnet110") == pytest.approx(1.2)
    assert targets.over_best_of_torch(targets.Run(rows[1:3], {}), "resnet110") is None  # ours is missing
    assert targets.over_best_of_torch(targets.Run([], {}), "resnet110") is None


def test_replicas_are_compared_by_images() -> None:
    rows = [graph("bnkern, one", 2.0, "replicas"), graph("bnkern, four side by side", 4.0, "replicas")]
    assert targets.replicas(targets.Run(rows, {}), "resnet110") == 2.0
    assert targets.replicas(targets.Run(rows[:1], {}), "resnet110") is None


def test_failed_tests_are_counted_only_if_the_tests_ended(tmp_path: Path) -> None:
    def counted(tests: int, failures: int, errors: int, result: str, skipped: int = 1) -> int | None:
        kinds = f'tests="{tests}" failures="{failures}" errors="{errors}" skipped="{skipped}"'
        suite = f'<testsuite name="pytest" {kinds}/>'
        (tmp_path / "cuda-tests.xml").write_text(f"<testsuites>{suite}</testsuites>")
        found = State(tmp_path)
        found.records = [Record("cuda-tests", result, 0 if result == "ok" else 1, 1.0)]
        return summary.failed_tests(tmp_path, found)["cuda-tests"]

    assert counted(9, 0, 0, "ok") == 0
    assert counted(9, 1, 2, "FAILED") == 3
    assert counted(9, 0, 0, "FAILED") == 1  # the sanitizer found an error
    assert counted(9, 0, 0, "out of time") is None
    assert counted(0, 0, 0, "FAILED", skipped=0) is None
    assert counted(9, 0, 0, "ok", skipped=9) is None


def test_an_error_in_one_table_leaves_the_others(tmp_path: Path) -> None:
    (tmp_path / "counters.json").write_text("[{}]")
    (tmp_path / "device.json").write_text(json.dumps(device.read((SAMPLES / "device.txt").read_text())))
    text = summary.write(tmp_path, State(tmp_path))
    assert "cannot be shown: KeyError" in text and "15 of 8" in text and "not measured" in text
    assert text == (tmp_path / "summary.txt").read_text()


# ------------------------------------------------------------------------------------------------- the whole command


@pytest.mark.slow
def test_the_whole_command_on_a_stand_in(tmp_path: Path) -> None:
    """Every part runs with its real arguments, and every target has a number. Nothing is left for a second command."""
    out, file = tmp_path / "out", tmp_path / "pack"
    argv = [sys.executable, "-m", "tests.benchmarks.stand_in", "--stretch", "60", "--data", "synthetic"]

    def command(*options: object) -> str:
        process = subprocess.run([*argv, *map(str, options)], cwd=ROOT, capture_output=True, text=True)
        assert process.returncode == 0, process.stdout[-20_000:] + process.stderr
        return process.stdout

    text = command("--out", out, "--pack", file, "--minutes", 600)
    records = State(out).records
    assert [record.part for record in records] == parts.NAMES
    assert [record for record in records if record.result != "ok"] == []
    assert "cannot be shown" not in text and "were not used by the project" not in text
    table = text[text.index("== Targets") :]
    assert "not measured" not in table and table.count("held") + table.count("missed") >= len(targets.TARGETS)
    entry = cuda.Rule(**json.loads((out / rules.TABLE.name).read_text())["NVIDIA H200"])
    assert "calls" in entry.source and entry.clusters == [66, 32, 16]
    resumed = command("--out", tmp_path / "other", "--resume", file, "--minutes", 600)
    assert "\n== build" not in resumed and "\n== graphs" not in resumed
