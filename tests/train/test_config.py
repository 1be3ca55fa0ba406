"""Configs: errors and their messages, JSON, the learning rate, and the runs of the paper."""

import json

import pytest

from bnkern.train.config import PRESETS, SEEDS, Config, from_dict, laptop, learning_rate, parse, preset


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"lr": "0.1"}, TypeError, "lr must be float, got '0.1'"),
        ({"epochs": 1.5}, TypeError, "epochs must be int"),
        ({"epochs": True}, TypeError, "epochs must be int"),
        ({"augment": 1}, TypeError, "augment must be bool"),
        ({"drops": 0.5}, TypeError, "drops must be a list of numbers"),
        ({"drops": [0.75, 0.5]}, ValueError, "drops must be rising shares"),
        ({"drops": [0.5, 1.0]}, ValueError, "drops must be rising shares"),
        ({"lr": 0.0}, ValueError, "lr must be above 0"),
        ({"lr": float("nan")}, ValueError, "lr must be above 0 and finite"),
        ({"momentum": 1.0}, ValueError, "momentum must be from 0"),
        ({"epochs": 0}, ValueError, "epochs must be at least 1"),
        ({"warmup": -1}, ValueError, "warmup must be not negative"),
        ({"precision": "fp16"}, ValueError, "precision must be fp32 or tf32"),
        ({"data": "imagenet"}, ValueError, "data must be cifar10 or synthetic"),
        ({"depth": 21}, ValueError, "depth must be 6n"),
        ({"norm": "spectral"}, ValueError, "norm must be one of batch"),
        ({"init": "fixup"}, ValueError, "un-normalised"),
        ({"name": "a/b"}, ValueError, "name must be usable as a folder"),
        ({"name": ".."}, ValueError, "name must be usable as a folder"),
        ({"learning_rate": 1.0}, ValueError, "no setting 'learning_rate'; did you mean 'lr'|no setting"),
        ({"epoch": 1}, ValueError, "did you mean 'epochs'"),
    ],
)
def test_wrong_settings_are_named(changes: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Config("a").replace(**changes)


def test_a_config_is_frozen_and_passes_through_json() -> None:
    config = Config("a", lr=1, drops=[0.25], norm="none", plateau=3)
    assert config.lr == 1.0 and type(config.lr) is float and config.drops == (0.25,)
    assert from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert from_dict({"name": "a"}) == Config("a")
    assert hash(config) == hash(config.replace()) and config.title == "a-seed0"
    with pytest.raises(AttributeError):
        config.lr = 0.2
    with pytest.raises(ValueError, match="needs a name"):
        from_dict({})


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("lr", "0.1", 0.1),
        ("epochs", "3", 3),
        ("augment", "false", False),
        ("drops", "[0.5]", [0.5]),
        ("norm", "none", "none"),
        ("name", "7", "7"),
        ("lr", "fast", "fast"),
    ],
)
def test_settings_typed_on_a_command_line(name: str, text: str, value: object) -> None:
    assert parse(name, text) == value


def test_learning_rate() -> None:
    config = Config("a", lr=1.0, warmup=3, warmup_lr=0.25, drops=(0.5, 0.75), drop_factor=0.5)
    assert [learning_rate(config, step, 9) for step in range(9)] == [0.25] * 3 + [1.0] + [0.5] * 3 + [0.25] * 2
    waiting = config.replace(plateau=2)
    assert [learning_rate(waiting, 8, 9, lowered) for lowered in range(3)] == [1.0, 0.5, 0.25]


def test_presets_are_the_papers_runs() -> None:
    """Figure 1: ResNet-110, batch 128, momentum 0.9, weight decay 1e-4, drops at 50 and 75 %, five seeds."""
    figure = {n: (c.norm, c.lr, c.epochs) for n, c in PRESETS.items() if n.startswith("fig1")}
    assert sorted(figure.values()) == [
        ("batch", 0.0001, 2400),
        ("batch", 0.003, 1320),
        ("batch", 0.1, 165),
        ("none", 0.0001, 2400),
    ]
    for name, run in PRESETS.items():
        assert run.name == name and (run.depth, run.batch, run.momentum, run.weight_decay) == (110, 128, 0.9, 1e-4)
        assert run.drops == (0.5, 0.75) and run.drop_factor == 0.1 and run.shortcut == "projection"
    assert SEEDS == 5
    assert [laptop(name).epochs for name in figure] == [10, 80, 145, 145]
    assert laptop("fixup-0.1", seed=3).title == "fixup-0.1-laptop-seed3"
    assert preset("fig1-batch-0.1", 0.001).epochs == 1 and preset("fig1-batch-0.1", epochs=7).epochs == 7
    with pytest.raises(ValueError, match=r"did you mean 'final-0\.03'"):
        preset("final-0.3")
