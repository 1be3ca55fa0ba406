"""Training experiments: what they measure, that they resume, and that watching changes nothing."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from bnkern.train import loop, runlog
from bnkern.train.cifar10 import Split
from bnkern.train.step import Step
from experiments import names, spec
from experiments.procedures import rates, training
from experiments.run import plan
from experiments.specs import PRECISIONS, QUICK, QUICK_EPOCHS, REDUCED_EPOCHS, SCALES, TRAINING, Run
from tests.experiments.support import CPU, IMAGES, configuration, ignore_progress, same_arrays
from tests.train.training import tensors, untimed


def measure(
    folder: Path, config: dict, tick=ignore_progress, device: torch.device = CPU
) -> dict[str, dict[str, np.ndarray]]:
    folder.mkdir(exist_ok=True)
    procedure = rates if "lrs" in config["options"] else training
    return procedure.measure(config, IMAGES, device, folder, tick)


@pytest.fixture(autouse=True)
def one_thread():
    """The same bits on every run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ------------------------------------------------------------------------------------------------ runs


def test_a_run_in_arrays(tmp_path: Path) -> None:
    found = measure(tmp_path, configuration())["training"]
    epochs = [row for row in runlog.rows(tmp_path / "train") if row["event"] == "epoch"]
    np.testing.assert_allclose(found["share"], [0.5, 1.0])
    np.testing.assert_allclose(found["test curve"], [100 * row["test_accuracy"] for row in epochs])
    np.testing.assert_allclose(found["train curve"], [100 * row["train_accuracy"] for row in epochs])
    assert found["test accuracy"] == found["test curve"][1] and found["train accuracy"] == found["train curve"][1]
    assert found["test accuracy before the first drop"] == found["test curve"][0]
    assert found["diverged"] == 0 and found["steps"] == 8
    config = json.loads((tmp_path / "train/config.json").read_text())
    assert config["lr"] == 0.01 and config["channels_last"] and config["data"] == "synthetic"
    assert not list(tmp_path.glob("**/*.pt")), "checkpoints, the largest files of a run, are deleted at its end"


def test_precision_and_layout_reach_the_training() -> None:
    config = configuration(precision="bf16") | {"layout": "contiguous"}
    settings = training.settings_of(config, IMAGES)
    assert settings.precision == "bf16" and not settings.channels_last and settings.graph
    plain = training.settings_of(configuration(), IMAGES)
    assert plain.precision == "fp32" and plain.channels_last


def test_a_run_that_diverges_is_a_result_without_accuracy(tmp_path: Path) -> None:
    found = measure(tmp_path, configuration("none", lr=1e6))["training"]
    assert found["diverged"] == 1 and 0 < found["steps"] < 8
    assert math.isnan(found["test accuracy"]) and math.isnan(found["train accuracy"])


def test_only_part_of_the_images() -> None:
    part = training.subset(IMAGES, {"images": 5})
    assert len(part.train.labels) == 5 and len(part.test.labels) == 20 and part.mean is IMAGES.mean
    assert torch.equal(part.train.images, IMAGES.train.images[:5])
    assert len(training.subset(IMAGES, {}).train.images) == 64


@pytest.mark.parametrize("noise", [0, 3])
def test_an_interrupted_run_continues_to_the_same_results(tmp_path: Path, noise: int) -> None:
    config = configuration(checkpoint_every=2, noise=noise)
    whole = measure(tmp_path / "whole", config)

    def stop(share: float, what: str) -> None:
        if share >= 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(tmp_path / "parts", config, stop)
    before = runlog.rows(tmp_path / "parts/train")
    assert 0 < before[-1]["step"] < 8 and (tmp_path / "parts/train/checkpoint.pt").exists()
    shares = []
    resumed = measure(tmp_path / "parts", config, lambda share, what: shares.append(share))
    assert shares == [0.75], "the run continues from the checkpoint at 0.5, to the next one"
    assert whole.keys() == ({"training", "noise"} if noise else {"training"})
    same_arrays(whole, resumed)


@pytest.mark.parametrize("changes", [{"noise": 4}, {"precision": "bf16"}, {"lrs": [1e-4, 1e-2], "epochs": 1}])
def test_a_run_in_pieces_has_the_same_results(tmp_path: Path, changes: dict) -> None:
    """Each piece is stopped at its first line of metrics, and most of these are between checkpoints."""
    config = configuration(**{"log_every": 3} | changes)
    whole = measure(tmp_path / "whole", config)

    def stop(share: float, what: str) -> None:
        raise loop.Stopped

    pieces = 0
    while pieces < 20:
        pieces += 1
        try:
            parts = measure(tmp_path / "parts", config, stop)
            break
        except loop.Stopped:
            assert list(tmp_path.glob("parts/**/checkpoint.pt"))
    assert pieces == (7 if "lrs" in changes else 4)
    same_arrays(whole, parts)
    for folder in ["lr-0.0001", "lr-0.01"] if "lrs" in changes else ["train"]:
        assert untimed(tmp_path / "parts" / folder) == untimed(tmp_path / "whole" / folder)


# ------------------------------------------------------------------------------------------------ usable rates


def test_the_largest_rate_that_survives(tmp_path: Path) -> None:
    found = measure(tmp_path, configuration("none", lrs=[1e6, 1e-4, 1e-2], epochs=1))["limits"]
    np.testing.assert_array_equal(found["lrs"], [1e-4, 1e-2, 1e6])
    np.testing.assert_array_equal(found["survived"], [1, 1, 0])
    assert found["limit"] == pytest.approx(-2) and found["learning limit"] <= found["limit"]
    assert not list(tmp_path.glob("**/*.pt"))
    none = measure(tmp_path / "none", configuration("none", lrs=[1e6, 1e7], epochs=1))["limits"]
    assert none["limit"] == none["learning limit"] == pytest.approx(6) and none["limit bound"] == -1, "below all tried"
    assert found["limit bound"] == 0


def test_the_best_rate_has_the_lowest_loss_in_its_last_epoch(tmp_path: Path) -> None:
    lrs = [1e-5, 0.05, 1e6]
    found = measure(tmp_path, configuration("none", lrs=lrs, epochs=6))["limits"]
    assert np.isfinite(found["last loss"][:2]).all() and found["last loss"][2] == math.inf
    assert found["best rate"] == pytest.approx(math.log10(0.05)) and found["last loss"][1] < found["last loss"][0]
    for rate, loss in zip(lrs, found["last loss"], strict=True):
        assert found[f"last loss at {rate:g}"] == loss
    epochs = [row for row in runlog.rows(tmp_path / "lr-0.05") if row["event"] == "epoch"]
    assert len(epochs) == 6 and found["last loss"][1] == epochs[-1]["train_loss"]
    assert {row["lr"] for row in runlog.rows(tmp_path / "lr-0.05") if row["event"] == "train"} == {0.05}, "no drops"
    none = measure(tmp_path / "none", configuration("none", lrs=[1e6, 1e7], epochs=1))["limits"]
    assert math.isnan(none["best rate"])


def test_the_network_learns_at_a_rate_if_the_loss_falls_below_guessing(tmp_path: Path) -> None:
    assert rates.learns([2.5, 2.6, 2.2, 2.1]) and rates.learns([2.2, 2.1])
    assert not rates.learns([166.0, 2.4, 2.31, 2.31]), "a loss that only falls back to guessing is not learning"
    assert not rates.learns([2.0, 1.0, 2.1, 2.2]) and not rates.learns([2.5, 2.2, 1.0, math.nan])
    found = measure(tmp_path, configuration(lrs=[1e-7, 0.05], epochs=24))["limits"]
    np.testing.assert_array_equal(found["survived"], [1, 1])
    np.testing.assert_array_equal(found["learned"], [0, 1])  # only 0.05 learns the sixteen images


# ------------------------------------------------------------------------------------------------ noise


def test_measuring_noise_changes_nothing_of_the_run(tmp_path: Path) -> None:
    plain, noisy = (measure(tmp_path / str(times), configuration(noise=times)) for times in (0, 4))
    for name, values in plain["training"].items():
        np.testing.assert_array_equal(values, noisy["training"][name], err_msg=name)
    losses = [
        [(row.get("loss"), row.get("test_loss")) for row in runlog.rows(tmp_path / f"{times}/train")]
        for times in (0, 4)
    ]
    assert losses[0] == losses[1] and losses[0][-1][1], "of training batches; on the test set by the running statistics"


@pytest.mark.parametrize("precision", PRECISIONS)
def test_measuring_noise_changes_no_bit_of_the_network(tmp_path: Path, precision: str) -> None:
    settings = training.settings_of(configuration(precision=precision, images=64), IMAGES)
    noise = training.Noise(settings, IMAGES, CPU, tmp_path / "noise", 5)
    for name, before_step in (("plain", None), ("noisy", noise)):
        loop.train(settings, tmp_path / name, IMAGES, before_step=before_step)
    plain, noisy = (tensors(tmp_path / name) for name in ("plain", "noisy"))
    assert len(plain) > 20 and not [name for name in plain if not torch.equal(plain[name], noisy[name])]
    assert len(list((tmp_path / "noise").iterdir())) == len(noise.due) == 5


class Replay:
    """Stands in for a CUDA graph of the step: a replay calls no probe, and the gradients have memory of their own."""

    def __init__(self, step: Step) -> None:
        self.step, self.replays = step, 0
        step._probe = None
        step._run()
        self.gradients = [parameter.grad for parameter in step._sgd._parameters]

    def replay(self) -> None:
        self.replays += 1
        before = [parameter.grad for parameter in self.step._sgd._parameters]
        self.step._run()
        for parameter, gradient, old in zip(self.step._sgd._parameters, self.gradients, before, strict=True):
            gradient.copy_(parameter.grad)
            assert old is gradient, "the gradients' memory belongs to the graph"
            parameter.grad = gradient


def test_noise_is_measured_between_the_replays_of_a_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = []

    def capture(step: Step) -> None:
        state = [*step.state_dict().values(), *step._network.state_dict().values()]
        saved = [t.clone() for t in state]
        graphs.append(Replay(step))
        step._graph = graphs[-1]
        for t, value in zip(state, saved, strict=True):
            t.copy_(value)

    plain = measure(tmp_path / "plain", configuration(noise=4))
    recordable = loop._Run.recordable
    monkeypatch.setattr(loop._Run, "recordable", lambda run: recordable(run) or run.recorder is None)
    monkeypatch.setattr(Step, "record", capture)
    replayed = measure(tmp_path / "replayed", configuration(noise=4))
    assert [graph.replays for graph in graphs] == [8], "every step"
    same_arrays(plain, replayed)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("precision", PRECISIONS)
def test_noise_beside_a_captured_step(tmp_path: Path, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the run has one graph and the bits of a run without the measurement."""
    captured, record = [], Step.record
    monkeypatch.setattr(Step, "record", lambda step: (captured.append(step), record(step)))
    cuda, common = torch.device("cuda"), {"deterministic": True, "precision": precision}
    found = [measure(tmp_path / str(n), configuration(noise=n, **common), device=cuda) for n in (0, 4)]
    eager = measure(tmp_path / "eager", configuration(noise=4, graph=False, **common), device=cuda)
    assert len(captured) == 2
    same_arrays({"training": found[0]["training"]}, {"training": found[1]["training"]})
    same_arrays(found[1], eager)


def test_noise_along_a_run(tmp_path: Path) -> None:
    found = measure(tmp_path, configuration(noise=4))["noise"]
    rates = 0.01 * np.array([0.1 if step >= 6 else 1 if step < 4 else 0.1 for step in found["step"]])
    rates[found["step"] >= 6] = 0.01 * 0.01  # two drops, at 4 and 6 of 8 steps
    assert found["step"][0] == 0 and found["step"][-1] == 7 and np.all(found["C"] > 0)
    np.testing.assert_allclose(found["lr C / |B|"], rates * found["C"] / 4)
    last = np.flatnonzero(found["step"] < 4)[-1]
    assert found["C before the first drop"] == found["C"][last]
    assert 10 ** found["log10 lr C / |B| before the first drop"] == pytest.approx(found["lr C / |B|"][last])


def test_the_noise_is_that_of_the_runs_own_batches(tmp_path: Path) -> None:
    """A network and images for which every batch has the same gradient: no noise; with other images there is."""
    alike = Split(IMAGES.train.images[:1].repeat(16, 1, 1, 1), IMAGES.train.labels[:1].repeat(16))
    data = training.dataclasses.replace(IMAGES, train=alike)
    config = configuration(noise=2, augment=False)
    found = training.measure(config, data, CPU, tmp_path, ignore_progress)["noise"]
    other = measure(tmp_path / "other", config)["noise"]
    assert np.abs(found["C"]).max() < 1e-6 * other["C"].min()


# ------------------------------------------------------------------------------------------------ scales


TRAINED = [name for name in names() if any(run.procedure in TRAINING for run in spec(name).runs)]


@pytest.mark.parametrize("name", ["learning_rates", "final_layer_norm", "norm_variants"])
def test_quick_runs_keep_the_rates_and_share_images_and_epochs(name: str) -> None:
    full, small = trained_runs(name, "full"), trained_runs(name, "quick")
    assert full.keys() == small.keys()
    for label, run in small.items():
        assert run.options["lr"] == full[label].options["lr"] and run.depth == 8
        epochs = 25 if name == "norm_variants" else QUICK_EPOCHS[run.options["lr"]]
        assert run.options["epochs"] == epochs and run.options["images"] == QUICK["images"]


@pytest.mark.parametrize("name", ["learning_rates", "final_layer_norm", "norm_variants"])
def test_reduced_runs_keep_the_rates_and_share_images_and_epochs(name: str) -> None:
    """Runs of several experiments with the same rate are the same run, but for the network."""
    full, small = trained_runs(name, "full"), trained_runs(name, "reduced")
    assert full.keys() == small.keys()
    for label, run in small.items():
        assert run.options["lr"] == full[label].options["lr"] and run.batch == 128 and run.seeds >= 3
        assert run.options["epochs"] == REDUCED_EPOCHS[run.options["lr"]]
        assert (run.options["images"], run.options["augment"]) == (1280, False)
        assert run.depth == (56 if name == "norm_variants" else 110)


def test_the_noise_is_measured_in_the_runs_of_figure_1() -> None:
    for scale in ("reduced", "full"):
        ours, figure_1 = trained_runs("noise_in_training", scale), trained_runs("learning_rates", scale)
        assert len(ours) == 4
        for label, run in ours.items():
            assert run.but(seeds=1) == figure_1[label].but(seeds=1, noise=16)


def trained_runs(name: str, scale: str) -> dict[str, Run]:
    return {run.label: run for run in spec(name).at(scale) if "lr" in run.options}


GRID = [10 ** (k / 8) for k in range(-48, 17)]


def searched(stable: float, learns: tuple[float, float], lrs: list[float]) -> tuple[dict, int]:
    """The result of a search, and the number of rates tried, for a network that learns at rates in a range."""
    tried = set()

    def try_rate(rate: float) -> rates.Ended:
        tried.add(rate)
        return rates.Ended(rate <= stable, learns[0] <= rate <= min(stable, learns[1]), 0.0)

    return rates.search(lrs, try_rate), len(tried)


@pytest.mark.parametrize("stable", GRID)
def test_the_search_finds_what_trying_all_rates_finds(stable: float) -> None:
    for highest in GRID[::5]:
        found, tried = searched(stable, (highest / 100, highest), GRID)
        assert found["limit"] == math.log10(stable) and found["limit bound"] == (stable == GRID[-1])
        usable = [rate for rate in GRID if highest / 100 <= rate <= min(stable, highest) and rate >= stable / 1e3]
        if usable:
            assert found["learning limit"] == math.log10(usable[-1])
            assert found["learning limit bound"] == (usable[-1] == GRID[-1])
        assert tried <= 7 + 7 + 2


def test_a_limit_at_the_edge_of_the_grid_is_a_bound() -> None:
    lrs = [0.01, 0.1, 1.0]
    names = ("limit", "limit bound", "learning limit", "learning limit bound")
    for stable, learns, expected in (
        (0.1, (0, 1), (-1, 0, -1, 0)),
        (1, (0, 1), (0, 1, 0, 1)),  # at least 1
        (0, (0, 1), (-2, -1, -2, -1)),  # below 0.01
        (1, (5, 6), (0, 1, -2, -1)),  # learns at no rate that was tried
    ):
        assert tuple(searched(stable, learns, lrs)[0][name] for name in names) == expected


def test_quick_runs_stay_within_22_minutes() -> None:
    """`make reproduce` has 30 minutes for everything. Of training, 4 minutes are runs that experiments share."""
    assert sum(spec(name).minutes.get("quick", 0) for name in TRAINED) <= 22


@pytest.mark.parametrize("name", TRAINED)
def test_every_training_run_is_one_that_bnkern_train_accepts(name: str) -> None:
    """A wrong setting shows here, not after hours."""
    for scale in SCALES:
        for planned in plan([name], scale, "cifar10", 1, Path()):
            changes = {"lr": planned.config["options"].get("lr", 0.1)}
            training.settings_of(planned.config, IMAGES, **changes)
