"""Instructions that the CPU kernels execute, counted by valgrind: a guard of speed that noise cannot fake.

Fixed cases, the AVX2 kernels (valgrind knows no AVX-512), one thread, the built module itself. A process without
torch calls the module once for each case, and callgrind counts from the module's entry to its return: the kernel and
a few thousand instructions of its binding, no Python. instructions.json holds the counts by compiler;
``python -m benchmarks.instructions`` prints them beside it, ``--write`` (``make instructions``) replaces this
compiler's.

A count says how much code runs. It does not say how long loads take, nor anything of threads or AVX-512.
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
from collections.abc import Callable
from importlib import machinery, util
from itertools import product
from pathlib import Path
from types import ModuleType

TABLE = Path(__file__).with_name("instructions.json")
ISA = "avx2"
TOLERANCE = 0.03  # counts repeat to the digit; this lets through what touches no inner loop
# Every call of the module passes here, and returns here: the kernels' own entries end in jumps, which valgrind cannot
# tell from calls that stay.
ENTRY = "pybind11::cpp_function::dispatcher(_object*, _object* const*, unsigned long, _object*)"
CODES = {"fp32": 0, "bf16": 1}  # of csrc/dtype.h
SHAPES = {"vectors": (4, 16, 1024), "odd": (4, 17, 49)}  # N, C, S; the odd one is no multiple of a vector anywhere
PLANES_AND_ROWS = {"planes": False, "rows": True}


# ------------------------------------------------------------------------- in the process that valgrind watches


class Memory:
    """Hands out zeroed pages, so that addresses are aligned alike in every run, and keeps them."""

    def __init__(self) -> None:
        rng = random.Random(0)
        self._normal = array("f", (rng.gauss(0, 1) for _ in range(1 << 12))).tobytes()
        self._kept = []

    def of(self, size: int, pattern: bytes = b"") -> int:
        """The address of ``size`` bytes that repeat a pattern."""
        pages = mmap.mmap(-1, size)
        if pattern:
            pages[:] = (pattern * (size // len(pattern) + 1))[:size]
        self._kept.append(pages)
        return ctypes.addressof(ctypes.c_char.from_buffer(pages))

    def normal(self, dtype: str, count: int) -> int:
        """Standard normal values, 4096 of them over and over."""
        if dtype == "fp32":
            return self.of(4 * count, self._normal)
        return self.of(2 * count, b"".join(self._normal[k + 2 : k + 4] for k in range(0, len(self._normal), 4)))

    def ones(self, count: int) -> int:
        return self.of(4 * count, array("f", [1.0]).tobytes())


def cases(native: ModuleType, memory: Memory) -> dict[str, Callable[[], None]]:
    """A call of the module for each case, by name."""
    found = {}
    for shape, (layout, rows), dtype, op in product(SHAPES, PLANES_AND_ROWS.items(), CODES, ("bn", "bn_add_relu")):
        for recorded in (False, True) if (dtype, op) == ("fp32", "bn_add_relu") else (False,):
            name = f"{op} {layout} {dtype} {shape}{' recorded' if recorded else ''}"
            what = (native, memory, rows, dtype, SHAPES[shape], op == "bn_add_relu", recorded)
            found[f"forward {name}"] = forward(*what)
            found[f"backward {name}"] = backward(*what)
    for (layout, rows), dtype in product(PLANES_AND_ROWS.items(), CODES):
        found[f"augment {layout} {dtype}"] = augment(native, memory, rows, dtype)
        for what, wanted in (("sums", (1, 1, 0, 0)), ("signs", (0, 0, 1, 1))):
            found[f"conv_grad_signs {what} {layout} {dtype}"] = conv_grad_signs(native, memory, rows, dtype, wanted)
    for channels, side in ((16, 32), (64, 8)):
        found[f"conv3x3 {channels}"] = conv3x3(native, memory, channels, side)
        sizes = (4, channels, side)
        found[f"conv3x3 gradient {channels}"] = conv_grad_signs(native, memory, True, "fp32", (1, 0, 0, 0), sizes, True)
    return found


def forward(native, memory, rows, dtype, sizes, fused, recorded) -> Callable[[], None]:
    n, c, s = sizes
    count, code, steps = n * c * s, CODES[dtype], (c, 1) if rows else (c * s, s)
    x, residual, y = (memory.normal(dtype, count) for _ in range(3))
    mask, record = memory.of(n * c * (s // 8 + 1)) if fused else 0, memory.of(64 * c) if recorded else 0
    weight, bias, mean, invstd, running_mean, running_var = (memory.ones(c) for _ in range(6))
    counter = memory.of(8)
    return lambda: native.cpu_forward(
        code, rows, n, c, s, True, True, fused,
        x, *steps, residual if fused else 0, *steps, y, *steps, mask,
        weight, 0, bias, 0, mean, invstd, running_mean, 0, running_var, 0, counter, False, 0.1, 1e-5, record, 1,
    )  # fmt: skip


def backward(native, memory, rows, dtype, sizes, fused, recorded) -> Callable[[], None]:
    n, c, s = sizes
    count, code, steps = n * c * s, CODES[dtype], (c, 1) if rows else (c * s, s)
    dy, x, dx, dresidual = (memory.normal(dtype, count) for _ in range(4))
    mask = memory.of(n * c * (s // 8 + 1), bytes(range(256))) if fused else 0
    weight, bias, mean, invstd, dweight, dbias = (memory.ones(c) for _ in range(6))
    records = (memory.of(64 * c), memory.of(64 * c)) if recorded else (0, 0)
    return lambda: native.cpu_backward(
        code, rows, n, c, s, True, True, fused, True,
        dy, *steps, x, *steps, dx, *steps, dresidual if fused else 0, *steps, mask,
        weight, 0, bias, 0, mean, invstd, 0, 0, dweight, 0, dbias, 0, *records, 1,
    )  # fmt: skip


def augment(native, memory, rows, dtype) -> Callable[[], None]:
    count, pixels = 8, 3 * 32 * 32
    images, labels = memory.of(count * pixels, bytes(range(251))), memory.of(8 * count)
    chosen = memory.of(8 * count, array("q", range(count)).tobytes())
    table, out, labels_out = memory.normal(dtype, 3 * 256), memory.normal(dtype, count * pixels), memory.of(8 * count)
    return lambda: native.cpu_augment(
        CODES[dtype], rows, True, 1, 0, images, labels, chosen, count, table, out, labels_out, 1
    )


def conv_grad_signs(
    native, memory, rows, dtype, wanted, sizes=(4, 16, 16), winograd=False
) -> Callable[[], None]:  # 3 x 3, as many outputs as inputs
    n, c, side = sizes
    strides = [side * side * c, 1, side * c, c] if rows else [side * side * c, side * side, side, 1]
    x, dy = (memory.normal(dtype, n * c * side * side) for _ in range(2))
    results = [memory.of(4 * c * c * 9) if want else 0 for want in wanted]
    size, ones = [n, c, side, side], [1, 1]
    return lambda: native.cpu_conv_grad_signs(
        CODES[dtype], x, size, strides, dy, size, strides, [3, 3], ones, ones, results, winograd, 1
    )


def conv3x3(native, memory, channels, side) -> Callable[[], None]:
    size, strides = [4, channels, side, side], [9 * channels, 1, 3 * channels, channels]
    x, y = (memory.normal("fp32", 4 * channels * side * side) for _ in range(2))
    weight = memory.normal("fp32", channels * channels * 9)
    return lambda: native.cpu_conv3x3(x, size, weight, channels, strides, y, 1)


def load(module: str) -> ModuleType:
    """The compiled module by its file, without the package around it, which would bring torch."""
    loader = machinery.ExtensionFileLoader("_native", module)
    native = util.module_from_spec(util.spec_from_loader("_native", loader))
    loader.exec_module(native)
    return native


def call_all(module: str) -> None:
    """Calls each case once, and prints its name before."""
    memory = Memory()  # must outlive the calls
    for name, call in cases(load(module), memory).items():
        print(name, flush=True)
        call()


# ------------------------------------------------------------------------------------ around it: count and compare


def lacks() -> str | None:
    """Why nothing can be counted here, or None."""
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
    """The instructions of each of callgrind's dumps, in the order of their part numbers."""
    counts = {}
    for dump in dumps:
        part, total = (re.search(rf"^{key}: (\d+)", dump, re.MULTILINE) for key in ("part", "totals"))
        if not part or not total:
            raise ValueError(f"not a dump of callgrind: {dump[:80]!r}")
        counts[int(part[1])] = int(total[1])
    return [count for _, count in sorted(counts.items())]


def count() -> dict[str, int]:
    """Instructions by case."""
    from bnkern import _native

    with tempfile.TemporaryDirectory() as folder:
        collect = ["--collect-atstart=no", f"--toggle-collect={ENTRY}", f"--dump-after={ENTRY}"]
        options = [f"--callgrind-out-file={folder}/dump", *collect]
        # Isolated and without site-packages: this file again, as a program.
        command = [sys.executable, "-I", "-S", __file__, "--call", _native.__file__]
        done = subprocess.run(
            ["valgrind", "--tool=callgrind", *options, *command],
            env=os.environ | {"BNKERN_ISA": ISA, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(f"valgrind failed:\n{done.stderr[-2000:]}")
        names = done.stdout.splitlines()
        dumps = [path.read_text() for path in Path(folder).glob("dump.*")]
        counts = [count for count in totals(dumps) if count]  # the last dump is of the rest: nothing
    if len(counts) != len(names):
        raise RuntimeError(f"{len(names)} calls and {len(counts)} counts: does the module keep its symbols?")
    return dict(zip(names, counts, strict=True))


def changed(counts: dict[str, int], table: dict[str, int]) -> list[str]:
    """What stands against the table: cases of one of the two alone, and counts further apart than TOLERANCE."""
    found = [
        f"{name}: not in {'the table' if name in counts else 'the cases'}" for name in counts.keys() ^ table.keys()
    ]
    for name in counts.keys() & table.keys():
        change = counts[name] / table[name] - 1
        if abs(change) > TOLERANCE:
            found.append(f"{name}: {table[name]} became {counts[name]}, {change:+.1%}")
    return sorted(found)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.instructions", description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"replace this compiler's counts in {TABLE.name}")
    parser.add_argument("--call", metavar="MODULE", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.call:
        return call_all(args.call)
    if why := lacks():
        sys.exit(f"nothing counted: {why}")
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    counts, before = count(), table.get(compiler(), {})
    for name, found in counts.items():
        change = f"{found / before[name] - 1:+.1%}" if name in before else "new"
        print(f"{name:<50} {found:>10,} {change:>8}")
    if args.write:
        table[compiler()] = counts
        TABLE.write_text(json.dumps(dict(sorted(table.items())), indent=1) + "\n")
    return None


if __name__ == "__main__":
    main()
