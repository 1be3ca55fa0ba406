"""Fixtures of the experiments' tests."""

import pytest

from bnkern.train import cifar10
from experiments import run as running
from tests.experiments.support import Procedure


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


@pytest.fixture
def no_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """For stand-ins of training on CIFAR-10."""
    monkeypatch.setattr(cifar10, "load", lambda where: None)
