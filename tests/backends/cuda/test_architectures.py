"""The compiled code that a GPU runs, by CUDA's rules of compatibility, and its consequences."""

from types import SimpleNamespace

import pytest
import torch

from bnkern import _native
from bnkern.backends import cuda
from bnkern.backends.architectures import serving


@pytest.mark.parametrize(
    ("device", "built", "code"),
    [
        # Machine code runs on the same major capability with the same or a later minor one.
        ((9, 0), "90-real", (9, 0)),
        ((8, 9), "80-real", (8, 0)),
        ((8, 9), "80-real 86-real 90-real", (8, 6)),
        ((8, 0), "86-real", None),
        ((8, 0), "90-real", None),
        ((12, 0), "100-real", None),
        # PTX runs on every later capability.
        ((9, 0), "80-virtual", (8, 0)),
        ((12, 1), "80-virtual 90-virtual", (9, 0)),
        ((8, 0), "90-virtual", None),
        # With both, machine code takes precedence, also over PTX of a later capability.
        ((9, 0), "90", (9, 0)),
        ((12, 0), "90", (9, 0)),
        ((8, 0), "90", None),
        ((8, 9), "80-real 89-virtual", (8, 0)),
        ((10, 0), "80 90-real", (8, 0)),
        # Targets of one architecture, or of its family.
        ((9, 0), "90a", (9, 0)),
        ((10, 0), "90a", None),
        ((10, 3), "100a-real", None),
        ((10, 3), "100f", (10, 0)),
        ((12, 0), "100f", None),
        # Jetson Orin runs machine code for its own capability, and any earlier PTX.
        ((8, 7), "80-real 86-real", None),
        ((8, 7), "80", (8, 0)),
        ((8, 7), "87-real", (8, 7)),
        ((8, 9), "87-real", None),
        ((9, 0), "", None),
    ],
)
def test_serving(device: tuple[int, int], built: str, code: tuple[int, int] | None) -> None:
    assert serving(device, built.split()) == code


def test_an_entry_that_is_no_architecture() -> None:
    for entry in ("all", "native", "sm_90", "90-fake", "9"):
        with pytest.raises(ValueError, match=f"not a CUDA architecture: '{entry}'"):
            serving((9, 0), [entry])


def test_this_build_names_architectures() -> None:
    for entry in _native.build_info()["cuda_archs"]:
        serving((9, 0), [entry])


@pytest.mark.parametrize(
    ("built", "clusters"), [("90", (66, 32, 16)), ("80", (0, 0, 0)), ("80-virtual 100-real", (0, 0, 0))]
)
def test_clusters_need_code_that_has_them(
    built: str, clusters: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An H100 may run PTX for capability 8.0, in which the barrier of a cluster does nothing.

    The results were wrong.
    """
    properties = SimpleNamespace(
        name="H100", major=9, minor=0, multi_processor_count=132, shared_memory_per_block_optin=227 << 10
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(cuda, "_ARCHITECTURES", built.split())
    messages = []
    monkeypatch.setattr(cuda._native, "cuda_device", lambda index, **limits: messages.append(limits), raising=False)
    monkeypatch.setattr(cuda._native, "cuda_clusters", lambda index, shared_bytes: (66, 32, 16), raising=False)
    monkeypatch.setattr(cuda, "_queried", {})
    cuda.introduce(0)
    assert [limits["clusters"] for limits in messages] == [clusters]


def test_the_number_of_clusters_is_queried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal devices have equal plans, even if other work on one of them would reduce the number of clusters."""
    answers = iter([(66, 32, 16), (66, 32, 12)])
    monkeypatch.setattr(cuda._native, "cuda_clusters", lambda index, shared_bytes: next(answers), raising=False)
    monkeypatch.setattr(cuda, "_queried", {})
    monkeypatch.setattr(cuda, "_ARCHITECTURES", ["90"])
    properties = SimpleNamespace(name="H100", major=9, minor=0, shared_memory_per_block_optin=227 << 10)
    assert cuda.clusters_of(0, properties) == cuda.clusters_of(1, properties) == (66, 32, 16)
    monkeypatch.setattr(cuda, "RULES", {"H100": cuda.Rule(0, "a committed table", [66, 32, 15])})
    assert cuda.clusters_of(0, properties) == [66, 32, 15]
