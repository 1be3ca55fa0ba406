"""Instructions that the CPU kernels execute, counted by valgrind. The counts do not depend on the machine's load.

The cases are fixed. They run the AVX2 kernels of the built module on one thread, because valgrind does not support
AVX-512. A process without torch, whose tensors are :class:`Array`, calls the module once for each case. callgrind
counts from the kernel's entry to its return, without Python and without the module's reading of its arguments.
instructions.json holds the counts of each compiler. ``python -m benchmarks.tools.instructions`` prints the counts and
their changes. With ``--write`` (``make instructions``) it replaces the entries of this compiler.

The counts do not show how long loads take, how threads scale, or what AVX-512 executes.
"""

import argparse
import ctypes
import json
import mmap
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from array import array
from collections import namedtuple
from collections.abc import Callable
from importlib import machinery, util
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import ClassVar

TABLE = Path(__file__).with_name("instructions.json")
ISA = "avx2"
TOLERANCE = 0.03  # counts repeat exactly; this allows changes outside of inner loops
# Every kernel is called from these functions and returns to them. The kernels' own entries end in tail calls, which
# valgrind cannot distinguish from calls that return.
ENTRIES = [
    f"void bnkern::run_released<bnkern::{call}>(void (*)(bnkern::{call} const&), bnkern::{call} const&)"
    for call in ("Forward", "Backward", "ConvGradSigns", "Conv3x3", "Augment")
]
CODES = {"fp32": 0, "bf16": 1}  # of csrc/dtype.h
SHAPES = {"vectors": (4, 16, 1024), "odd": (4, 17, 49)}  # N, C, S; no size of the odd one is a multiple of a vector
PLANES_AND_ROWS = {"planes": False, "rows": True}


# --------------------------------------------------------------------------- in the process under valgrind


DTYPES = ("fp32", "bf16", "fp16", "fp64", "uint8", "int64", "int32")  # by the codes of csrc/call/dlpack.h
WIDTH = {"fp32": 4, "bf16": 2, "fp16": 2, "fp64": 8, "uint8": 1, "int64": 8, "int32": 4}


class Array:
    """A substitute for a tensor. Its pages are never freed, and its addresses have the same alignment in every run."""

    device = None
    _kept: ClassVar[list] = []

    def __init__(self, shape: tuple[int, ...], dtype: str = "fp32", pattern: bytes = b"", rows: bool = False) -> None:
        """Filled with a pattern, contiguous or, with ``rows``, with the second axis innermost."""
        order = (1, *range(len(shape) - 1, 1, -1), 0) if rows else range(len(shape) - 1, -1, -1)
        strides, size = [0] * len(shape), 1
        for axis in order:
            strides[axis], size = size, size * shape[axis]
        size *= WIDTH[dtype]
        pages = mmap.mmap(-1, size)
        if pattern:
            pages[:] = (pattern * (size // len(pattern) + 1))[:size]
        self._kept.append(pages)
        address = ctypes.addressof(ctypes.c_char.from_buffer(pages))
        self.described = address, 1, 0, DTYPES.index(dtype), shape, tuple(strides)


_RANDOM = random.Random(0)
_NORMAL = array("f", (_RANDOM.gauss(0, 1) for _ in range(1 << 12))).tobytes()
_NORMAL_BF16 = b"".join(_NORMAL[k + 2 : k + 4] for k in range(0, len(_NORMAL), 4))


def normal(shape: tuple[int, ...], dtype: str, rows: bool = False) -> Array:
    """4096 standard normal values, repeated."""
    return Array(shape, dtype, _NORMAL if dtype == "fp32" else _NORMAL_BF16, rows)


def ones(count: int) -> Array:
    return Array((count,), "fp32", array("f", [1.0]).tobytes())


def cases(native: ModuleType) -> dict[str, Callable[[], object]]:
    """The call of each case, by name."""
    calls = {}
    for shape, (layout, rows), dtype, op in product(SHAPES, PLANES_AND_ROWS.items(), CODES, ("bn", "bn_add_relu")):
        for recorded in (False, True) if (dtype, op) == ("fp32", "bn_add_relu") else (False,):
            name = f"{op} {layout} {dtype} {shape}{' recorded' if recorded else ''}"
            arguments = (native, rows, dtype, SHAPES[shape], op == "bn_add_relu", recorded)
            calls[f"forward {name}"] = forward(*arguments)
            calls[f"backward {name}"] = backward(*arguments)
    for (layout, rows), dtype in product(PLANES_AND_ROWS.items(), CODES):
        calls[f"augment {layout} {dtype}"] = augment(native, rows, dtype)
        for kind, wanted in (("sums", (True, True, False, False)), ("signs", (False, False, True, True))):
            calls[f"conv_grad_signs {kind} {layout} {dtype}"] = conv_grad_signs(native, rows, dtype, wanted)
    for channels, side in ((16, 32), (64, 8)):
        calls[f"conv3x3 {channels}"] = conv3x3(native, channels, side)
        sizes, wanted = (4, channels, side), (True, False, False, False)
        calls[f"conv3x3 gradient {channels}"] = conv_grad_signs(native, True, "fp32", wanted, sizes, True)
    return calls


def forward(native, rows, dtype, sizes, fused, recorded) -> Callable[[], object]:
    c = sizes[1]
    x, residual = (normal(sizes, dtype, rows) for _ in range(2))
    weight, bias, running_mean, running_var = (ones(c) for _ in range(4))
    record = Array((9, c), "fp64") if recorded else None
    running = (running_mean, running_var, Array((), "int64"))
    act, residual = ("relu", residual) if fused else (None, None)
    call = native.ForwardCall(x, weight, bias, residual, *running, True, 0.1, 1e-5, act, fused, record)
    return lambda: native.forward(call, True)


def backward(native, rows, dtype, sizes, fused, recorded) -> Callable[[], object]:
    n, c, s = sizes
    dy, x = (normal(sizes, dtype, rows) for _ in range(2))
    mask = Array(((n * c * s + 7) // 8,) if rows else (n, c, (s + 7) // 8), "uint8", bytes(range(256)))
    weight, bias, mean, invstd = (ones(c) for _ in range(4))
    names = ("record_gradient", "record_affine") if recorded else ()
    records = {name: Array((8, c), "fp64") for name in names}
    act, mask = ("relu", mask) if fused else (None, None)
    needs = (True, True, True, fused)
    call = native.BackwardCall(dy, x, weight, bias, mean, invstd, mask, act, True, needs, **records)
    return lambda: native.backward(call)


def augment(native, rows, dtype) -> Callable[[], object]:
    count, pixels = 8, (3, 32, 32)
    images, labels = Array((count, *pixels), "uint8", bytes(range(251))), Array((count,), "int64")
    chosen = Array((count,), "int64", array("q", range(count)).tobytes())
    table, out = normal((3, 256), dtype), normal((count, *pixels), dtype, rows)
    return lambda: native.augment(images, labels, chosen, table, out, Array((count,), "int64"), True, 1, 0)


def conv_grad_signs(
    native, rows, dtype, wanted, sizes=(4, 16, 16), winograd=False
) -> Callable[[], object]:  # 3 x 3, as many outputs as inputs
    n, c, side = sizes
    x, dy = (normal((n, c, side, side), dtype, rows) for _ in range(2))
    return lambda: native.conv_grad_signs(x, dy, (3, 3), (1, 1), (1, 1), wanted, winograd)


def conv3x3(native, channels, side) -> Callable[[], object]:
    x, weight = normal((4, channels, side, side), "fp32", True), normal((channels, channels, 3, 3), "fp32", True)
    return lambda: native.conv3x3(x, weight, False)


class Torch:
    """A substitute for the functions of torch that the native module uses (see bnkern/backends/native.py)."""

    PLAIN_TYPES = (Array,)
    DTYPES = DTYPES
    exchange_table = None

    def __init__(self, native: ModuleType) -> None:
        names = native.fields()[:2]
        self.ForwardCall, self.BackwardCall = (
            namedtuple("Call", fields, defaults=[None] * len(fields)) for fields in names
        )

    describe = staticmethod(lambda t: t.described)
    from_dlpack = staticmethod(lambda capsule: capsule)
    is_neg = staticmethod(lambda t: False)
    get_num_threads = staticmethod(lambda: 1)
    output_strides = current_stream = empty_strided = None


def load(module: str) -> ModuleType:
    """Loads the compiled module from its file, because the package bnkern would import torch."""
    loader = machinery.ExtensionFileLoader("_native", module)
    native = util.module_from_spec(util.spec_from_loader("_native", loader))
    loader.exec_module(native)
    torch = Torch(native)
    native.connect(torch)
    native.ForwardCall, native.BackwardCall = torch.ForwardCall, torch.BackwardCall
    return native


def call_all(module: str) -> None:
    """Prints the name of each case and calls it once."""
    for name, call in cases(load(module)).items():
        print(name, flush=True)
        call()


# ------------------------------------------------------------------------------------------- count and compare


def unavailable() -> str | None:
    """The reason why nothing can be counted here, or None."""
    from bnkern import _native

    if not shutil.which("valgrind"):
        return "valgrind is not installed"
    if ISA not in _native.build_info()["isas"]:
        return f"the module is built without {ISA}"
    return None


def compiler() -> str:
    from bnkern import _native

    return _native.build_info()["compiler"]


def totals(dumps: list[str]) -> list[int]:
    """The instructions of each dump of callgrind, in the order of the part numbers."""
    counts = {}
    for dump in dumps:
        part, total = (re.search(rf"^{key}: (\d+)", dump, re.MULTILINE) for key in ("part", "totals"))
        if not part or not total:
            raise ValueError(f"not a dump of callgrind: {dump[:80]!r}")
        counts[int(part[1])] = int(total[1])
    return [count for _, count in sorted(counts.items())]


def count() -> dict[str, int]:
    """The instructions of each case."""
    from bnkern import _native

    with tempfile.TemporaryDirectory() as folder:
        # valgrind accepts a pattern for --toggle-collect, but not for --dump-after.
        collect = ["--toggle-collect=void bnkern::run_released<*", *(f"--dump-after={entry}" for entry in ENTRIES)]
        options = [f"--callgrind-out-file={folder}/dump", "--collect-atstart=no", *collect]
        # Runs this file as a program, isolated and without site-packages.
        command = [sys.executable, "-I", "-S", __file__, "--call", _native.__file__]
        process = subprocess.run(
            ["valgrind", "--tool=callgrind", *options, *command],
            env=os.environ | {"BNKERN_ISA": ISA, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        if process.returncode:
            raise RuntimeError(f"valgrind failed:\n{process.stderr[-2000:]}")
        names = process.stdout.splitlines()
        dumps = [path.read_text() for path in Path(folder).glob("dump.*")]
        counts = [count for count in totals(dumps) if count]  # the last dump, after the last call, is empty
    if len(counts) != len(names):
        raise RuntimeError(f"{len(names)} calls and {len(counts)} counts: does the module keep its symbols?")
    return dict(zip(names, counts, strict=True))


def changed(counts: dict[str, int], table: dict[str, int]) -> list[str]:
    """The differences from the table: missing and additional cases, and counts that differ by more than TOLERANCE."""
    changes = [
        f"{name}: not in {'the table' if name in counts else 'the cases'}" for name in counts.keys() ^ table.keys()
    ]
    for name in counts.keys() & table.keys():
        change = counts[name] / table[name] - 1
        if abs(change) > TOLERANCE:
            changes.append(f"{name}: {table[name]} became {counts[name]}, {change:+.1%}")
    return sorted(changes)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tools.instructions", description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"replace this compiler's counts in {TABLE.name}")
    parser.add_argument("--call", metavar="MODULE", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.call:
        return call_all(args.call)
    if reason := unavailable():
        sys.exit(f"nothing can be counted: {reason}")
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    counts, before = count(), table.get(compiler(), {})
    for name, instructions in counts.items():
        change = f"{instructions / before[name] - 1:+.1%}" if name in before else "new"
        print(f"{name:<50} {instructions:>10,} {change:>8}")
    if args.write:
        table[compiler()] = counts
        TABLE.write_text(json.dumps(dict(sorted(table.items())), indent=1) + "\n")
    return None


if __name__ == "__main__":
    main()
