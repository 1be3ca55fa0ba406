"""Runs a check in another process, whose Triton interprets its kernels on the CPU.

TRITON_INTERPRET is read when triton is imported and turns all its kernels, so the tests' own process, where other
tests compile kernels or look at what refuses to run on a CPU, keeps it off.
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
    np.seterr(all="ignore")  # NaN, Inf and idle lanes are meant
    # Checking each integer operation for overflow doubles the time, and small shapes do not overflow.
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    # GPUs round to bfloat16 to nearest; the interpreter cuts off.
    convert = interpreter._convert_float

    def converted(values, source, target, rounding):
        if (source.name, target.name) != ("fp32", "bf16"):
            return convert(values, source, target, rounding)
        rounded = torch.from_numpy(np.array(values)).bfloat16()
        return rounded.view(torch.uint16).numpy().reshape(values.shape)

    interpreter._convert_float = converted
    # Products of bfloat16 are those of the bits as integers there.
    multiply = interpreter.InterpreterBuilder.create_dot

    def floats(handle):
        if handle.dtype.scalar.name != "bf16":
            return handle
        return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    interpreter.InterpreterBuilder.create_dot = lambda self, a, b, *rest: multiply(self, floats(a), floats(b), *rest)

    # Tiles so small that little tensors have several, whole and ragged, in several programs.
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
    """``check(*args)`` there; its exception, if any, is raised here. Both must be importable and picklable."""
    _process().submit(check, *args).result()
