"""The choice of the kernels for a call: :func:`choose` has the table, :func:`use_backend` forces a backend, and
:func:`explain` shows the choice.

A backend is a module with the functions and signatures of ``reference``; ``protocol`` has them as types. These are
``forward`` and ``backward`` for whole calls, the phases ``moments merge normalize grad_sums grad_input``, ``update``
for the parameters of a network, and ``refuses(device, dtype) -> str | None``, which returns the reason why the backend
cannot serve such an input. A backend may also have ``try_forward``. It checks the arguments of a call itself, and
returns None if they need the slow checks.

A ``device`` is a ``torch.device`` or its name. The GPUs of a machine may differ, so every choice is made and cached for
one device with its index. "cuda" without an index means the current device.
"""

import contextlib
import importlib
import os
import warnings
from collections.abc import Iterator
from functools import cache
from typing import Literal, cast, overload

import torch

from .protocol import Backend, ChainBackend, ConvolutionBackend, ImageBackend, OwnConvolutionBackend

# The table has the backends of each device in order of preference. The first one that does not refuse serves the call.
# On CUDA devices this is CUDA C++: on an H200 a training step takes 0.87 of its time with Triton's kernels, and a call
# takes a third of the host time. Triton also serves float64, the sums of convolutions and images. It comes first if a
# block has little shared memory, as on most GPUs that are not made for data centres. The CUDA kernels need this memory
# to record, and were measured on devices that have it.
NAMES = ("cuda", "triton", "cpu", "reference")
PREFERENCE = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}
ROOM = 160 << 10  # bytes of shared memory that a block must be able to have; records of rows take up to 135 KB
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _order(device: torch.device) -> tuple[str, ...]:
    """The table's row for a device."""
    order = PREFERENCE.get(device.type, ("reference",))
    if device.type != "cuda" or not torch.cuda.is_available():
        return order
    properties = torch.cuda.get_device_properties(device)
    if properties.shared_memory_per_block_optin >= ROOM:  # type: ignore[attr-defined]  # torch's stub lacks it
        return order
    return ("triton", *(name for name in order if name != "triton"))


_CPU = torch.device("cpu")


def _indexed(device: torch.device | str) -> torch.device:
    """The device with its index. The device of a tensor always has it."""
    if device == _CPU:  # This test comes first, because every call runs it and reading a device's type takes longer.
        return device
    device = torch.device(device)
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _checked(name: str) -> str:
    if name not in NAMES:
        raise ValueError(f"backend must be one of {', '.join(sorted(NAMES))}; got {name!r}")
    return name


# The forced backend, or "" for the table's choice. It is global, so that it applies in the backward's threads too.
_forced = _checked(os.environ["BNKERN_BACKEND"]) if os.environ.get("BNKERN_BACKEND") else ""


def forced() -> str:
    """The backend forced by :func:`use_backend` or ``BNKERN_BACKEND``, or "" for the table's choice."""
    return _forced


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force one backend ("cpu", "triton", "cuda" or "reference") for all calls within, in every thread.

    If it cannot serve a call, an error with the reason is raised. For a function that it does not have at all ("cuda"
    has no ``augment`` and no ``conv_grad_signs``) the table is used. The backward of a call runs on the backend of its
    forward, also after the block. ``BNKERN_BACKEND`` in the environment does the same for a whole process.
    """
    global _forced
    before, _forced = _forced, _checked(name)
    try:
        yield
    finally:
        _forced = before


# Whether the CUDA kernels compute chains. It is global for the same reason.
_cuda_chains = os.environ.get("BNKERN_CUDA_CHAINS") == "1"


@contextlib.contextmanager
def use_cuda_chains(on: bool = True) -> Iterator[None]:
    """Let the CUDA kernels compute chains of convolutions and batch norms within, in every thread.

    They are off by default, because **they have not run on a GPU yet**. They serve bfloat16 and float16 in
    channels_last with 16, 32 or 64 channels and at most 16,384 values an image (:func:`bnkern.nn.run_chain`), and only
    the forward is a kernel of their own. ``BNKERN_CUDA_CHAINS=1`` in the environment does the same for a whole process.
    """
    global _cuda_chains
    before, _cuda_chains = _cuda_chains, on
    try:
        yield
    finally:
        _cuda_chains = before


def chain_kernels(device: torch.device, dtype: torch.dtype) -> ChainBackend | None:
    """The backend whose kernels compute chains for tensors of this device and dtype, or None."""
    if device.type == "cpu" and not unavailable("cpu", "cpu"):
        kernels = choose(forced(), device, dtype)
        return cast(ChainBackend, kernels) if hasattr(kernels, "prefers_conv_norm") else None
    if device.type == "cuda" and _cuda_chains and choose(forced(), device, dtype) is _load("cuda"):
        return cast(ChainBackend, importlib.import_module(f"{__name__}.cuda_conv"))
    return None


@cache
def _load(name: str) -> Backend | str:
    """The backend's module, or the reason why it cannot be imported here."""
    try:
        return cast(Backend, importlib.import_module(f"{__name__}.{name}"))
    except ImportError as error:
        return f"cannot be imported: {error}"


def _loaded(name: str) -> Backend:
    """The module of an available backend."""
    module = _load(name)
    assert not isinstance(module, str), module
    return module


def unavailable(name: str, device: torch.device | str, dtype: torch.dtype = torch.float32) -> str | None:
    """Why the named backend cannot serve tensors of this device and dtype here, or None if it can."""
    return _unavailable(name, _indexed(device), dtype)


@cache
def _unavailable(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    module = _load(_checked(name))
    return module if isinstance(module, str) else module.refuses(device, dtype)


@overload
def choose(name: Literal["cpu"], device: torch.device | str, dtype: torch.dtype) -> OwnConvolutionBackend: ...
@overload
def choose(name: str, device: torch.device | str, dtype: torch.dtype) -> Backend: ...
@overload
def choose(
    name: str, device: torch.device | str, dtype: torch.dtype, function: Literal["conv_grad_signs"]
) -> ConvolutionBackend: ...
@overload
def choose(name: str, device: torch.device | str, dtype: torch.dtype, function: Literal["augment"]) -> ImageBackend: ...
def choose(name: str, device: torch.device | str, dtype: torch.dtype, function: str | None = None) -> Backend:
    """The backend module for tensors of this device and dtype.

    It is the named backend or, for the name "", the first one of the table that can serve. ``function`` is the function
    to call, if not every backend has it (``augment``, ``conv_grad_signs``; "cuda" has neither). If the named
    backend does not have it, the table is used.

    Raises RuntimeError if a named backend cannot serve. If the table ends at the reference, a warning is issued once
    for each device.
    """
    return _choose(name, _indexed(device), dtype, function)


@cache
def _choose(name: str, device: torch.device, dtype: torch.dtype, function: str | None) -> Backend:
    if name:
        reason = _unavailable(name, device, dtype)
        if reason:
            raise RuntimeError(f"backend {name!r} was requested but cannot serve {device} {dtype}: {reason}")
        module = _loaded(name)
        return module if function is None or hasattr(module, function) else _choose("", device, dtype, function)
    reasons: list[str] = []
    for candidate in _order(device):
        reason = _unavailable(candidate, device, dtype)
        if reason is None and function is not None and not hasattr(_load(candidate), function):
            reason = f"it has no {function}"
        if reason is None:
            if candidate == "reference":
                cause = "; ".join(reasons) or f"no backend has kernels for device {device.type!r}"
                warnings.warn(f"bnkern uses its slow reference for {device} {dtype}: {cause}", stacklevel=4)
            return _loaded(candidate)
        reasons.append(f"{candidate}: {reason}")
    raise AssertionError("the reference serves everything")


def explain(device: torch.device | str, dtype: torch.dtype) -> str:
    """The table for such an input. Each line has a backend, and whether it serves the input or why it does not."""
    chosen = None
    lines = []
    device = _indexed(device)
    order = _order(device)
    for name in order + tuple(name for name in NAMES if name not in order):
        reason = _unavailable(name, device, dtype)
        if forced() and name != forced():
            verdict = f"not used ({forced()} is forced)"
        elif reason:
            verdict = f"cannot: {reason}"
        elif chosen is None:
            chosen, verdict = name, "serves this call" + (" (forced)" if forced() else "")
        else:
            verdict = f"could serve; {chosen} comes first"
        lines.append(f"{name:<10} {verdict}")
    return "\n".join(lines)
