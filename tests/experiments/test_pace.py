"""The estimate of the time left."""

import json
from pathlib import Path

import pytest

from experiments import names, spec
from experiments import run as running
from experiments.pace import Kind, Pace, shares
from tests import ROOT


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


def recorded(what: str) -> list[tuple[Kind, float, float]]:
    """The runs of a recording in their order: their kind, the seconds that were expected then, and those measured."""
    rows = json.loads((ROOT / "tests/recorded_durations.json").read_text())[what]
    return [(Kind(procedure, name), expected, seconds) for name, procedure, expected, seconds in rows]


def estimates(runs: list[tuple[Kind, float, float]], start: float) -> list[float]:
    """After each run, the time left by the estimate over the time that it took."""
    pace, ratios = Pace(start), []
    for done, (kind, expected, seconds) in enumerate(runs[:-1], start=1):
        pace.add(kind, expected, seconds)
        left = sum(expected * pace.of(kind) for kind, expected, _ in runs[done:])
        ratios.append(left / sum(seconds for _, _, seconds in runs[done:]))
    return ratios


@pytest.mark.parametrize("recording", ["reproduce", "reproduce again"])
@pytest.mark.parametrize("start", [0.45, 0.15, 1.35])
def test_the_time_left_is_right_within_a_third_from_the_fifth_run_on(recording: str, start: float) -> None:
    """For two whole runs of `make reproduce` on a Zen 5.

    The expected durations of the first are those that the specs stated before it. Those of the second are those of
    its specs, except that a step with instance norm counts 1.6 times a step with layer or group norm. Both began
    with the start 0.45. The other starts are wrong by a factor of 3.
    """
    ratios = estimates(recorded(recording), start)[4:]
    assert len(ratios) > 200 and min(ratios) > 2 / 3 and max(ratios) < 4 / 3


@pytest.mark.parametrize("start", [1.0, 10.0])
def test_the_time_left_under_a_load_that_changes(start: float) -> None:
    """Recorded on two cores under a load from 4 to 12. A third is out of reach there."""
    runs = recorded("busy")
    after = [sum(seconds for *_, seconds in runs[done:]) for done in range(1, len(runs))]
    ratios = [ratio for ratio, left in zip(estimates(runs, start), after, strict=True) if left > 0.05 * after[0]]
    assert len(ratios) > 50 and all(0.5 < ratio < 2.2 for ratio in ratios[4:])


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
