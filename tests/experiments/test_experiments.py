"""The experiments: specs and drawers in order, the runner's promises, verdicts, and the report."""

import ast
import errno
import json
import math
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from bnkern import backends
from bnkern.train import cifar10
from experiments import drawer, names, spec, words
from experiments import report as reporting
from experiments import results as reading
from experiments import run as running
from experiments import sections as telling
from experiments.__main__ import main
from experiments.pace import Kind, Pace, shares
from experiments.results import Finished, Results, Value, find, judge
from experiments.specs import Claim, Run, above, below, between, within, within_factor
from tests import ROOT
from tests.experiments.made_up import made_up

FULL = Results("full", "cifar10", ())  # judged, and otherwise of no account


# ------------------------------------------------------------------------------------------------ made-up results


def results_of(name: str, holds: bool = True, seeds: int | None = None, **changed: float) -> Results:
    """Made-up results at scale full, for which the claims hold or break, but for ``changed``.

    The default number of seeds is 2, or enough for percentiles if there is a claim on all runs together.
    """
    seeds = seeds or enough_seeds(name)
    runs = []
    for planned in running.plan([name], "full", "cifar10", seeds, Path()):
        made = Finished(planned.folder, planned.config, {"seconds": 1.0, "started": "2026-11-28T12:00:00"})
        made.__dict__["arrays"] = made_up(planned.config, holds) | changed
        runs.append(made)
    return Results("full", "cifar10", tuple(runs))


def enough_seeds(name: str) -> int:
    return reading.FOR_PERCENTILES if any(claim.pooled for claim in spec(name).claims) else 2


class Procedure:
    """Stands in for a measurement: gives the paper's numbers, counts its calls, and raises what ``fails`` says."""

    def __init__(self, fails: dict[int, BaseException] | None = None) -> None:
        self.calls: list[tuple[str, int]] = []
        self.fails = fails or {}

    def __call__(self, config: dict, data, device, folder, tick) -> dict:
        self.calls.append((config["label"], config["seed"]))
        tick(0.5, "half way")
        if error := self.fails.get(len(self.calls)):
            raise error
        return {"all": made_up(config)}


@pytest.fixture(autouse=True)
def no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the developer's own environment says."""
    monkeypatch.delenv("BNKERN_DATA", raising=False)


@pytest.fixture
def procedure(monkeypatch: pytest.MonkeyPatch) -> Procedure:
    stand_in = Procedure()
    for name in running.PROCEDURES:
        monkeypatch.setitem(running.PROCEDURES, name, stand_in)
    return stand_in


def read(folder: Path, scale: str | None = None) -> Results:
    return reading.read(folder, spec(folder.name), scale)


def run(out: Path, **options: object) -> int:
    return running.run(["moments_by_depth"], **{"scale": "smoke", "out": out, **options})


# ------------------------------------------------------------------------------------------------ specs and drawers


@pytest.mark.parametrize("name", names())
def test_every_spec_is_whole_and_has_its_drawer(name: str) -> None:
    about, draws = spec(name), drawer(name)
    assert about.title and about.of and about.shows and about.method and about.claims and about.runs
    assert any(claim.check for claim in about.claims)
    assert [claim.text for claim in about.claims].count(about.headline) == 1
    assert set(about.reduction) == set(about.smaller) - {"smoke"}, "every scale that is published states its changes"
    assert draws.tables and draws.draw and draws.CAPTION
    assert all(run.procedure in running.PROCEDURES for run in about.runs)
    assert sum(run.seeds for run in about.at("smoke")) <= 12
    lines = (ROOT / f"experiments/specs/{name}.py").read_text().splitlines()
    assert len(lines) < 80, "a spec is data: what computes belongs elsewhere"


def test_specs_import_nothing_but_their_own_words() -> None:
    for file in (ROOT / "experiments/specs").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            modules = [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert set(modules) <= {"dataclasses", "collections.abc", "typing"}, f"{file.name} imports {modules}"


def test_drawing_and_reporting_need_neither_torch_nor_bnkern() -> None:
    code = (
        "import sys; sys.modules['torch'] = sys.modules['bnkern'] = None\n"
        "import experiments, experiments.report, experiments.__main__\n"
        "[experiments.drawer(name) for name in experiments.names()]"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_scales() -> None:
    about = spec("channel_gradients")
    assert about.scale("reduced") == "full" and about.scale("smoke") == "smoke"
    about = spec("gradient_signs")
    assert about.scale("quick") == "reduced" and about.scale("full") == "full"
    assert about.at("full") == about.runs and about.runs[0].batch == 128 and about.runs[0].seeds >= 5
    assert {run.batch for run in about.at("smoke")} == {2}


# ------------------------------------------------------------------------------------------------ verdicts


@pytest.mark.parametrize("name", names())
def test_the_papers_own_numbers_hold(name: str) -> None:
    verdict, findings = judge(spec(name), results_of(name))
    assert verdict == "held"
    assert [f.claim.text for f in findings if f.claim.check and not f.held] == []


@pytest.mark.parametrize("name", names())
def test_every_claim_can_fail(name: str) -> None:
    """Results that contradict the paper throughout."""
    verdict, findings = judge(spec(name), results_of(name, holds=False))
    assert [f.claim.text for f in findings if f.claim.check and f.held] == []
    assert verdict == "did not hold"


def test_false_claims_make_it_held_in_part() -> None:
    verdict, findings = judge(spec("output_gradients"), results_of("output_gradients", **{"entropy": np.float64(0.2)}))
    assert verdict == "held in part"
    false = [finding.claim.text for finding in findings if finding.held is False]
    assert false == [
        "entropy of the softmax, nats, without batch norm",
        "entropy of the softmax, nats, with batch norm",
    ]


def test_what_is_no_number_never_holds() -> None:
    results = results_of("moments_by_depth", **{"ln_std/18": np.float64(np.nan)})
    assert judge(spec("moments_by_depth"), results)[0] == "held in part"


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_one_value_that_is_not_finite_breaks_a_claim(value: float) -> None:
    """An infinite mean is above every threshold, and holds none."""
    for check in (above(10), below(10)):
        found = find(Claim("", list, None, check), [20.0, value], True)
        assert found.held is False and found.passing == (check.text == "above 10")


def test_a_ratio_of_zeros_never_holds() -> None:
    """The reach of networks that have none: 0/0 was once infinity, and above everything."""
    results = results_of("gradient_predictiveness", **{"reach/1": 0.0, "reach bound/1": 0})
    [found] = [f for f in judge(spec("gradient_predictiveness"), results)[1] if f.claim.text.startswith("reach, mini-b")
               and "1, with batch norm over" in f.claim.text]  # fmt: skip
    assert all(np.isnan(value.number) for value in found.values) and found.held is False and found.passing == 0


def test_a_limit_at_the_edge_of_what_was_tried_decides_nothing() -> None:
    """Not even where the bound itself passes, nor in a ratio or a difference."""
    at_least = Value(1.0, 1)
    found = find(Claim("", list, None, above(0)), [Value(0.5), at_least], True)
    assert found.held is None and found.undecided and found.bound == 1 and found.passing == 1
    assert at_least.less(Value(0.5)) == Value(0.5, 1) and Value(0.5).less(at_least) == Value(-0.5, -1)
    assert at_least.over(Value(0.5, -1)) == Value(2.0, 1) and at_least.less(at_least) == Value(0.0, None)
    for name, claims in (("depth_limits", 4), ("final_layer_norm", 2)):
        verdict, findings = judge(spec(name), results_of(name, **{"limit bound": np.float64(1)}))
        assert sum(finding.undecided for finding in findings if finding.claim.check) == claims
        assert verdict == ("undecided" if name == "depth_limits" else "held in part")


def test_a_report_writes_bounds_as_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = results_of("depth_limits", **{"limit bound": np.float64(1), "learning limit bound": np.float64(-1)})
    monkeypatch.setattr(reporting, "names", lambda: ["depth_limits"])
    monkeypatch.setattr(reporting, "read", lambda *_: results)
    monkeypatch.setattr(telling, "_facts", lambda *_: {})
    reporting.report(reporting.gather(tmp_path), tmp_path)
    page = (tmp_path / "report.md").read_text()
    assert "at most" in page and "2 of 2 at the edge of the search" in page and "– undecided" in page
    drawn = telling.read_csv(tmp_path / "data/depth_limits.csv")
    assert all(row["limit above all"] == row["learning limit below all"] == 2 for row in drawn)
    figure = drawer("depth_limits").draw(results_table("depth_limits", results))
    lines = [line for line in figure.axes[0].lines if line.get_linestyle() not in ("None", "none", "")]
    assert not lines, "no line leads to a bound"


def results_table(name: str, results: Results) -> list[dict]:
    return next(iter(drawer(name).tables(spec(name), results).values()))


@pytest.mark.parametrize("name", names())
def test_quick_results_are_shown_and_not_judged(name: str) -> None:
    good = results_of(name)
    verdict, findings = judge(spec(name), Results("quick", "cifar10", good.runs))
    assert verdict == "shown" and all(finding.held is None and not finding.passing for finding in findings)


def test_the_headline_counts_apart() -> None:
    """What is as in the paper, reduced, beyond it, and only shown."""
    made = {
        "moments_by_depth": results_of("moments_by_depth"),
        "mechanism": results_of("mechanism", holds=False),
        "learning_rates": Results("reduced", "cifar10", results_of("learning_rates").runs),
        "norm_variants": Results("quick", "cifar10", results_of("norm_variants").runs),
        "depth_limits": Results("none", "none", ()),
    }
    sections = [
        telling.Section(n, spec(n), r.scale, r.data, *judge(spec(n), r), {}, {}, [{"label": "x"}] * len(r.runs))
        for n, r in made.items()
    ]
    assert reporting.tally(sections) == [
        "Measured as in the paper: 1 held.",
        "At reduced scale: 1 held.",
        "Beyond the paper: 1 did not hold.",
        "Not run: 1.",
        "Only shown, because their scale or their data cannot decide: 1.",
    ]


def test_what_holds_so_far_is_not_called_held() -> None:
    """Runs of one network alone cannot bear out what is claimed of both."""
    good = results_of("channel_gradients")
    half = Results("full", "cifar10", tuple(run for run in good.runs if run.config["norm"] == "batch"))
    verdict, findings = judge(spec("channel_gradients"), half)
    assert verdict == "incomplete" and any(finding.held for finding in findings)


def test_verdicts_are_withheld_where_they_would_mean_nothing() -> None:
    about, good = spec("moments_by_depth"), results_of("moments_by_depth")
    assert judge(about, Results("smoke", "cifar10", good.runs))[0] == "shown"
    assert judge(about, Results("full", "synthetic", good.runs))[0] == "shown"
    assert judge(about, Results("full", "cifar10", ()))[0] == "not run"


def test_means_and_spreads() -> None:
    found = find(Claim("", list, 2.0, within(2, 0.1)), [1.0, 3.0], True)
    assert (found.mean, found.spread, found.held) == (2.0, pytest.approx(2**0.5), True)
    found = find(Claim("", list, 2.0, within_factor(2, 1.6), mean="geometric"), [1.0, 4.0], True)
    assert found.mean == pytest.approx(2) and found.spread == pytest.approx(4 ** (0.5**0.5)) and found.held
    assert not find(Claim("", list, 2.0, within_factor(2, 1.6)), [3.3], True).held
    assert find(Claim("", list, 2.0), [3.3], True).held is None
    assert find(Claim("", list, 2.0, within_factor(2, 1.6)), [2.0], False).held is None


def test_checks() -> None:
    assert [above(2).holds(x) for x in (2, 2.1)] == [False, True]
    assert [between(1, 4).holds(x) for x in (0.9, 1, 4, 4.1)] == [False, True, True, False]
    assert [within(-1, 0.5).holds(x) for x in (-1.6, -1.5, -0.5, -0.4)] == [False, True, True, False]
    assert [within_factor(10, 2).holds(x) for x in (4.9, 5, 20, 20.1)] == [False, True, True, False]


# ------------------------------------------------------------------------------------------------ the runner


def test_everything_runs_at_smoke_scale_and_is_told(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["run", "all", "--scale", "smoke", "--device", "cpu", "--out", str(tmp_path)]) == 0
    assert main(["report", "--out", str(tmp_path)]) == 0
    assert re.search(r"\[ *1/\d+\] .* done, [\d.]+ s, about \d+ \w+ left", capsys.readouterr().out)
    for name in names():
        results = read(tmp_path / name)
        assert (results.scale, results.data) == ("smoke", "synthetic" if spec(name).images else "none")
        assert len(results.runs) == sum(run.seeds for run in spec(name).at("smoke"))
        for done in results.runs:
            assert done.env["backend"] == (backends.forced() or "cpu") and done.env["seconds"] > 0
            assert {"commit", "dirty", "versions", "cpu", "threads", "started"} <= done.env.keys()
    told = json.loads((tmp_path / "report.json").read_text())
    assert [e["verdict"] for e in told["experiments"]] == ["shown"] * len(names())
    without = {claim["claim"] for e in told["experiments"] for claim in e["claims"] if claim["ours"] is None}
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
    said = capsys.readouterr()
    assert "smoke-batch-seed1-synthetic: FAILED: RuntimeError: out of luck" in said.out and "1 of 4 runs" in said.err
    failed = tmp_path / "moments_by_depth/smoke-batch-seed1-synthetic"
    assert "out of luck" in (failed / "error.txt").read_text() and not (failed / "DONE").exists()
    assert run(tmp_path) == 0
    assert procedure.calls[4:] == [("batch", 1)] and not (failed / "error.txt").exists()


def test_a_full_disk_stops_with_one_line(tmp_path: Path, procedure: Procedure, capsys: pytest.CaptureFixture) -> None:
    procedure.fails = {2: OSError(errno.ENOSPC, "No space left on device")}
    assert run(tmp_path) == 1
    said = capsys.readouterr().err
    assert re.fullmatch(r"Stopped: No space left on device \(.*\)\. The same command continues\.\n", said)
    assert run(tmp_path) == 0 and len(procedure.calls) == 5


def test_published_runs_count_as_finished_where_asked(tmp_path: Path, procedure: Procedure, monkeypatch) -> None:
    """Training takes hours: a run is kept with the report, and another machine does the other seeds."""
    monkeypatch.setattr(cifar10, "load", lambda where: None)
    asked = {"experiments": ["norm_variants"], "scale": "reduced", "data": "some folder", "device": "cpu"}
    first, second, kept = tmp_path / "first", tmp_path / "second", tmp_path / "published"
    assert running.run(seeds=1, out=first, **asked) == 0 and len(procedure.calls) == 9
    sections = reporting.gather(first)
    reporting.report(sections, first)
    assert reporting.publish(sections, first, kept) == 0
    assert running.run(seeds=2, out=second, kept=kept / "runs", **asked) == 0
    assert procedure.calls[9:] == [(label, 1) for label, _ in procedure.calls[:9]]
    assert len(read(second / "norm_variants").runs) == 9
    assert (
        len(reading.read(second / "norm_variants", spec("norm_variants"), None, kept / "runs/norm_variants").runs) == 18
    )
    reporting.report(reporting.gather(second, published=kept), second)
    assert "group-0.1: 2" in (second / "report.md").read_text()


TRAINS = {"scale": "reduced", "data": "some folder", "device": "cpu"}


@pytest.fixture
def no_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """For stand-ins of training on CIFAR-10."""
    monkeypatch.setattr(cifar10, "load", lambda where: None)


@pytest.mark.parametrize("published", [False, True])
def test_experiments_share_runs_with_the_same_settings(
    tmp_path: Path, procedure: Procedure, no_images, capsys: pytest.CaptureFixture, published: bool
) -> None:
    """Appendix E has two networks of Figure 1, whose runs are in the same folder or published."""
    first, second = tmp_path / "first", tmp_path / ("second" if published else "first")
    kept = first if published else None
    assert running.run(["learning_rates"], out=first, **TRAINS) == 0
    before = len(procedure.calls)
    assert running.run(["final_layer_norm"], out=second, kept=kept, **TRAINS) == 0
    assert {label for label, _ in procedure.calls[before:]} == {"final-0.03", *(f"limit-{n}" for n in NORMS)}
    assert "18 runs: 6 finished before, 12 to do" in capsys.readouterr().out
    place = kept / "final_layer_norm" if published else None
    results = reading.read(second / "final_layer_norm", spec("final_layer_norm"), None, place)
    assert [run.config["seed"] for run in results.where(label="none-0.0001")] == [0, 1, 2]
    assert all(run.config["experiment"] == "final_layer_norm" for run in results.runs) and not results.stale
    assert {run.folder.parent.name for run in results.where(label="batch-0.1")} == {"learning_rates"}
    section = telling.of_results("final_layer_norm", results, second)
    assert "some are runs of learning_rates with the same settings" in section.facts["runs"]


NORMS = ("none", "final", "batch")


def test_a_run_with_noise_serves_as_one_without(tmp_path: Path, procedure: Procedure, no_images, capsys) -> None:
    """But not the other way round. One command for both experiments trains each network once."""
    noisy = ["batch-0.1", "batch-0.003", "batch-0.0001", "none-0.0001"]
    both = {"out": tmp_path, "seeds": 1, **TRAINS}
    assert running.run(["learning_rates"], only=["batch-0.1"], **both) == 0
    assert running.run(["learning_rates", "noise_in_training"], **both) == 0
    assert "11 runs: 1 finished before, 3 the same as another, 7 to do" in capsys.readouterr().out
    assert sorted(label for label, _ in procedure.calls[1:]) == sorted([*noisy, "none-0.003", "none-0.1", "fixup-0.1"])
    assert running.run(["learning_rates", "noise_in_training"], **both) == 0 and len(procedure.calls) == 8
    lenders = {run.config["label"]: run.folder.parent.name for run in read(tmp_path / "learning_rates").runs}
    assert [label for label, lender in lenders.items() if lender == "noise_in_training"] == sorted(noisy[1:])
    assert len(lenders) == 7 and len(read(tmp_path / "noise_in_training").runs) == 4


def test_runs_with_other_settings_do_not_serve() -> None:
    config = planned_run("learning_rates", "batch-0.1").config
    assert reading.serves(config, planned_run("final_layer_norm", "batch-0.1").config)
    assert reading.serves(planned_run("noise_in_training", "batch-0.1").config, config)
    assert not reading.serves(config, planned_run("noise_in_training", "batch-0.1").config)
    for changes in ({"seed": 1}, {"scale": "full"}, {"norm": "none"}, {"options": config["options"] | {"lr": 0.2}}):
        assert not reading.serves(config, config | changes)
    untrained = planned_run("moments_by_depth", "batch").config
    assert not reading.serves(untrained, untrained), "only training takes hours"
    assert not reading.serves({"name": "of bnkern.train"}, config)


def planned_run(experiment: str, label: str, **options: object) -> running.Planned:
    [found] = running.plan([experiment], "reduced", "cifar10", 1, Path(), only=[label], **options)
    return found


def test_precision_belongs_to_the_configuration_and_layout_does_not(
    tmp_path: Path, procedure: Procedure, no_images, monkeypatch
) -> None:
    """Runs in fp32 have the names and configurations that they had before there was a choice."""
    given = []

    def measure(config: dict, *others: object) -> dict:
        given.append(config)
        return procedure(config, *others)

    monkeypatch.setitem(running.PROCEDURES, "training", measure)
    run = partial(running.run, ["learning_rates"], seeds=1, only=["batch-0.1"], out=tmp_path, **TRAINS)
    assert run() == 0 and run(precision="bf16", layout="contiguous") == 0 and len(procedure.calls) == 2
    assert [config["layout"] for config in given] == ["channels_last", "contiguous"]
    fp32, bf16 = (tmp_path / "learning_rates" / f"reduced-batch-0.1-seed0{end}" for end in ("", "-bf16"))
    configs = [json.loads((folder / "config.json").read_text()) for folder in (fp32, bf16)]
    assert "precision" not in configs[0]["options"] and not any("layout" in config for config in configs)
    assert configs[1]["options"].pop("precision") == "bf16" and configs[0] == configs[1]
    published = ROOT / "experiments/published/runs/learning_rates/reduced-batch-0.1-seed0/config.json"
    assert json.loads(published.read_text()) == configs[0]
    env = json.loads((bf16 / "env.json").read_text())
    assert env["layout"] == "contiguous"
    assert run(layout="contiguous") == 0 and len(procedure.calls) == 2, "another layout is no other run"
    moments = running.plan(["moments_by_depth"], "reduced", "cifar10", 1, Path(), precision="bf16")
    assert "precision" not in moments[0].config["options"], "it trains nothing"


def test_results_of_two_precisions_are_not_mixed(tmp_path: Path, procedure: Procedure, no_images) -> None:
    run = partial(running.run, ["learning_rates"], out=tmp_path, **TRAINS)
    assert run(precision="bf16", seeds=2) == 0
    results = read(tmp_path / "learning_rates")
    assert len(results.runs) == 14 and results.precision == "bf16" and not results.stale
    section = telling.of_results("learning_rates", results, tmp_path)
    assert section.caution == "Reduced scale. Trained in bf16." and section.facts["repeat"].endswith(
        " --precision bf16"
    )
    told = telling.record(section)
    assert told["configuration"] != telling.fingerprint("learning_rates", spec("learning_rates"), "reduced", "cifar10")
    for table, rows in section.tables.items():
        (tmp_path / "data").mkdir(exist_ok=True)
        telling.write_csv(tmp_path / "data" / f"{table}.csv", rows)
    kept = telling.of_record(told, tmp_path)
    assert kept and kept.precision == "bf16" and kept.facts["repeat"] == section.facts["repeat"]
    assert run(seeds=1) == 0
    results = read(tmp_path / "learning_rates")
    assert len(results.runs) == 7 and results.precision == "fp32"


def test_some_runs_can_be_selected(tmp_path: Path, procedure: Procedure, no_images, capsys) -> None:
    run = partial(running.run, ["learning_rates", "final_layer_norm"], out=tmp_path, **TRAINS)
    assert run(only=["fixup-0.1-seed2", "final-0.03"]) == 0
    assert procedure.calls == [("fixup-0.1", 2), *(("final-0.03", seed) for seed in range(3))]
    assert run(only=["batch-0.1-seed3"]) == 2 and len(procedure.calls) == 4
    assert capsys.readouterr().err == "There is no run batch-0.1-seed3 of learning_rates, final_layer_norm.\n"
    asked = ["run", "moments_by_depth", "--scale", "smoke", "--only", "none", "--device", "cpu", "--out", str(tmp_path)]
    assert main(asked) == 0 and procedure.calls[4:] == [("none", 0), ("none", 1)]


def test_a_command_stops_before_its_time_is_over(tmp_path: Path, procedure: Procedure, monkeypatch, capsys) -> None:
    """The next one continues, and the exit status says that it must. The durations of a run's pieces are added."""
    now = [0.0]
    monkeypatch.setattr(running.time, "perf_counter", lambda: now[0])

    def measure(config: dict, data, device, folder: Path, tick) -> dict:
        for _ in range(3):  # its state is in its folder
            steps = len(list(folder.glob("step*")))
            if steps == 3:
                break
            now[0] += 100
            (folder / f"step{steps}").touch()
            tick((steps + 1) / 3, "")
        return procedure(config, data, device, folder, lambda *_: None)

    monkeypatch.setitem(running.PROCEDURES, "at_init", measure)
    asked = ["run", "moments_by_depth", "--scale", "smoke", "--device", "cpu", "--out", str(tmp_path), "--minutes", "9"]
    assert main(asked) == running.UNFINISHED == 75
    assert now[0] == 500, "a step more would end after 600 s, and 540 are given"
    assert "Stopped: 1 of 4 runs are finished. The same command continues." in capsys.readouterr().err
    assert not (tmp_path / "moments_by_depth/smoke-batch-seed1-synthetic/DONE").exists()
    assert [main(asked), now[0]] == [75, 1000.0] and [main(asked), now[0]] == [0, 1200.0]
    seconds = [run.env["seconds"] for run in read(tmp_path / "moments_by_depth").runs]
    assert seconds == [300, 300, 300, 300]
    assert sorted(procedure.calls) == [("batch", 0), ("batch", 1), ("none", 0), ("none", 1)]


def trained_run(train: float, test: float = 10.0, diverged: bool = False, **options: object) -> Finished:
    run = Finished(Path(), {"batch": 128, "options": options}, {})
    arrays = {"train accuracy": math.nan if diverged else train, "test accuracy": math.nan if diverged else test}
    run.__dict__["arrays"] = {name: np.float64(value) for name, value in arrays.items()}
    return run


def test_a_network_that_guesses_is_dead() -> None:
    """Up to three standard deviations above 10 %, and neither a run that diverged nor one that learns."""
    for images, limit in ((1280, 12.5156), (50_000, 10.4028), (None, 10.4028)):
        options = {"images": images} if images else {}
        states = [trained_run(limit + more, **options).value("dead").number for more in (-1, -0.001, 0.001, 50)]
        assert states == [1, 1, 0, 0]
    assert trained_run(10.0, diverged=True, images=1280).value("dead").number == 0
    assert trained_run(99.5, 34.0).value("train minus test accuracy").number == 65.5
    assert math.isnan(trained_run(99.5, diverged=True).value("train minus test accuracy").number)


def test_the_published_runs_of_figure_1_have_a_state() -> None:
    """They were stored before there was the word "dead", and are read without it."""
    kept = ROOT / "experiments/published/runs/learning_rates"
    results = reading.read(Path("nowhere/learning_rates"), spec("learning_rates"), "reduced", kept)
    assert len(results.runs) >= 7 and not results.stale and results.precision == "fp32"
    for run in results.runs:
        lost = run.config["label"] in ("none-0.003", "none-0.1")
        assert run.value("diverged").number + run.value("dead").number == lost
    findings = {found.claim.text: found for found in judge(spec("learning_rates"), results)[1]}
    assert findings["dead, no batch norm at lr 0.1"].mean == 0
    assert findings["train minus test accuracy, batch norm at lr 0.1"].values[0].number == pytest.approx(65.9)


def test_results_of_scales_that_are_gone_are_left_out(tmp_path: Path, procedure: Procedure) -> None:
    assert run(tmp_path, seeds=1) == 0
    config = tmp_path / "moments_by_depth/smoke-none-seed0-synthetic/config.json"
    config.write_text(config.read_text().replace('"scale": "smoke"', '"scale": "laptop"'))
    assert read(tmp_path / "moments_by_depth").stale == 1


def test_what_is_done_again_is_put_aside(tmp_path: Path, procedure: Procedure, monkeypatch) -> None:
    """Because the spec has changed, or on demand; never overwritten."""
    assert run(tmp_path, seeds=1) == 0
    config = tmp_path / "moments_by_depth/smoke-batch-seed0-synthetic/config.json"
    config.write_text(config.read_text().replace('"batch": 4', '"batch": 5'))
    assert run(tmp_path, seeds=1) == 0
    assert procedure.calls == [("batch", 0), ("none", 0), ("batch", 0)]
    assert run(tmp_path, seeds=1, resume=False) == 0 and len(procedure.calls) == 5
    aside = sorted(folder.name for folder in (tmp_path / "moments_by_depth/.old").iterdir())
    assert aside == [f"smoke-{label}-seed0-synthetic~{n}" for label, n in (("batch", 1), ("batch", 2), ("none", 1))]
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


def planned(expected: list[float]) -> list[running.Planned]:
    config = {"procedure": "theory", "experiment": "singular_values"}
    return [running.Planned(Path(f"{k}"), config, seconds) for k, seconds in enumerate(expected)]


def test_the_time_left_goes_by_the_pace_of_the_runs_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(running.time, "perf_counter", lambda: now[0])
    todo = planned([60.0, 180.0])
    progress = running.Progress(todo, Pace())
    assert progress.left() == 240  # as expected before any run
    progress.start(todo[0])
    now[0] = 60.0
    progress.tick(0.5, "")  # twice as slow as expected
    assert progress.left() == 0.5 * (0.5 * 60 + 60) + 180
    now[0] = 120.0
    progress.end("done")
    assert 1.7 * 180 < progress.left() < 2 * 180


def recorded() -> tuple[dict[str, list[float]], list]:
    """Durations of published runs: total seconds by experiment, and runs of another machine under load one by one."""
    told = json.loads((ROOT / "tests/recorded_durations.json").read_text())
    return told["published"], told["busy"]


def of_reproduce(totals: dict[str, float]) -> list[tuple[Kind, float, float]]:
    """The runs of `make reproduce`: what each is expected to take, and what it takes if experiments take ``totals``."""
    runs = []
    for made in running.distinct(running.plan(names(), "quick", "cifar10", None, Path())):
        name, about = made.config["experiment"], spec(made.config["experiment"])
        share = shares(about.at(about.scale("quick")))[made.config["label"]]
        if name in totals:  # younger experiments have no recorded duration
            runs.append((made.kind, made.seconds, totals[name] * share))
    return runs


def estimates(runs: list[tuple[Kind, float, float]], start: float) -> list[float]:
    """After each run, the time left by the estimate over the time that it took."""
    pace, ratios = Pace(start), []
    for done, (kind, expected, seconds) in enumerate(runs[:-1], start=1):
        pace.add(kind, expected, seconds)
        left = sum(expected * pace.of(kind) for kind, expected, _ in runs[done:])
        ratios.append(left / sum(seconds for _, _, seconds in runs[done:]))
    return ratios


@pytest.mark.parametrize("start", [1.0, 3.2, 10.0])
def test_the_time_left_is_right_within_a_third_from_the_fifth_run_on(start: float) -> None:
    """For recorded durations, and a start that is right, or wrong by a factor of 3 either way."""
    ratios = estimates(of_reproduce(recorded()[0]), start)[4:]
    assert len(ratios) > 200 and min(ratios) > 2 / 3 and max(ratios) < 4 / 3


@pytest.mark.parametrize("start", [1.0, 10.0])
def test_the_time_left_under_a_load_that_changes(start: float) -> None:
    """Recorded on two cores under a load from 4 to 12, until a tenth is left. A third is out of reach there."""
    runs = [
        (Kind(procedure, name), expected(name, label), seconds) for name, procedure, label, seconds in recorded()[1]
    ]
    after = [sum(seconds for *_, seconds in runs[done:]) for done in range(1, len(runs))]
    ratios = [ratio for ratio, left in zip(estimates(runs, start), after, strict=True) if left > 0.1 * after[0]]
    assert len(ratios) > 40 and all(0.5 < ratio < 2.2 for ratio in ratios[4:])


def expected(name: str, label: str) -> float:
    at = spec(name).scale("quick")
    return 60 * spec(name).minutes[at] * shares(spec(name).at(at))[label]


def test_work_is_shared_by_depth_epochs_and_images() -> None:
    by_label = shares(spec("depth_limits").at("quick"))
    assert by_label["batch-110"] == pytest.approx(110 / 8 * by_label["batch-8"])
    by_label = shares(spec("learning_rates").at("quick"))
    assert by_label["none-0.0001"] == pytest.approx(300 / 75 * by_label["batch-0.1"])
    for name in names():
        for scale in ("quick", "reduced", "full"):
            runs = spec(name).at(scale) or spec(name).runs
            assert sum(shares(runs)[run.label] * run.seeds for run in runs) == pytest.approx(1)


def test_reproduce_fits_into_half_an_hour() -> None:
    """By the specs' own estimates, with one minute to spare; what has none would be taken for a minute."""
    scales = {name: spec(name).scale("quick") for name in names()}
    assert all(spec(name).minutes.get(at) for name, at in scales.items() if spec(name).at(at))
    planned = running.distinct(running.plan(names(), "quick", "cifar10", None, Path()))
    assert sum(one.seconds for one in planned) <= 31 * 60


def test_reproduce_runs_all_and_ends_with_the_report(tmp_path: Path, procedure: Procedure, monkeypatch, capsys) -> None:
    monkeypatch.setattr(reporting, "names", lambda: ["moments_by_depth"])
    assert main(["reproduce", "--data", "synthetic", "--seeds", "1", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert re.fullmatch(
        r"\d+ runs: 0 finished before, 6 the same as another, \d+ to do, about [\d.]+ (s|min|h) on this machine",
        said[0],
    )
    written = [line for line in said if line.endswith(f" is in the report: {tmp_path / 'report.html'}")]
    run_quickly = [name for name in names() if spec(name).at(spec(name).scale("quick"))]
    assert [line.split()[0] for line in written] == run_quickly, "the report grows with each experiment"
    assert said[-1] == f"report: {tmp_path / 'report.html'}" and Path(said[-1].split(": ")[1]).exists()
    procedure.fails = {len(procedure.calls) + 1: KeyboardInterrupt()}
    (tmp_path / "moments_by_depth/reduced-none-seed0-synthetic/DONE").unlink()
    assert main(["reproduce", "--data", "synthetic", "--seeds", "1", "--out", str(tmp_path)]) == 130


def test_a_report_that_cannot_be_written_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    assert main(["report", "--out", str(tmp_path / "file")]) == 1
    assert re.fullmatch(r"The report cannot be written: Not a directory \(.*file\)\n", capsys.readouterr().err)


def test_runs_of_different_scales_and_data_live_side_by_side(tmp_path: Path, procedure, monkeypatch) -> None:
    assert run(tmp_path) == 0
    assert run(tmp_path, scale="full", data="synthetic", seeds=1) == 0
    assert (read(tmp_path / "moments_by_depth").scale, read(tmp_path / "moments_by_depth").data) == (
        "full",
        "synthetic",
    )
    monkeypatch.setattr(cifar10, "load", lambda where: None)
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


# ------------------------------------------------------------------------------------------------ the report


@pytest.fixture(scope="module")
def papers_results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report on result files at scale full that hold the paper's own numbers."""
    out = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("BNKERN_DATA", raising=False)
        patch.setattr(cifar10, "load", lambda where: None)
        for name in running.PROCEDURES:
            patch.setitem(running.PROCEDURES, name, Procedure())
        for name in names():
            assert running.run([name], "full", "some folder", "cpu", enough_seeds(name), out) == 0
    reporting.report(reporting.gather(out), out)
    return out


def test_every_section_stands_under_its_heading(papers_results: Path) -> None:
    page = (papers_results / "report.html").read_text()
    places = [page.index(f'<section id="{name}">') for name in names()]
    assert places == sorted(places)
    for heading in reporting.PARTS.values():
        assert page.count(heading) in (0, 3)  # in the navigation, in the first table, and above its sections
    beyond = sum(spec(name).beyond for name in names())
    assert f"Measured as in the paper: {len(names()) - beyond} held." in page
    assert f"Beyond the paper: {beyond} held." in page


def test_report(papers_results: Path, tmp_path: Path) -> None:
    page = (papers_results / "report.html").read_text()
    assert page.count("<svg") == len(names()) and page.count(">held (") == 2 * len(names())
    outside = set(re.findall(r'(?:src|href)="(?!#|data:image)([^"]*)', page))
    assert {where for where in outside if where.startswith("http")} == {reporting.PAPER}
    assert all((papers_results / where).exists() for where in outside - {reporting.PAPER})
    for figure in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        title, description = re.search(r'role="img" aria-labelledby="(\w+) (\w+)"', figure).groups()
        assert f'<title id="{title}">' in figure and f'<desc id="{description}">' in figure
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert {ref for ref in re.findall(r'(?:href="|url\()#([^")]+)', page)} <= set(ids)
    told = json.loads((papers_results / "report.json").read_text())["experiments"]
    for experiment in told:
        assert experiment["verdict"] == "held"
        for claim in experiment["claims"] if experiment["name"] in ("gradient_signs", "moments_by_depth") else ():
            assert claim["paper"] is None or claim["ours"] == pytest.approx(claim["paper"], rel=0.01)
    row = (
        "| a/b, layer 18, with batch norm | 251.8 | 252 | ×/÷ 1.00, n\u00a0=\u00a02 "
        "| within a factor of 1.6 of the paper's | 2 of 2 | ✓"
    )
    assert row in (papers_results / "report.md").read_text()
    assert reporting.publish(reporting.gather(papers_results), papers_results, tmp_path / "published") == 0
    assert (tmp_path / "published/figures/gradient_signs.svg").exists()
    assert (tmp_path / "published/data/moments_by_depth.csv").read_text().startswith("norm,layer,seeds,ln_std,")


def test_the_same_results_give_the_same_bytes(
    papers_results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = ["diverging_update", "channel_gradients", "gradient_signs"]  # bands, pictures, bars
    for name in few:
        shutil.copytree(papers_results / name, tmp_path / name)
    monkeypatch.setattr(reporting, "names", lambda: few)
    reporting.report(reporting.gather(tmp_path), tmp_path)

    def files() -> dict[str, bytes]:
        found = [tmp_path / f"report.{kind}" for kind in ("html", "md", "json")]
        found += [*(tmp_path / "figures").iterdir(), *(tmp_path / "data").iterdir()]
        return {file.name: file.read_bytes() for file in found}

    before = files()
    reporting.report(reporting.gather(tmp_path), tmp_path)
    assert files() == before
    reporting.report(reporting.gather(tmp_path), tmp_path, keep=True)
    assert files() == before


def test_a_growing_report_has_what_is_finished(tmp_path: Path, procedure: Procedure, monkeypatch) -> None:
    """After each experiment the page has its section; figures are drawn once."""
    drawn: list[str] = []
    save = reporting.draw.save
    monkeypatch.setattr(reporting.draw, "save", lambda *a: (drawn.append(a[2].name), save(*a)))
    pages: list[int] = []

    def written(name: str) -> None:
        page = reporting.report(reporting.gather(tmp_path), tmp_path, keep=True)
        pages.append(page.read_text().count("<svg"))

    two = ["moments_by_depth", "padded_shortcuts"]
    assert running.run(two, "smoke", out=tmp_path, finished=written) == 0
    assert pages == [1, 2] and drawn == two


def test_a_published_report_keeps_what_was_not_run_here(papers_results: Path, tmp_path: Path) -> None:
    """Its tables, figures, numbers and verdicts, without the results of its runs."""
    published, out = tmp_path / "published", tmp_path / "out"
    assert reporting.publish(reporting.gather(papers_results), papers_results, published) == 0
    sections = reporting.gather(out, published=published)
    out.mkdir()
    reporting.report(sections, out)
    for kind in ("json", "md"):
        was, now = ((folder / f"report.{kind}").read_text() for folder in (published, out))
        assert was.replace(reporting.repository(published), "") == now.replace(reporting.repository(out), "")
    for folder in ("data", "figures"):
        for file in (published / folder).glob("*.[cs]*"):
            assert file.read_bytes() == (out / folder / file.name).read_bytes()
    assert not reporting.gather(out)[0].runs, "only where it is asked for"


def test_a_published_experiment_gives_way_to_larger_results_and_to_another_spec(papers_results, tmp_path) -> None:
    told = {one["name"]: one for one in json.loads((papers_results / "report.json").read_text())["experiments"]}
    one = told["moments_by_depth"]
    kept = telling.of_record(one, papers_results)
    assert kept and kept.verdict == "held" and len(kept.runs) == 2 * reading.FOR_PERCENTILES
    assert telling.of_record(one | {"configuration": "of another spec"}, papers_results) is None
    assert telling.of_record(one | {"claims": one["claims"][1:]}, papers_results) is None
    small = telling.of_results(
        "moments_by_depth", Results("quick", "cifar10", results_of("moments_by_depth").runs[:0]), tmp_path
    )
    assert kept.rank > small.rank
    synthetic = telling.Section("", kept.spec, "full", "synthetic", "shown", [], {}, {}, kept.runs)
    quick = telling.Section("", kept.spec, "quick", "cifar10", "shown", [], {}, {}, kept.runs)
    assert kept.rank > quick.rank > synthetic.rank


def test_tables_read_back(tmp_path: Path) -> None:
    rows = [{"a": 1, "b": 0.25, "c": "x", "d": None}, {"a": -3, "b": float("inf"), "c": "1 2", "d": 7}]
    telling.write_csv(tmp_path / "t.csv", rows)
    assert telling.read_csv(tmp_path / "t.csv") == rows


def test_similar_claims_are_grouped() -> None:
    texts = ["a/b, layer 18, mean", "a/b, layer 54, mean", "a/b, layer 90, mean", "a, layer 18, mean", "other"]
    findings = [find(Claim(text, list), [1.0], True) for text in texts]
    groups = words.grouped(findings)
    assert [len(group) for group in groups] == [3, 1, 1]
    assert words.group_title(texts[:3]) == "a/b, layer 18 to layer 90, mean"


def test_figures_keep_their_text_and_lose_decimals() -> None:
    svg = '<svg><path d="M 1.23456 7"/><text x="0.66666">0.0001</text></svg>'
    assert reporting.draw.rounded(svg, 1) == '<svg><path d="M 1.2 7"/><text x="0.7">0.0001</text></svg>'


def test_published_files_are_small() -> None:
    for file in (ROOT / "experiments/published").rglob("*"):
        assert not file.is_file() or file.stat().st_size < 500_000, file


def test_a_report_without_results_says_what_to_run(tmp_path: Path) -> None:
    page = reporting.report(reporting.gather(tmp_path), tmp_path).read_text()
    assert page.count(">not run<") == 2 * len(names()) and "<svg" not in page
    assert "python -m experiments run gradient_signs --scale full" in page


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (7.5e-5, "7.5e-5"),
        (2.2e-4, "2.2e-4"),
        (3.0e-10, "3e-10"),
        (2e6, "2e6"),
        (251.8, "252"),
        (0.0, "0"),
        (-0.85, "-0.85"),
        (131072, "131072"),
        (12345.6, "12346"),
        (None, "-"),
    ],
)
def test_numbers_for_readers(value: object, text: str) -> None:
    assert words.number(value) == text


def test_a_run_is_its_own_documentation() -> None:
    """What a finished run writes down is the whole of its configuration."""
    [planned, *_] = running.plan(["gradient_signs"], "full", "cifar10", 1, Path("results"))
    assert planned.name == "gradient_signs/full-batch-seed0"
    fields = set(Run.__dataclass_fields__) - {"seeds"}
    assert planned.config.keys() == fields | {"experiment", "scale", "data", "seed"}
