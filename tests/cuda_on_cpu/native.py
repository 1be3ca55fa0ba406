"""Builds the kernels for the host, once per state of their sources, and calls them.

The structs below are those of csrc/params.h and csrc/cuda/kernels.h. :class:`Device` stands for a GPU: small ones make
small tensors take many blocks, several tiles and what does not fit on chip.
"""

import ctypes
import fcntl
import functools
import hashlib
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from ctypes import POINTER, Structure, c_bool, c_char_p, c_double, c_int, c_int64, c_uint64, c_void_p
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from bnkern.backends.layout import layout, strides
from tests.cuda_on_cpu.sandbox import COMPILER, INSIDE, ROOT

HERE = Path(__file__).parent
FLAGS = ["-std=c++20", "-O1", "-g", "-fPIC", "-ffp-contract=off", "-Wall", "-Wextra", f"-I{HERE}"]
FLAGS += ["-Wno-unknown-pragmas", "-Wno-clobbered", "-Wno-maybe-uninitialized"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}


def build(sources: list[Path], flags: list[str]) -> Path:
    """The shared library of these sources, out of the cache where there is one of the same texts and flags."""
    texts = sorted([*(ROOT / "csrc").rglob("*.h"), *HERE.glob("*.h"), *sources])
    key = hashlib.sha256(repr((COMPILER, flags, [(p.name, p.read_text()) for p in texts])).encode()).hexdigest()[:16]
    folder = ROOT / "build" / "cuda_on_cpu"
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / f"{key}.so"
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # test processes run side by side
        if not library.exists():
            # Without the sandbox's runtime, which is of no use to a compiler and slows it down.
            environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}

            def compile(source: Path) -> str:
                target = str(folder / f"{key}-{source.name}.o")
                command = [COMPILER, *flags, "-x", "c++", "-c", str(source), "-o", target]
                done = subprocess.run(command, capture_output=True, text=True, env=environment)
                assert done.returncode == 0, done.stderr
                return target

            with ThreadPoolExecutor(2) as pool:
                objects = list(pool.map(compile, sources))
            part = f"{library}.part"
            subprocess.run([COMPILER, *flags, "-shared", *objects, "-o", part], check=True, env=environment)
            os.rename(part, library)
            for target in objects:
                os.unlink(target)
    return library


@functools.cache
def load(library: Path) -> ctypes.CDLL:
    lib = ctypes.CDLL(str(library))
    lib.configure.argtypes = [c_uint64, c_int]
    return lib


@functools.cache
def kernels() -> ctypes.CDLL:
    """All of csrc/cuda on the host. Sanitized in the sandbox, plain elsewhere."""
    sources = [*sorted((ROOT / "csrc" / "cuda").glob("*.cu")), *sorted(HERE.glob("*.cpp"))]
    lib = load(build(sources, FLAGS + (SANITIZERS if INSIDE in os.environ else [])))
    for which, (name, struct) in enumerate({"forward": CudaForward, "backward": CudaBackward}.items()):
        getattr(lib, name).restype, getattr(lib, name).argtypes = c_char_p, [POINTER(struct)]
        workspace = getattr(lib, f"{name}_workspace")
        workspace.restype, workspace.argtypes = c_int64, [POINTER(struct)]
        assert lib.sizes(which) == ctypes.sizeof(struct), f"{struct.__name__} is not as in kernels.h"
    return lib


# ---------------------------------------------------------------------------------------------- the structs


def _fields(text: str, kind: type) -> list[tuple[str, type]]:
    return [(name, kind) for name in text.split()]


class Shape(Structure):
    _fields_ = [("rows", c_bool), *_fields("n c s", c_int64)]


class View(Structure):
    _fields_ = [("data", c_void_p), *_fields("outer inner", c_int64)]


class ChannelVector(Structure):
    _fields_ = [("data", c_void_p), ("dtype", c_int)]


class Forward(Structure):
    _fields_ = [
        ("shape", Shape),
        ("dtype", c_int),
        *_fields("moments normalize relu", c_bool),
        *_fields("x residual y", View),
        ("mask", c_void_p),
        *_fields("weight bias", ChannelVector),
        *_fields("mean spread", c_void_p),
        *_fields("running_mean running_var", ChannelVector),
        ("counter", c_void_p),
        ("cumulative", c_bool),
        *_fields("momentum eps", c_double),
        ("record", c_void_p),
        ("threads", c_int),
    ]


class Backward(Structure):
    _fields_ = [
        ("shape", Shape),
        ("dtype", c_int),
        *_fields("sums input relu training", c_bool),
        *_fields("dy x dx dresidual", View),
        ("mask", c_void_p),
        *_fields("weight bias", ChannelVector),
        *_fields("mean invstd sum_dy sum_dy_xhat", c_void_p),
        *_fields("dweight dbias", ChannelVector),
        *_fields("record_gradient record_affine", c_void_p),
        ("threads", c_int),
    ]


class CudaDevice(Structure):
    _fields_ = [*_fields("multiprocessors shared_bytes threads", c_int), ("clusters", c_bool)]


class CudaWorkspace(Structure):
    _fields_ = [("data", c_void_p), ("bytes", c_int64)]


class CudaForward(Structure):
    _fields_ = [("call", Forward), ("device", CudaDevice), ("strategy", c_int), ("workspace", CudaWorkspace)]


class CudaBackward(Structure):
    _fields_ = [("call", Backward), ("device", CudaDevice), ("strategy", c_int), ("workspace", CudaWorkspace)]


# ------------------------------------------------------------------------------------- a device and its calls


class Device(NamedTuple):
    """What a GPU has, and how many of a kernel's blocks it can hold at once."""

    multiprocessors: int = 4
    shared_bytes: int = 64 << 10
    threads: int = 64
    clusters: bool = True
    resident: int = 1 << 20


TWO_KERNELS, SINGLE_READ = 0, 1


def view(t: Tensor | None, rows: bool) -> View:
    return View() if t is None else View(t.data_ptr(), *strides(t, rows))


def vector(v: Tensor | None) -> ChannelVector:
    return ChannelVector() if v is None else ChannelVector(v.data_ptr(), DTYPES[v.dtype])


def address(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def exactly(t: Tensor) -> Tensor:
    """A copy in memory of its own, which ends where the tensor ends: the sanitizer watches the borders."""
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype).copy_(t)


def run(call: Forward | Backward, device: Device, strategy: int, seed: int) -> None:
    """One call, with a workspace of just the bytes that it asks for, noise in all of it but the signals."""
    lib = kernels()
    name, struct = ("forward", CudaForward) if isinstance(call, Forward) else ("backward", CudaBackward)
    p = struct(call, CudaDevice(*device[:4]), strategy, CudaWorkspace())
    size = getattr(lib, f"{name}_workspace")(p)
    signals = 2 * 4112 * 4  # kGroups of device.h
    generator = torch.Generator().manual_seed(seed)
    workspace = torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)
    workspace[:signals] = 0
    p.workspace = CudaWorkspace(workspace.data_ptr(), size)
    lib.configure(seed, device.resident)
    said = getattr(lib, name)(p).decode()
    if said:
        raise RuntimeError(said)
    # A signal's upper bit is its turn; everything else is as it was.
    assert not (workspace[:signals].view(torch.int32) & 0x7FFFFFFF).any(), "a signal was left standing"


def shape_of(x: Tensor) -> Shape:
    like = layout(x)
    return Shape(like.rows, like.n, like.c, like.s)
