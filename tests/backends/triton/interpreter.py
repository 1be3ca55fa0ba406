"""Runs checks in another process, in which Triton interprets its kernels on the CPU.

Triton reads TRITON_INTERPRET at import, and it applies to all kernels. The process of the tests does not set it,
because other tests compile kernels, or test what is refused on a CPU.
"""

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context


def _set_up() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    import dataclasses

    import numpy as np
    import torch
    import triton.language as tl
    from triton.runtime import interpreter

    torch.set_num_threads(1)
    np.seterr(all="ignore")  # NaN, Inf and idle lanes are intended
    # Checking each integer operation for overflow doubles the time, and small shapes do not overflow.
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    # GPUs round to nearest in bfloat16, and the interpreter truncates.
    convert = interpreter._convert_float

    def converted(values, source, target, rounding):
        if (source.name, target.name) != ("fp32", "bf16"):
            return convert(values, source, target, rounding)
        rounded = torch.from_numpy(np.array(values)).bfloat16()
        return rounded.view(torch.uint16).numpy().reshape(values.shape)

    interpreter._convert_float = converted
    # The interpreter multiplies bfloat16 values as the integers of their bits.
    multiply = interpreter.InterpreterBuilder.create_dot

    def floats(handle):
        if handle.dtype.scalar.name != "bf16":
            return handle
        return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    interpreter.InterpreterBuilder.create_dot = lambda self, a, b, *rest: multiply(self, floats(a), floats(b), *rest)

    # Tiles are so small that small tensors have several, complete and partial, in several programs.
    import sys

    from bnkern.backends.triton import common

    modules = {name: sys.modules[f"bnkern.backends.triton.{name}"] for name in ("merge", "grad_sums", "records")}
    common.GROUP_BYTES, common.PROGRAMS = 256, 6
    for module in modules.values():
        module.PARTS, module.CHANNELS = 2, 4


@cache
def _process() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, get_context("spawn"), _set_up)


def interpreted(check: Callable, *args: object) -> None:
    """Runs ``check(*args)`` in that process, and raises its exception here. Both must be importable and picklable."""
    _process().submit(check, *args).result()
