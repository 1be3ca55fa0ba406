"""The choice of a backend: the table, forcing a backend, the fallback, and ``explain``."""

import inspect
import os
import subprocess
import sys
import threading
import types
import warnings
from collections.abc import Callable

import pytest
import torch

import bnkern
from bnkern import backends
from bnkern.backends import protocol, reference
from tests.support.cases import CASE, FP32, TARGETS, Target

FP = torch.float32


def test_the_cpu_kernels_are_available() -> None:
    """Every machine that runs these tests must have the native module, because most tests would not run without it."""
    for dtype in backends.DTYPES:
        assert backends.unavailable("cpu", "cpu", dtype) is None
    assert Target("cpu", "cpu") in TARGETS and Target("reference", "cpu") in TARGETS
    assert backends.choose("", "cpu", FP).__name__ == "bnkern.backends.cpu"


@pytest.mark.parametrize("name", backends.NAMES)
def test_a_backend_implements_the_protocol(name: str) -> None:
    """Every function has the arguments of the protocol. Optional functions are checked where they exist."""
    module = backends._load(name)
    if isinstance(module, str):
        pytest.skip(module)
    others = (protocol.ConvolutionBackend, protocol.ImageBackend, protocol.OwnConvolutionBackend)
    for kind in (protocol.Backend, *(other for other in others if all(hasattr(module, f) for f in functions(other)))):
        for function, requested in functions(kind).items():
            parameters = inspect.signature(getattr(module, function)).parameters
            assert list(parameters)[: len(requested)] == requested, function
            assert all(
                parameters[extra].default is not inspect.Parameter.empty for extra in list(parameters)[len(requested) :]
            )


def functions(kind: type) -> dict[str, list[str]]:
    """The functions of a protocol, with the names of their arguments."""
    results = {name: value for name, value in vars(kind).items() if inspect.isfunction(value) and name[0] != "_"}
    return {name: list(inspect.signature(value).parameters)[1:] for name, value in results.items()}


@pytest.fixture
def fresh_table() -> None:
    """Clears the cache of choices before and after a test that changes the available backends."""

    def clear_caches() -> None:
        for cached in (backends._choose, backends._unavailable, backends._load):
            cached.cache_clear()

    clear_caches()
    yield
    clear_caches()


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch, fresh_table: None) -> Callable[..., None]:
    """Makes the import of backends fail."""

    def block(*names: str) -> None:
        for name in names:
            monkeypatch.setitem(sys.modules, f"bnkern.backends.{name}", None)

    return block


@pytest.fixture
def spied(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The calls that the backends received, as "backend.forward" and "backend.backward"."""
    calls: list[str] = []

    def spy_on(name: str, function: str, called: str) -> None:
        module = backends._load(name)
        original = getattr(module, function)
        monkeypatch.setattr(module, function, lambda *args: calls.append(f"{name}.{called}") or original(*args))

    for name in ("cpu", "reference"):
        spy_on(name, "forward", "forward")
        spy_on(name, "backward", "backward")
    spy_on("cpu", "try_forward", "forward")
    return calls


def call() -> torch.Tensor:
    return bnkern.batch_norm(CASE["nchw_tail"].problem(FP32).x.requires_grad_(), None, None, training=True)


def test_every_backend_has_the_same_functions(target: Target) -> None:
    module = backends.choose(target.backend, target.device, FP)
    for name in ("moments", "merge", "normalize", "grad_sums", "grad_input", "forward", "backward", "refuses"):
        assert callable(getattr(module, name)), f"{target.backend} lacks {name}"


def test_forced(spied: list[str]) -> None:
    assert backends.forced() == os.environ.get("BNKERN_BACKEND", "")
    for name in ("reference", "cpu"):
        with bnkern.use_backend(name):
            assert backends.forced() == name
            call().sum().backward()
    assert spied == ["reference.forward", "reference.backward", "cpu.forward", "cpu.backward"]


def test_the_table_prefers_kernels(spied: list[str]) -> None:
    call().sum().backward()
    assert spied == ["cpu.forward", "cpu.backward"]


def test_forcing_nests_and_ends(spied: list[str]) -> None:
    with bnkern.use_backend("reference"):
        with bnkern.use_backend("cpu"):
            call()
        call()
        with pytest.raises(ZeroDivisionError), bnkern.use_backend("cpu"):
            raise ZeroDivisionError
        assert backends.forced() == "reference"
    assert spied == ["cpu.forward", "reference.forward"]
    assert backends.forced() == os.environ.get("BNKERN_BACKEND", "")


def test_the_forward_decides_for_its_backward(spied: list[str]) -> None:
    with bnkern.use_backend("reference"):
        y = call()
    y.sum().backward()
    assert spied == ["reference.forward", "reference.backward"]
    z = call()
    with bnkern.use_backend("reference"):
        z.sum().backward()
    assert spied[2:] == ["cpu.forward", "cpu.backward"]


def test_forcing_holds_in_other_threads(spied: list[str]) -> None:
    with bnkern.use_backend("reference"):
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
    assert spied == ["reference.forward"]


def test_phases_follow_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(2, 3)
    recorded = []
    monkeypatch.setattr(reference, "moments", lambda t: (recorded.append(t), (2, t[0], t[0]))[1])
    with bnkern.use_backend("reference"):
        bnkern.channel_moments(x)
    assert len(recorded) == 1


def test_unknown_name() -> None:
    with (
        pytest.raises(ValueError, match="backend must be one of cpu, cuda, reference, triton; got 'mkl'"),
        bnkern.use_backend("mkl"),
    ):
        pass
    assert backends.forced() == os.environ.get("BNKERN_BACKEND", "")


def test_a_forced_backend_that_cannot_serve_raises_with_the_reason(without: Callable[..., None]) -> None:
    without("cuda")
    x, running = torch.ones(4, 3, requires_grad=True), torch.zeros(3)
    with bnkern.use_backend("cuda"):
        for attempt in (
            lambda: bnkern.batch_norm(x, running, running, training=True),
            lambda: bnkern.add_act(x),
            lambda: bnkern.channel_moments(x),
        ):
            with pytest.raises(RuntimeError, match="backend 'cuda' was requested but cannot serve cpu torch"):
                attempt()
    assert running.tolist() == [0.0] * 3


def test_falling_back_to_the_reference_warns_once(without: Callable[..., None]) -> None:
    without("cpu")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            call().sum().backward()
    ours = [str(w.message) for w in caught if "bnkern" in str(w.message)]
    assert len(ours) == 1
    assert ours[0].startswith("bnkern uses its slow reference for cpu torch.float32: cpu: cannot be imported")


def test_first_that_does_not_refuse(monkeypatch: pytest.MonkeyPatch, fresh_table: None) -> None:
    """On a GPU the order is cuda, triton, reference, by device and dtype. A forced triton is used."""
    refusing = {"cuda": "no such device", "triton": None, "reference": None}
    for name in refusing:
        module = types.SimpleNamespace(refuses=lambda device, dtype, name=name: refusing[name], __name__=name)
        monkeypatch.setitem(sys.modules, f"bnkern.backends.{name}", module)
    assert backends.choose("", "cuda", FP).__name__ == "triton"
    assert backends.explain("cuda", FP).splitlines() == [
        "cuda       cannot: no such device",
        "triton     serves this call",
        "reference  could serve; triton comes first",
        "cpu        cannot: its kernels run on the CPU, the input is on cuda",
    ]
    refusing["cuda"] = None
    for cached in (backends._choose, backends._unavailable):
        cached.cache_clear()
    assert backends.choose("", "cuda", FP).__name__ == "cuda"
    with bnkern.use_backend("triton"):
        assert backends.choose(backends.forced(), "cuda", FP).__name__ == "triton"
        assert "triton     serves this call (forced)" in backends.explain("cuda", FP)


def gpu(**properties: object) -> types.SimpleNamespace:
    """Properties of a device in torch's form: those of an H100, with the given changes."""
    h100 = {"name": "H100", "major": 9, "minor": 0, "multi_processor_count": 132}
    return types.SimpleNamespace(**h100 | {"shared_memory_per_block_optin": 227 << 10} | properties)


def gpus(monkeypatch: pytest.MonkeyPatch, *properties: types.SimpleNamespace, current: int = 0) -> None:
    """Makes torch report these devices."""

    def properties_of(device: torch.device | int) -> types.SimpleNamespace:
        return properties[device if isinstance(device, int) else device.index]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties_of)


@pytest.mark.parametrize(("kilobytes", "first"), [(227, "cuda"), (163, "cuda"), (99, "triton"), (64, "triton")])
def test_triton_comes_first_where_shared_memory_is_small(
    kilobytes: int, first: str, monkeypatch: pytest.MonkeyPatch, fresh_table: None
) -> None:
    """H100, A100, RTX 4090, T4: with records of rows a block of the CUDA kernels needs 135 KB of shared memory."""
    for name in ("cuda", "triton"):
        module = types.SimpleNamespace(refuses=lambda device, dtype: None, __name__=name)
        monkeypatch.setitem(sys.modules, f"bnkern.backends.{name}", module)
    gpus(monkeypatch, gpu(shared_memory_per_block_optin=kilobytes << 10))
    assert backends.choose("", "cuda", FP).__name__ == first
    assert backends.explain("cuda", FP).splitlines()[0] == f"{first:<10} serves this call"


def test_every_device_has_its_own_choice(monkeypatch: pytest.MonkeyPatch, fresh_table: None) -> None:
    """An H100 and an RTX 4090 in one machine: the choice does not depend on the first device or the current one."""
    for name in ("cuda", "triton"):
        module = types.SimpleNamespace(refuses=lambda device, dtype: None, __name__=name)
        monkeypatch.setitem(sys.modules, f"bnkern.backends.{name}", module)
    ada = gpu(name="RTX 4090", major=8, minor=9, shared_memory_per_block_optin=99 << 10)
    for current in (0, 1):
        gpus(monkeypatch, gpu(), ada, current=current)
        for index, first in enumerate(("cuda", "triton")):
            device = torch.device("cuda", index)
            assert backends.choose("", device, FP).__name__ == first
            assert backends.explain(device, FP).splitlines()[0] == f"{first:<10} serves this call"
        assert backends.choose("", "cuda", FP).__name__ == ("cuda", "triton")[current]
        assert backends.choose("", torch.device("cuda"), FP).__name__ == ("cuda", "triton")[current]


@pytest.mark.parametrize(
    ("built", "major", "minor", "runs"),
    [
        (["90"], 8, 0, False),  # an A100 and a module that was built for the H100
        (["90"], 9, 0, True),
        (["90"], 12, 0, True),  # PTX for it
        (["90-real"], 12, 0, False),
        (["80-real", "100"], 8, 9, True),
        (["80-real", "100"], 9, 0, False),
    ],
)
def test_cuda_refuses_devices_that_it_was_not_built_for(
    built: list[str], major: int, minor: int, runs: bool, monkeypatch: pytest.MonkeyPatch, fresh_table: None
) -> None:
    """Otherwise each call would raise "no kernel image is available", while explain would say that cuda serves it."""
    cuda = backends._load("cuda")
    monkeypatch.setattr(cuda._native, "cuda_device", lambda index, **limits: None, raising=False)
    monkeypatch.setattr(cuda._native, "cuda_clusters", lambda index, shared_bytes: (66, 32, 16), raising=False)
    monkeypatch.setattr(cuda, "_ARCHITECTURES", built)
    gpus(monkeypatch, gpu(name="a device", major=major, minor=minor))
    line = backends.explain("cuda", FP).splitlines()[0]
    if runs:
        assert line == "cuda       serves this call"
    else:
        assert line == (
            f"cuda       cannot: the native module was built for {' '.join(built)}, and the code of none of these runs "
            f"on a device, whose capability is {major}.{minor}: build it with BNKERN_CUDA_ARCHS={major}{minor}"
        )
        with pytest.raises(RuntimeError, match="'cuda' was requested but cannot serve cuda:0"):
            backends.choose("cuda", "cuda", FP)


def test_explain() -> None:
    lines = bnkern.explain(torch.ones(4, 3)).splitlines()
    assert [line.split()[0] for line in lines[:2]] == ["cpu", "reference"]
    assert sorted(line.split()[0] for line in lines) == sorted(backends.NAMES)
    if not backends.forced():
        assert "serves this call" in lines[0] and "cpu comes first" in lines[1]
    with bnkern.use_backend("reference"):
        forced = bnkern.explain(torch.ones(4, 3), residual=torch.ones(4, 3), act="relu").splitlines()
    assert forced[1].split(maxsplit=1) == ["reference", "serves this call (forced)"]
    assert all("not used (reference is forced)" in line for line in forced if not line.startswith("reference"))
    with pytest.raises(TypeError, match="input"):
        bnkern.explain([1.0])


@pytest.mark.parametrize(("value", "expected"), [("reference", "reference"), ("", ""), ("nonsense", None)])
def test_environment_variable(value: str, expected: str | None) -> None:
    """BNKERN_BACKEND forces the backend of a whole process. An unknown name is an error at import."""
    code = "import bnkern.backends; print(bnkern.backends.forced())"
    environment = {**os.environ, "BNKERN_BACKEND": value}
    process = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    if expected is None:
        assert process.returncode != 0 and "backend must be one of" in process.stderr
    else:
        assert process.returncode == 0, process.stderr
        assert process.stdout.strip() == expected


def test_cuda_refuses_other_devices_and_float64() -> None:
    """The message of the CUDA backend names what it does not support: other devices, and float64."""
    assert "run on CUDA devices, the input is on cpu" in backends.unavailable("cuda", "cpu")
    refusal = backends.unavailable("cuda", "cuda")
    assert refusal is None or "built without CUDA" in refusal
    if refusal is None:
        assert "no float64 kernels" in backends.unavailable("cuda", "cuda", torch.float64)


def test_functions_that_a_forced_backend_lacks_are_chosen_by_the_table(
    monkeypatch: pytest.MonkeyPatch, fresh_table: None
) -> None:
    """cuda has only batch norm.

    If it is forced, triton serves images and sums of convolutions, or else the reference.
    """
    assert not hasattr(backends._load("cuda"), "augment") and not hasattr(backends._load("cuda"), "conv_grad_signs")
    for name, functions in (
        ("triton", {"augment": None}),
        ("cuda", {}),
        ("reference", {"augment": None, "other": None}),
    ):
        module = types.SimpleNamespace(refuses=lambda device, dtype: None, __name__=name, **functions)
        monkeypatch.setitem(sys.modules, f"bnkern.backends.{name}", module)
    backends._load.cache_clear()
    assert backends.choose("cuda", "cuda", FP).__name__ == "cuda"
    assert backends.choose("cuda", "cuda", FP, "augment").__name__ == "triton"
    with pytest.warns(UserWarning, match="it has no other"):
        assert backends.choose("triton", "cuda", FP, "other").__name__ == "reference"
