"""The runner: which runs it executes, repeats, shares and leaves out."""

import errno
import json
import re
from functools import partial
from pathlib import Path

import pytest

from bnkern import backends
from bnkern.train import cifar10
from experiments import names, spec
from experiments import report as reporting
from experiments import results as result_files
from experiments import run as runner
from experiments import sections as report_sections
from experiments.__main__ import main
from experiments.specs import Run
from tests import ROOT
from tests.experiments.support import Procedure, read, run


def test_everything_runs_at_smoke_scale_and_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["run", "all", "--scale", "smoke", "--device", "cpu", "--out", str(tmp_path)]) == 0
    assert main(["report", "--out", str(tmp_path)]) == 0
    assert re.search(r"\[ *1/\d+\] .* done, [\d.]+ s, about \d+ \w+ left", capsys.readouterr().out)
    for name in names():
        results = read(tmp_path / name)
        assert (results.scale, results.data) == ("smoke", "synthetic" if spec(name).images else "none")
        assert len(results.runs) == sum(run.seeds for run in spec(name).at("smoke"))
        for finished_run in results.runs:
            assert finished_run.env["backend"] == (backends.forced() or "cpu") and finished_run.env["seconds"] > 0
            assert {"commit", "dirty", "versions", "cpu", "threads", "started"} <= finished_run.env.keys()
    report = json.loads((tmp_path / "report.json").read_text())
    assert [e["verdict"] for e in report["experiments"]] == ["shown"] * len(names())
    without = {claim["claim"] for e in report["experiments"] for claim in e["claims"] if claim["ours"] is None}
    assert without <= {"share of batch norm's gain"}  # after two steps there may be no gain
    assert "Synthetic images" in (tmp_path / "report.html").read_text()
    sections = reporting.gather(tmp_path)
    assert reporting.publish(sections, tmp_path, tmp_path / "published") == 1 and not (tmp_path / "published").exists()


def test_finished_runs_are_not_repeated(tmp_path: Path, procedure: Procedure, capsys: pytest.CaptureFixture) -> None:
    assert run(tmp_path) == 0 and len(procedure.calls) == 4
    assert run(tmp_path) == 0 and len(procedure.calls) == 4
    assert "4 runs: 4 finished before, 0 to do" in capsys.readouterr().out
    assert run(tmp_path, seeds=3) == 0
    assert procedure.calls[4:] == [("batch", 2), ("none", 2)]


def test_an_interrupted_run_resumes(tmp_path: Path, procedure: Procedure, capsys: pytest.CaptureFixture) -> None:
    procedure.fails = {3: KeyboardInterrupt()}
    assert run(tmp_path) == 130
    assert "Stopped: 2 of 4 runs are finished. The same command continues." in capsys.readouterr().err
    assert run(tmp_path) == 0
    assert procedure.calls == [("batch", 0), ("batch", 1), ("none", 0), ("none", 0), ("none", 1)]
    assert len(read(tmp_path / "moments_by_depth").runs) == 4


def test_a_failing_run_does_not_lose_the_others(tmp_path: Path, procedure: Procedure, capsys) -> None:
    procedure.fails = {2: RuntimeError("out of luck")}
    assert run(tmp_path) == 1
    output = capsys.readouterr()
    assert (
        "smoke-batch-seed1-synthetic: FAILED: RuntimeError: out of luck" in output.out and "1 of 4 runs" in output.err
    )
    failed = tmp_path / "moments_by_depth/smoke-batch-seed1-synthetic"
    assert "out of luck" in (failed / "error.txt").read_text() and not (failed / "DONE").exists()
    assert run(tmp_path) == 0
    assert procedure.calls[4:] == [("batch", 1)] and not (failed / "error.txt").exists()


def test_a_full_disk_stops_with_one_line(tmp_path: Path, procedure: Procedure, capsys: pytest.CaptureFixture) -> None:
    procedure.fails = {2: OSError(errno.ENOSPC, "No space left on device")}
    assert run(tmp_path) == 1
    message = capsys.readouterr().err
    assert re.fullmatch(r"Stopped: No space left on device \(.*\)\. The same command continues\.\n", message)
    assert run(tmp_path) == 0 and len(procedure.calls) == 5


def test_published_runs_count_as_finished_on_request(tmp_path: Path, procedure: Procedure, monkeypatch) -> None:
    """Training takes hours: a run is kept with the report, and another machine does the other seeds."""
    monkeypatch.setattr(cifar10, "load", lambda data: None)
    options = {"experiments": ["norm_variants"], "scale": "reduced", "data": "some folder", "device": "cpu"}
    first, second, published = tmp_path / "first", tmp_path / "second", tmp_path / "published"
    assert runner.run(seeds=1, out=first, **options) == 0 and len(procedure.calls) == 9
    sections = reporting.gather(first)
    reporting.report(sections, first)
    assert reporting.publish(sections, first, published) == 0
    assert runner.run(seeds=2, out=second, published_runs=published / "runs", **options) == 0
    assert procedure.calls[9:] == [(label, 1) for label, _ in procedure.calls[:9]]
    assert len(read(second / "norm_variants").runs) == 9
    assert (
        len(
            result_files.read(
                second / "norm_variants", spec("norm_variants"), None, published / "runs/norm_variants"
            ).runs
        )
        == 18
    )
    reporting.report(reporting.gather(second, published=published), second)
    assert "group-0.1: 2" in (second / "report.md").read_text()


TRAINS = {"scale": "reduced", "data": "some folder", "device": "cpu"}


@pytest.mark.parametrize("published", [False, True])
def test_experiments_share_runs_with_the_same_settings(
    tmp_path: Path, procedure: Procedure, no_images, capsys: pytest.CaptureFixture, published: bool
) -> None:
    """Appendix E has two networks of Figure 1, whose runs are in the same folder or published."""
    first, second = tmp_path / "first", tmp_path / ("second" if published else "first")
    published_folder = first if published else None
    assert runner.run(["learning_rates"], out=first, **TRAINS) == 0
    before = len(procedure.calls)
    assert runner.run(["final_layer_norm"], out=second, published_runs=published_folder, **TRAINS) == 0
    assert {label for label, _ in procedure.calls[before:]} == {"final-0.03", *(f"limit-{n}" for n in NORMS)}
    assert "18 runs: 6 finished before, 12 to do" in capsys.readouterr().out
    place = published_folder / "final_layer_norm" if published else None
    results = result_files.read(second / "final_layer_norm", spec("final_layer_norm"), None, place)
    assert [run.config["seed"] for run in results.where(label="none-0.0001")] == [0, 1, 2]
    assert all(run.config["experiment"] == "final_layer_norm" for run in results.runs) and not results.stale
    assert {run.folder.parent.name for run in results.where(label="batch-0.1")} == {"learning_rates"}
    section = report_sections.of_results("final_layer_norm", results, second)
    assert "some are runs of learning_rates with the same settings" in section.facts["runs"]


NORMS = ("none", "final", "batch")


def test_a_run_with_noise_serves_as_one_without(tmp_path: Path, procedure: Procedure, no_images, capsys) -> None:
    """A run without noise does not serve as one with noise. One command for both trains each network once."""
    noisy = ["batch-0.1", "batch-0.003", "batch-0.0001", "none-0.0001"]
    options = {"out": tmp_path, "seeds": 1, **TRAINS}
    assert runner.run(["learning_rates"], only=["batch-0.1"], **options) == 0
    assert runner.run(["learning_rates", "noise_in_training"], **options) == 0
    assert "11 runs: 1 finished before, 3 the same as another, 7 to do" in capsys.readouterr().out
    assert sorted(label for label, _ in procedure.calls[1:]) == sorted([*noisy, "none-0.003", "none-0.1", "fixup-0.1"])
    assert runner.run(["learning_rates", "noise_in_training"], **options) == 0 and len(procedure.calls) == 8
    lenders = {run.config["label"]: run.folder.parent.name for run in read(tmp_path / "learning_rates").runs}
    assert [label for label, lender in lenders.items() if lender == "noise_in_training"] == sorted(noisy[1:])
    assert len(lenders) == 7 and len(read(tmp_path / "noise_in_training").runs) == 4


def test_runs_with_other_settings_do_not_serve() -> None:
    config = planned_run("learning_rates", "batch-0.1").config
    assert result_files.serves(config, planned_run("final_layer_norm", "batch-0.1").config)
    assert result_files.serves(planned_run("noise_in_training", "batch-0.1").config, config)
    assert not result_files.serves(config, planned_run("noise_in_training", "batch-0.1").config)
    for changes in ({"seed": 1}, {"scale": "full"}, {"norm": "none"}, {"options": config["options"] | {"lr": 0.2}}):
        assert not result_files.serves(config, config | changes)
    untrained = planned_run("moments_by_depth", "batch").config
    assert not result_files.serves(untrained, untrained), "only training takes hours"
    assert not result_files.serves({"name": "of bnkern.train"}, config)


def planned_run(experiment: str, label: str, **options: object) -> runner.Planned:
    [found] = runner.plan([experiment], "reduced", "cifar10", 1, Path(), only=[label], **options)
    return found


def test_precision_belongs_to_the_configuration_and_layout_does_not(
    tmp_path: Path, procedure: Procedure, no_images, monkeypatch
) -> None:
    """Runs in fp32 have the names and configurations that they had before there was a choice."""
    measured_configs = []

    def measure(config: dict, *others: object) -> dict:
        measured_configs.append(config)
        return procedure(config, *others)

    monkeypatch.setitem(runner.PROCEDURES, "training", measure)
    run = partial(runner.run, ["learning_rates"], seeds=1, only=["batch-0.1"], out=tmp_path, **TRAINS)
    assert run() == 0 and run(precision="bf16", layout="contiguous") == 0 and len(procedure.calls) == 2
    assert [config["layout"] for config in measured_configs] == ["channels_last", "contiguous"]
    fp32, bf16 = (tmp_path / "learning_rates" / f"reduced-batch-0.1-seed0{end}" for end in ("", "-bf16"))
    configs = [json.loads((folder / "config.json").read_text()) for folder in (fp32, bf16)]
    assert "precision" not in configs[0]["options"] and not any("layout" in config for config in configs)
    assert configs[1]["options"].pop("precision") == "bf16" and configs[0] == configs[1]
    published = ROOT / "experiments/published/runs/learning_rates/reduced-batch-0.1-seed0/config.json"
    assert json.loads(published.read_text()) == configs[0]
    env = json.loads((bf16 / "env.json").read_text())
    assert env["layout"] == "contiguous"
    assert run(layout="contiguous") == 0 and len(procedure.calls) == 2, "another layout is no other run"
    moments = runner.plan(["moments_by_depth"], "reduced", "cifar10", 1, Path(), precision="bf16")
    assert "precision" not in moments[0].config["options"], "it trains nothing"


def test_results_of_two_precisions_are_not_mixed(tmp_path: Path, procedure: Procedure, no_images) -> None:
    run = partial(runner.run, ["learning_rates"], out=tmp_path, **TRAINS)
    assert run(precision="bf16", seeds=2) == 0
    results = read(tmp_path / "learning_rates")
    assert len(results.runs) == 14 and results.precision == "bf16" and not results.stale
    section = report_sections.of_results("learning_rates", results, tmp_path)
    assert section.caution == "Reduced scale. Trained in bf16." and section.facts["repeat"].endswith(
        " --precision bf16"
    )
    entry = report_sections.record(section)
    assert entry["configuration"] != report_sections.fingerprint(
        "learning_rates", spec("learning_rates"), "reduced", "cifar10"
    )
    for table, rows in section.tables.items():
        (tmp_path / "data").mkdir(exist_ok=True)
        report_sections.write_csv(tmp_path / "data" / f"{table}.csv", rows)
    restored = report_sections.of_record(entry, tmp_path)
    assert restored and restored.precision == "bf16" and restored.facts["repeat"] == section.facts["repeat"]
    assert run(seeds=1) == 0
    results = read(tmp_path / "learning_rates")
    assert len(results.runs) == 7 and results.precision == "fp32"


def test_some_runs_can_be_selected(tmp_path: Path, procedure: Procedure, no_images, capsys) -> None:
    run = partial(runner.run, ["learning_rates", "final_layer_norm"], out=tmp_path, **TRAINS)
    assert run(only=["fixup-0.1-seed2", "final-0.03"]) == 0
    assert procedure.calls == [("fixup-0.1", 2), *(("final-0.03", seed) for seed in range(3))]
    assert run(only=["batch-0.1-seed3"]) == 2 and len(procedure.calls) == 4
    assert capsys.readouterr().err == "There is no run batch-0.1-seed3 of learning_rates, final_layer_norm.\n"
    argv = ["run", "moments_by_depth", "--scale", "smoke", "--only", "none", "--device", "cpu", "--out", str(tmp_path)]
    assert main(argv) == 0 and procedure.calls[4:] == [("none", 0), ("none", 1)]


def test_a_command_stops_before_its_time_is_over(tmp_path: Path, procedure: Procedure, monkeypatch, capsys) -> None:
    """The next one continues, and the exit status says that it must. The durations of a run's pieces are added."""
    clock = [0.0]
    monkeypatch.setattr(runner.time, "perf_counter", lambda: clock[0])

    def measure(config: dict, data, device, folder: Path, tick) -> dict:
        for _ in range(3):  # its state is in its folder
            steps = len(list(folder.glob("step*")))
            if steps == 3:
                break
            clock[0] += 100
            (folder / f"step{steps}").touch()
            tick((steps + 1) / 3, "")
        return procedure(config, data, device, folder, lambda *_: None)

    monkeypatch.setitem(runner.PROCEDURES, "at_init", measure)
    argv = ["run", "moments_by_depth", "--scale", "smoke", "--device", "cpu", "--out", str(tmp_path), "--minutes", "9"]
    assert main(argv) == runner.UNFINISHED == 75
    assert clock[0] == 500, "one more step would end after 600 s, and the limit is 540 s"
    assert "Stopped: 1 of 4 runs are finished. The same command continues." in capsys.readouterr().err
    assert not (tmp_path / "moments_by_depth/smoke-batch-seed1-synthetic/DONE").exists()
    assert [main(argv), clock[0]] == [75, 1000.0] and [main(argv), clock[0]] == [0, 1200.0]
    seconds = [run.env["seconds"] for run in read(tmp_path / "moments_by_depth").runs]
    assert seconds == [300, 300, 300, 300]
    assert sorted(procedure.calls) == [("batch", 0), ("batch", 1), ("none", 0), ("none", 1)]


def test_results_of_unknown_scales_are_left_out(tmp_path: Path, procedure: Procedure) -> None:
    assert run(tmp_path, seeds=1) == 0
    config = tmp_path / "moments_by_depth/smoke-none-seed0-synthetic/config.json"
    config.write_text(config.read_text().replace('"scale": "smoke"', '"scale": "laptop"'))
    assert read(tmp_path / "moments_by_depth").stale == 1


def test_repeated_runs_are_moved_aside(tmp_path: Path, procedure: Procedure, monkeypatch) -> None:
    """A run is repeated if the spec has changed, or on request. Its old results are never overwritten."""
    assert run(tmp_path, seeds=1) == 0
    config = tmp_path / "moments_by_depth/smoke-batch-seed0-synthetic/config.json"
    config.write_text(config.read_text().replace('"batch": 4', '"batch": 5'))
    assert run(tmp_path, seeds=1) == 0
    assert procedure.calls == [("batch", 0), ("none", 0), ("batch", 0)]
    assert run(tmp_path, seeds=1, resume=False) == 0 and len(procedure.calls) == 5
    moved = sorted(folder.name for folder in (tmp_path / "moments_by_depth/.old").iterdir())
    assert moved == [f"smoke-{label}-seed0-synthetic~{n}" for label, n in (("batch", 1), ("batch", 2), ("none", 1))]
    assert len(read(tmp_path / "moments_by_depth").runs) == 2


def test_missing_data_is_one_message_and_leaves_nothing(tmp_path: Path, procedure: Procedure, capsys) -> None:
    assert run(tmp_path / "results", scale="full", data=str(tmp_path / "nowhere")) == 1
    assert re.fullmatch(r"no CIFAR-10 in .*nowhere .*\n", capsys.readouterr().err)
    assert not procedure.calls and not (tmp_path / "results").exists()


def test_results_of_another_configuration_are_left_out(tmp_path: Path, procedure: Procedure) -> None:
    assert run(tmp_path, seeds=2) == 0
    config = tmp_path / "moments_by_depth/smoke-none-seed1-synthetic/config.json"
    config.write_text(config.read_text().replace('"batch": 4', '"batch": 5'))
    results = read(tmp_path / "moments_by_depth")
    assert [run.config["seed"] for run in results.runs] == [0, 1, 0] and results.stale == 1
    reporting.report(reporting.gather(tmp_path), tmp_path)
    assert "1 with another configuration left out" in (tmp_path / "report.md").read_text()


def test_reproduce_runs_all_and_ends_with_the_report(tmp_path: Path, procedure: Procedure, monkeypatch, capsys) -> None:
    monkeypatch.setattr(reporting, "names", lambda: ["moments_by_depth"])
    assert main(["reproduce", "--data", "synthetic", "--seeds", "1", "--out", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(
        r"\d+ runs: 0 finished before, 6 the same as another, \d+ to do, about [\d.]+ (s|min|h) on this machine",
        lines[0],
    )
    report_lines = [line for line in lines if line.endswith(f" is in the report: {tmp_path / 'report.html'}")]
    run_quickly = [name for name in names() if spec(name).at(spec(name).scale("quick"))]
    assert [line.split()[0] for line in report_lines] == run_quickly, "the report grows with each experiment"
    assert lines[-1] == f"report: {tmp_path / 'report.html'}" and Path(lines[-1].split(": ")[1]).exists()
    procedure.fails = {len(procedure.calls) + 1: KeyboardInterrupt()}
    (tmp_path / "moments_by_depth/reduced-none-seed0-synthetic/DONE").unlink()
    assert main(["reproduce", "--data", "synthetic", "--seeds", "1", "--out", str(tmp_path)]) == 130


def test_runs_of_different_scales_and_data_have_separate_folders(tmp_path: Path, procedure, monkeypatch) -> None:
    assert run(tmp_path) == 0
    assert run(tmp_path, scale="full", data="synthetic", seeds=1) == 0
    assert (read(tmp_path / "moments_by_depth").scale, read(tmp_path / "moments_by_depth").data) == (
        "full",
        "synthetic",
    )
    monkeypatch.setattr(cifar10, "load", lambda data: None)
    assert run(tmp_path, data="some folder", seeds=1) == 0
    assert (read(tmp_path / "moments_by_depth").scale, read(tmp_path / "moments_by_depth").data) == ("smoke", "cifar10")
    assert read(tmp_path / "moments_by_depth", "full").data == "synthetic"


def test_an_unknown_name_suggests_the_nearest(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["run", "gradient_sign"])
    assert stopped.value.code == 2
    assert "there is no experiment 'gradient_sign'; did you mean 'gradient_signs'?" in capsys.readouterr().err


def test_list(capsys: pytest.CaptureFixture) -> None:
    assert main(["list"]) == 0
    head, *lines, foot = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == names() and head.split()[0] == "name" and "estimates" in foot


def test_a_run_stores_its_whole_configuration() -> None:
    """What a finished run writes down is the whole of its configuration."""
    [planned, *_] = runner.plan(["gradient_signs"], "full", "cifar10", 1, Path("results"))
    assert planned.name == "gradient_signs/full-batch-seed0"
    fields = set(Run.__dataclass_fields__) - {"seeds"}
    assert planned.config.keys() == fields | {"experiment", "scale", "data", "seed"}
