"""Fixtures of the experiments' tests."""

import pytest

from bnkern.train import cifar10
from experiments import run as runner
from tests.experiments.support import Procedure


@pytest.fixture(autouse=True)
def no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """Removes the data folder that the developer's environment may name."""
    monkeypatch.delenv("BNKERN_DATA", raising=False)


@pytest.fixture
def procedure(monkeypatch: pytest.MonkeyPatch) -> Procedure:
    stand_in = Procedure()
    for name in runner.PROCEDURES:
        monkeypatch.setitem(runner.PROCEDURES, name, stand_in)
    return stand_in


@pytest.fixture
def no_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """No images are loaded. For tests whose training on CIFAR-10 is a stand-in."""
    monkeypatch.setattr(cifar10, "load", lambda data: None)
