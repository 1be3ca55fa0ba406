"""Builds the kernels for the host, once for each state of their sources, and calls them.

The structs below are those of csrc/params.h and csrc/cuda/kernels.h. :class:`Device` describes a GPU. On a small one a
small tensor takes many blocks and several tiles, and does not fit on the chip.
"""

import ctypes
import fcntl
import functools
import hashlib
import os
import subprocess
import sysconfig
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from ctypes import POINTER, Structure, c_bool, c_char_p, c_double, c_int, c_int64, c_size_t, c_uint8, c_uint64, c_void_p
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

import bnkern
from bnkern import backends
from bnkern.backends.calls import BackwardCall, ForwardCall
from bnkern.backends.layout import addressed, empty_like, layout, strides
from tests.backends.cuda_on_cpu.sandbox import COMPILER, INSIDE, ROOT

HERE = Path(__file__).parent
FLAGS = ["-std=c++20", "-O1", "-g", "-fPIC", "-ffp-contract=off", "-Wall", "-Wextra", f"-I{HERE}"]
FLAGS += [f"-isystem{sysconfig.get_path('include')}", "-DBNKERN_CUDA_ON_CPU"]
FLAGS += ["-Wno-unknown-pragmas", "-Wno-clobbered", "-Wno-maybe-uninitialized"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}


def build(sources: list[Path], flags: list[str]) -> Path:
    """The shared library of these sources, from the cache if it has the same sources and flags."""
    texts = sorted([*(ROOT / "csrc").rglob("*.h"), *HERE.glob("*.h"), *sources])
    key = hashlib.sha256(repr((COMPILER, flags, [(p.name, p.read_text()) for p in texts])).encode()).hexdigest()[:16]
    folder = ROOT / "build" / "cuda_on_cpu"
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / f"{key}.so"
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # test processes run in parallel
        if not library.exists():
            # The runtime of the sandbox would only slow down the compiler.
            environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}

            def compile(source: Path) -> str:
                target = str(folder / f"{key}-{source.name}.o")
                command = [COMPILER, *flags, "-x", "c++", "-c", str(source), "-o", target]
                process = subprocess.run(command, capture_output=True, text=True, env=environment)
                assert process.returncode == 0, process.stderr
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
def kernels(optimized: bool = False) -> ctypes.CDLL:
    """All of csrc/cuda on the host, with sanitizers in the sandbox, else without; ``optimized`` for measurements."""
    csrc = ROOT / "csrc"
    call = [
        csrc / "call" / f"{name}.cpp" for name in ("batch_norm", "conv_norm", "cuda", "dlpack", "tensors", "update")
    ]
    sources = [*sorted((csrc / "cuda").glob("*.cu")), *call, csrc / "cpu" / "pool.cpp", *sorted(HERE.glob("*.cpp"))]
    extra_flags = SANITIZERS if INSIDE in os.environ else ["-O3"] if optimized else []
    lib = load(build(sources, FLAGS + extra_flags))
    for index, (name, struct) in enumerate({"forward": CudaForward, "backward": CudaBackward}.items()):
        getattr(lib, name).restype, getattr(lib, name).argtypes = c_char_p, [POINTER(struct), c_size_t]
        within, workspace = getattr(lib, f"{name}_within"), getattr(lib, f"{name}_workspace")
        within.restype, within.argtypes = c_char_p, [POINTER(struct)]
        workspace.restype, workspace.argtypes = None, [POINTER(struct), POINTER(WorkspaceSize)]
        assert lib.sizes(index) == ctypes.sizeof(struct), f"{struct.__name__} is not as in kernels.h"
    lib.register_device.argtypes = [POINTER(CudaDevice), c_int64]
    lib.leave_out_launches.argtypes = [c_bool]
    lib.signal_bytes.restype, lib.signal_bytes.argtypes = c_int64, [c_int64]
    return lib


@functools.cache
def module(optimized: bool = False) -> ModuleType:
    """The functions of the native module for calls (csrc/call) over these kernels. They take tensors on the CPU."""
    make = ctypes.PyDLL(kernels(optimized)._name).native_module
    make.restype, make.argtypes = ctypes.py_object, []
    return make()


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
        *_fields("moments normalize", c_bool),
        ("act", c_uint8),
        *_fields("x residual y", View),
        ("mask", c_void_p),
        *_fields("weight bias", ChannelVector),
        *_fields("mean spread", c_void_p),
        *_fields("running_mean running_var", ChannelVector),
        *_fields("counter skipped", c_void_p),
        ("cumulative", c_bool),
        *_fields("momentum eps", c_double),
        *_fields("record sample_weight", c_void_p),
        ("threads", c_int),
    ]


class Backward(Structure):
    _fields_ = [
        ("shape", Shape),
        ("dtype", c_int),
        *_fields("sums input", c_bool),
        ("act", c_uint8),
        ("training", c_bool),
        *_fields("dy x dx dresidual", View),
        ("mask", c_void_p),
        *_fields("weight bias", ChannelVector),
        *_fields("mean invstd sum_dy sum_dy_xhat double_sums", c_void_p),
        *_fields("dweight dbias", ChannelVector),
        *_fields("record_gradient record_affine record_samples sample_weight", c_void_p),
        ("threads", c_int),
    ]


class CudaDevice(Structure):
    _fields_ = [*_fields("multiprocessors shared_bytes threads", c_int), ("clusters", c_int * 3)]


class WorkspaceSize(Structure):
    _fields_ = _fields("groups bytes", c_int64)


class CudaWorkspace(Structure):
    _fields_ = [("data", c_void_p), ("size", WorkspaceSize)]


class CudaForward(Structure):
    _fields_ = [("call", Forward), ("device", CudaDevice), ("strategy", c_int), ("workspace", CudaWorkspace)]


class CudaBackward(Structure):
    _fields_ = [("call", Backward), ("device", CudaDevice), ("strategy", c_int), ("workspace", CudaWorkspace)]


# ------------------------------------------------------------------------------------- a device and its calls


class Device(NamedTuple):
    """The resources of a GPU, and the number of blocks of a kernel that it can hold at once."""

    multiprocessors: int = 4
    shared_bytes: int = 64 << 10
    threads: int = 64
    clusters: bool = True
    resident: int = 1 << 20

    @property
    def struct(self) -> CudaDevice:
        sizes = (max(1, self.multiprocessors // size) if self.clusters else 0 for size in (2, 4, 8))
        return CudaDevice(*self[:3], (c_int * 3)(*sizes))


TWO_KERNELS, SINGLE_READ = 0, 1


def view(t: Tensor | None, rows: bool) -> View:
    return View() if t is None else View(t.data_ptr(), *strides(t, rows))


def vector(v: Tensor | None) -> ChannelVector:
    return ChannelVector() if v is None else ChannelVector(v.data_ptr(), DTYPES[v.dtype])


def address(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def run(call: Forward | Backward, device: Device, strategy: int, seed: int) -> None:
    """One call with a workspace of exactly the requested size, filled with noise except for the signals."""
    lib = kernels()
    name, struct = ("forward", CudaForward) if isinstance(call, Forward) else ("backward", CudaBackward)
    p = struct(call, device.struct, strategy, CudaWorkspace())
    size = WorkspaceSize()
    getattr(lib, f"{name}_workspace")(p, size)
    signals = lib.signal_bytes(size.groups)
    generator = torch.Generator().manual_seed(seed)
    workspace = torch.randint(0, 256, (signals + size.bytes,), dtype=torch.uint8, generator=generator)
    workspace[:signals] = 0
    p.workspace = CudaWorkspace(workspace.data_ptr(), size)
    lib.configure(seed, device.resident)
    message = getattr(lib, f"{name}_within")(p).decode()
    if message:
        raise RuntimeError(message)
    # The upper bit of a signal is its phase. The other bits must be reset.
    assert not (workspace[:signals].view(torch.int32) & 0x7FFFFFFF).any(), "a kernel did not reset a signal"


# ------------------------------------------------------------------------------------------------ a backend


class OnCpu(NamedTuple):
    """The functions of a backend (bnkern/backends/__init__.py) by these kernels, on CPU tensors.

    Each call is made once per seed, each time in another order of threads and blocks, and must always give the same
    bits.
    """

    device: Device = Device()
    strategy: int = SINGLE_READ
    seeds: tuple[int, ...] = (1, 2)

    def in_five_orders(self) -> "OnCpu":
        """The same with five orders of threads and blocks for each call."""
        return self._replace(seeds=(1, 2, 3, 4, 5))

    def passes(self, check: Callable, *args) -> None:
        """Runs a check of the backends with these kernels as the backend "cuda"."""
        chosen, backends.choose = backends.choose, lambda name, device, dtype: self
        try:
            with bnkern.use_backend("cuda"):
                check(*args)
        finally:
            backends.choose = chosen

    def _agree(self, call: Callable[[int], list[Tensor | None]]) -> list[Tensor | None]:
        first, *others = [call(seed) for seed in self.seeds]
        for other in others:
            for k, (a, b) in enumerate(zip(first, other, strict=True)):
                same = a is None or torch.equal(*(t.reshape(-1).view(torch.uint8) for t in (a, b)))
                assert same, f"result {k} depends on the order of threads and blocks"
        return first

    def refuses(self, device: torch.device, dtype: torch.dtype) -> str | None:
        return None if dtype is not torch.float64 else "no float64"

    def _forward(self, arguments: ForwardCall, phases: tuple[bool, bool], saved=None) -> list[Tensor | None]:
        """y, mask, mean, spread, and the running statistics and the counter after the call."""
        moments, normalize = phases
        x, weight, bias, residual, running_mean, running_var, counter, _, momentum, eps, act, _, record, *_ = arguments
        x_layout = layout(x)
        x = addressed(x, x_layout.rows)
        residual = None if residual is None else addressed(residual, x_layout.rows)

        def call(seed: int) -> list[Tensor | None]:
            state = [None if t is None else t.clone() for t in (running_mean, running_var, counter)]
            y = _noise(empty_like(x, x_layout.rows)) if normalize else None
            mask = _noise(torch.empty(x_layout.mask_shape, dtype=torch.uint8)) if arguments.has_mask else None
            mean, spread = saved or (None, None)
            if moments or running_mean is not None:
                mean, spread = _noise(torch.empty(x_layout.c)), _noise(torch.empty(x_layout.c))
            recorded = None if record is None else torch.full_like(record, -1.0)
            run(
                Forward(
                    Shape(*x_layout),
                    DTYPES[x.dtype],
                    *phases,
                    act is not None,
                    *(view(t, x_layout.rows) for t in (x, residual, y)),
                    address(mask),
                    *map(vector, (weight, bias)),
                    *map(address, (mean, spread)),
                    *map(vector, state[:2]),
                    address(state[2]),
                    None,
                    momentum is None,
                    momentum or 0.0,
                    eps,
                    address(recorded),
                ),
                self.device,
                self.strategy,
                seed,
            )
            return [y, mask, mean, spread, *state, recorded]

        *results, recorded = self._agree(call)
        if record is not None:
            record.copy_(recorded)
        return results

    def moments(self, x: Tensor) -> tuple[int, Tensor, Tensor]:
        if not x.numel():
            return 0, torch.zeros(x.shape[1]), torch.zeros(x.shape[1])
        _, _, mean, m2, *_ = self._forward(ForwardCall(x), (True, False))
        return layout(x).count, mean, m2

    def normalize(self, call: ForwardCall, mean: Tensor | None, invstd: Tensor | None):
        call = call._replace(running_mean=None, running_var=None, num_batches_tracked=None)
        y, mask, *_ = self._forward(call, (False, True), (mean, invstd))
        return y, mask

    def forward(self, call: ForwardCall):
        y, mask, mean, invstd, *state = self._forward(call, (call.training, True))
        for old, new in zip(call[4:7], state, strict=True):
            if old is not None:
                old.copy_(new)
        return y, mean, invstd, mask

    def _backward(self, arguments: BackwardCall, phases: tuple[bool, bool], centred: bool, sums, needed):
        """dx, dresidual, the sums, dweight and dbias."""
        dy, x, weight, bias, mean, invstd, mask, act, *_ = arguments
        x_layout = layout(x)
        dy, x = addressed(dy, x_layout.rows), addressed(x, x_layout.rows)
        needs_dx, needs_dresidual, weight_dtype, bias_dtype = needed
        records = (
            arguments.record_gradient if needs_dx and phases[1] else None,
            arguments.record_affine if mean is not None and phases[0] else None,
        )

        def call(seed: int) -> list[Tensor | None]:
            dx, dresidual = (_noise(empty_like(x, x_layout.rows)) if w else None for w in (needs_dx, needs_dresidual))
            dweight, dbias = (
                _noise(torch.empty(x_layout.c, dtype=t)) if t else None for t in (weight_dtype, bias_dtype)
            )
            sum_tensors = sums or ([_noise(torch.empty(x_layout.c)) for _ in range(2)] if phases[0] else (None, None))
            recorded = [None if r is None else torch.full_like(r, -1.0) for r in records]
            run(
                Backward(
                    Shape(*x_layout),
                    DTYPES[x.dtype],
                    *phases,
                    act is not None,
                    centred,
                    *(view(t, x_layout.rows) for t in (dy, x, dx, dresidual)),
                    address(mask),
                    *map(vector, (weight, bias)),
                    *map(address, (mean, invstd, *sum_tensors)),
                    None,  # double_sums: only on the CPU
                    *map(vector, (dweight, dbias)),
                    *map(address, recorded),
                ),
                self.device,
                self.strategy,
                seed,
            )
            return [dx, dresidual, *sum_tensors, dweight, dbias, *recorded]

        *results, gradient, affine = self._agree(call)
        for record, recorded in zip(records, (gradient, affine), strict=True):
            if record is not None:
                record.copy_(recorded)
        return results

    def grad_sums(self, call: BackwardCall):
        return self._backward(call, (True, False), True, None, (False, False, None, None))[2:4]

    def grad_input(self, call: BackwardCall, sums):
        need_x, _, _, need_residual = call.needs
        needed = (need_x, need_residual, None, None)
        return self._backward(call, (False, True), sums is not None, sums and sums[:2], needed)[:2]

    def backward(self, call: BackwardCall):
        need_x, need_weight, need_bias, need_residual = call.needs
        needed = (need_x, need_residual, need_weight and call.weight.dtype, need_bias and call.bias.dtype)
        phases = (call.needs_sums, need_x or need_residual)
        dx, dresidual, _, _, dweight, dbias = self._backward(call, phases, call.training and need_x, None, needed)
        return dx, dweight, dbias, dresidual


def _noise(t: Tensor) -> Tensor:
    """``t`` filled with values that a result must replace: NaN, or ones in a mask."""
    return t.fill_(255 if t.dtype is torch.uint8 else torch.nan)
