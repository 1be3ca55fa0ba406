"""The verdicts on claims, by made-up and by published results."""

import math
from pathlib import Path

import numpy as np
import pytest

from experiments import drawer, names, spec
from experiments import report as reporting
from experiments import results as result_files
from experiments import sections as report_sections
from experiments.results import Finished, Results, Value, find, judge
from experiments.specs import Claim, above, below, between, within, within_factor
from tests import ROOT
from tests.experiments.support import results_of

FULL = Results("full", "cifar10", ())  # a scale and data that are judged


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


def test_nan_never_holds() -> None:
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


def test_a_limit_at_the_edge_of_the_rates_decides_nothing() -> None:
    """Not even where the bound itself passes, nor in a ratio or a difference."""
    at_least = Value(1.0, 1)
    found = find(Claim("", list, None, above(0)), [Value(0.5), at_least], True)
    assert found.held is None and found.undecided and found.bound == 1 and found.passing == 1
    assert at_least.minus(Value(0.5)) == Value(0.5, 1) and Value(0.5).minus(at_least) == Value(-0.5, -1)
    assert at_least.over(Value(0.5, -1)) == Value(2.0, 1) and at_least.minus(at_least) == Value(0.0, None)
    for name, claims in (("depth_limits", 4), ("final_layer_norm", 2)):
        verdict, findings = judge(spec(name), results_of(name, **{"limit bound": np.float64(1)}))
        assert sum(finding.undecided for finding in findings if finding.claim.check) == claims
        assert verdict == ("undecided" if name == "depth_limits" else "held in part")


def test_a_report_writes_bounds_as_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = results_of("depth_limits", **{"limit bound": np.float64(1), "learning limit bound": np.float64(-1)})
    monkeypatch.setattr(reporting, "names", lambda: ["depth_limits"])
    monkeypatch.setattr(reporting, "read", lambda *_: results)
    monkeypatch.setattr(report_sections, "_facts", lambda *_: {})
    reporting.report(reporting.gather(tmp_path), tmp_path)
    page = (tmp_path / "report.md").read_text()
    assert "at most" in page and "2 of 2 at the edge of the search" in page and "– undecided" in page
    drawn = report_sections.read_csv(tmp_path / "data/depth_limits.csv")
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


def test_the_tally_counts_each_kind() -> None:
    """What is as in the paper, reduced, beyond it, and only shown."""
    results = {
        "moments_by_depth": results_of("moments_by_depth"),
        "mechanism": results_of("mechanism", holds=False),
        "learning_rates": Results("reduced", "cifar10", results_of("learning_rates").runs),
        "norm_variants": Results("quick", "cifar10", results_of("norm_variants").runs),
        "depth_limits": Results("none", "none", ()),
    }
    sections = [
        report_sections.Section(n, spec(n), r.scale, r.data, *judge(spec(n), r), {}, {}, [{"label": "x"}] * len(r.runs))
        for n, r in results.items()
    ]
    assert reporting.tally(sections) == [
        "Measured as in the paper: 1 held.",
        "At reduced scale: 1 held.",
        "Beyond the paper: 1 did not hold.",
        "Not run: 1.",
        "Only shown, because their scale or their data cannot decide: 1.",
    ]


def test_partial_results_are_not_called_held() -> None:
    """Runs of only one of two networks cannot support claims about both."""
    good = results_of("channel_gradients")
    half = Results("full", "cifar10", tuple(run for run in good.runs if run.config["norm"] == "batch"))
    verdict, findings = judge(spec("channel_gradients"), half)
    assert verdict == "incomplete" and any(finding.held for finding in findings)


def test_no_verdict_at_smoke_scale_on_synthetic_images_or_without_runs() -> None:
    experiment_spec, good = spec("moments_by_depth"), results_of("moments_by_depth")
    assert judge(experiment_spec, Results("smoke", "cifar10", good.runs))[0] == "shown"
    assert judge(experiment_spec, Results("full", "synthetic", good.runs))[0] == "shown"
    assert judge(experiment_spec, Results("full", "cifar10", ()))[0] == "not run"


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


def trained_run(train: float, test: float = 10.0, diverged: bool = False, **options: object) -> Finished:
    run = Finished(Path(), {"batch": 128, "options": options}, {})
    arrays = {"train accuracy": math.nan if diverged else train, "test accuracy": math.nan if diverged else test}
    run.__dict__["arrays"] = {name: np.float64(value) for name, value in arrays.items()}
    return run


def test_a_network_that_guesses_is_dead() -> None:
    """Up to three standard deviations above 10 %, and neither a run that diverged nor one that learns."""
    for images, limit in ((1280, 12.5156), (50_000, 10.4028), (None, 10.4028)):
        options = {"images": images} if images else {}
        states = [trained_run(limit + margin, **options).value("dead").number for margin in (-1, -0.001, 0.001, 50)]
        assert states == [1, 1, 0, 0]
    assert trained_run(10.0, diverged=True, images=1280).value("dead").number == 0
    assert trained_run(99.5, 34.0).value("train minus test accuracy").number == 65.5
    assert math.isnan(trained_run(99.5, diverged=True).value("train minus test accuracy").number)


def test_the_published_runs_of_figure_1_have_a_state() -> None:
    """They were stored before there was the word "dead", and are read without it."""
    published = ROOT / "experiments/published/runs/learning_rates"
    results = result_files.read(Path("nowhere/learning_rates"), spec("learning_rates"), "reduced", published)
    assert len(results.runs) >= 7 and not results.stale and results.precision == "fp32"
    for run in results.runs:
        is_failure = run.config["label"] in ("none-0.003", "none-0.1")
        assert run.value("diverged").number + run.value("dead").number == is_failure
    findings = {found.claim.text: found for found in judge(spec("learning_rates"), results)[1]}
    assert findings["dead, no batch norm at lr 0.1"].mean == 0
    assert findings["train minus test accuracy, batch norm at lr 0.1"].values[0].number == pytest.approx(65.9)
