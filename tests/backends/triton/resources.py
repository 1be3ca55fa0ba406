"""What Triton compiles its kernels to: registers, spills, shared memory, loads. Needs no GPU.

resources.json holds [registers, bytes of shared memory, programs that a multiprocessor holds at once] by the version of
Triton, the architecture and the kernel. ``python -m tests.backends.triton.resources --write`` compiles all kernels and
replaces the entries of this version; without ``--write`` it prints them. fp32 and bf16 represent all dtypes.
"""

import json
import re
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from bnkern.backends import records
from bnkern.backends import triton as backend
from bnkern.backends.calls import BackwardCall, ForwardCall, UpdateCall
from bnkern.backends.triton import common
from bnkern.backends.triton.running import forward_with_skips
from tests.backends.triton.occupancy import WARP, resident_blocks

_launch = common.launch

TABLE = Path(__file__).with_name("resources.json")
ARCHITECTURES = (80, 90, 100)
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float64: "*fp64"} | {
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}

# A tensor for each way of addressing memory. Other sizes give the same kernels.
ADDRESSINGS = {
    "planes": ((2, 3, 32, 32), torch.contiguous_format),  # vectors, long lines
    "planes_short": ((64, 3, 8, 8), torch.contiguous_format),  # vectors, lines of 64
    "planes_tiny": ((64, 3, 4, 4), torch.contiguous_format),
    "planes_quads": ((4, 3, 14, 14), torch.contiguous_format),  # lines of whole quads
    "planes_odd": ((4, 3, 7, 7), torch.contiguous_format),  # element by element
    "rows_16": ((2, 16, 8, 8), torch.channels_last),
    "rows_32": ((2, 32, 8, 8), torch.channels_last),
    "rows_64": ((2, 64, 8, 8), torch.channels_last),
    "rows_odd": ((2, 17, 8, 8), torch.channels_last),  # element by element, flat if no channel is reduced
}


# The dtypes of activations and of vectors of size C.
DTYPES = {
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.float32),
    "fp16": (torch.float16, torch.float32),
    "fp64": (torch.float64, torch.float64),
    "pure_bf16": (torch.bfloat16, torch.bfloat16),
}
TABLED = ("fp32", "bf16")

# The convolutions: input and output channels, kernel, memory format.
CONVOLUTIONS = {
    "rows_16": (16, 16, 3, torch.channels_last),
    "rows_32": (32, 32, 3, torch.channels_last),  # the larger block
    "rows_stem": (3, 16, 3, torch.channels_last),  # x is read element by element
    "planes_16": (16, 16, 3, torch.contiguous_format),
    "planes_32": (32, 32, 3, torch.contiguous_format),
    "planes_1x1": (32, 32, 1, torch.contiguous_format),  # x is read by vectors
}
WANTED = {"sum": (True, False, False, False), "all": (True,) * 4}
CONV_DTYPES = ("fp32", "bf16", "fp16", "fp64")

# Whether the kernels record: in a training step, or without normalisation, where ``normalize`` also computes moments.
RECORDINGS = ("", "recorded", "recorded identity")
RECORDED_ADDRESSINGS = ("planes", "planes_odd", "rows_16", "rows_odd")  # in the table; the others are between them


class Variant(NamedTuple):
    """One instance to compile: a kernel, the types of its arguments, and its constants."""

    kernel: JITFunction
    signature: dict[str, str]
    constants: dict[str, object]

    @property
    def key(self) -> tuple:
        return (self.kernel.fn.__name__, *self.signature.items(), *self.constants.items())


class Usage(NamedTuple):
    registers: int
    spilled: int  # bytes of stack
    shared: int
    ptx: str
    ttgir: str  # Triton's intermediate representation, with the layout of each tensor
    resident: int  # programs that a multiprocessor holds at once

    @property
    def entry(self) -> list[int]:
        """The entry of the table."""
        return [self.registers, self.shared, self.resident]


def _variant(kernel: JITFunction, arguments: tuple, constants: dict) -> Variant:
    """The variant of a call, as triton's launcher would compile it.

    Only types count, because no kernel specialises on values.
    """
    remaining = iter(arguments)
    signature, fixed = {}, dict(constants)
    for p in kernel.params:
        value = None if p.is_constexpr else next(remaining)
        if value is None:
            signature[p.name] = "constexpr"
            fixed.setdefault(p.name, None)
        elif isinstance(value, torch.Tensor):
            signature[p.name] = POINTERS[value.dtype]
        else:
            signature[p.name] = p.annotation_type or ("i32" if abs(value) < 2**31 else "i64")
        assert p.is_constexpr or (p.do_not_specialize and p.do_not_specialize_on_alignment)
    return Variant(kernel, signature, {p.name: fixed[p.name] for p in kernel.params if p.name in fixed})


@contextmanager
def launches():
    """A list of the variants of all launches in the context. Nothing is launched."""
    variants = []

    def record(kernel, grid, device, *arguments, **constants) -> None:
        variants.append(_variant(kernel, arguments, constants))

    modules = [module for name, module in sys.modules.items() if name.startswith(f"{backend.__name__}.")]
    try:
        for module in modules:
            module.launch = record
        yield variants
    finally:
        for module in modules:
            module.launch = _launch


def variants(addressing: str, precision: str, fused: bool, recording: str = "") -> dict[str, Variant]:
    """The kernels of a training step by name: BN + add + ReLU with its mask if ``fused``, else BN + ReLU.

    With ``recording`` (one of RECORDINGS), only the kernels that then take a record or parts of one.
    """
    (shape, memory_format), (dtype, params) = ADDRESSINGS[addressing], DTYPES[precision]
    x = torch.empty(shape, dtype=dtype).contiguous(memory_format=memory_format)
    vector = torch.empty(shape[1], dtype=params)
    residual = x if fused else None
    training = recording != "recorded identity"
    running = (vector, vector, torch.tensor(1)) if training else (None, None, None)
    activation, gradient, affine, samples = (
        torch.empty(len(fields), shape[1], dtype=torch.float64) if recording else None
        for fields in (records.ACTIVATION, records.GRADIENT, records.AFFINE, records.SAMPLES)
    )
    with launches() as launched:
        y, mean, invstd, mask = backend.forward(
            ForwardCall(x, vector, vector, residual, *running, training, 0.1, 1e-5, "relu", True, record=activation)
        )
        if training:
            backend.backward(BackwardCall(
                y, x, vector, vector, mean, invstd, mask, "relu", True, (True, True, True, fused),
                record_gradient=gradient, record_affine=affine, record_samples=samples,
            ))  # fmt: skip
        if not recording:
            backend.moments(x)
            _augment(dtype)
            _update(dtype)
            _skip(dtype, params)
    recorded = {"parts_ptr", "row_ptr", "record_ptr"}
    return {
        variant.kernel.fn.__name__: variant
        for variant in launched
        if not recording
        or variant.kernel.fn.__name__ == "sample_sums_kernel"
        or any(variant.signature.get(name) == "*fp64" for name in recorded)
    }


def _augment(dtype: torch.dtype) -> None:
    """A batch of images: one kernel for each dtype."""
    images, vector = torch.empty(1, 3, 32, 32, dtype=torch.uint8), torch.empty(1, dtype=torch.int64)
    table = torch.empty(3, 256, dtype=dtype)
    backend.augment(images, vector, vector, vector, vector, table, images.to(dtype), vector, 1, 0, True)


def _update(dtype: torch.dtype) -> None:
    """The update of a network in this precision. With bfloat16 the parameters are float32, with a shadow."""
    values = torch.empty(64, dtype=torch.float64 if dtype is torch.float64 else torch.float32)
    shadow = values.bfloat16() if dtype is torch.bfloat16 else None
    scalar = torch.empty(())
    backend.update(UpdateCall([values], [values], values, values, values, shadow, scalar, scalar, 0.9, 1e-4))


def _skip(dtype: torch.dtype, params: torch.dtype) -> None:
    """The update of the running statistics by a batch that may be skipped."""
    x, vector, counter = torch.empty((2, 3, 4, 4), dtype=dtype), torch.empty(3, dtype=params), torch.tensor(0)
    call = ForwardCall(x, running_mean=vector, running_var=vector, num_batches_tracked=counter)
    forward_with_skips(lambda _: (x, None, None, None), call._replace(num_batches_skipped=counter))


def compile_for(variant: Variant, architecture: int) -> Usage:
    compiled = triton.compile(
        ASTSource(variant.kernel, variant.signature, variant.constants),
        target=GPUTarget("cuda", architecture, 32),
        options=common.OPTIONS,
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        text = subprocess.run([cuobjdump, "-res-usage", cubin.name], capture_output=True, text=True, check=True).stdout
    used = {name: int(n) for name, n in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    registers, shared = used["REG"], compiled.metadata.shared
    texts = (compiled.asm["ptx"], compiled.asm["ttgir"])
    resident = resident_blocks(architecture, compiled.metadata.num_warps * WARP, registers, shared)
    return Usage(registers, used["STACK"] + used["LOCAL"], shared, *texts, resident)


def entries_of(
    architecture: int, addressings: list[str], precisions: list[str], recordings: tuple[str, ...] = RECORDINGS
) -> dict[str, tuple[Variant, Usage]]:
    """The distinct variants, compiled, by a readable name: kernel, addressing, dtype, fusion, recording."""
    entries, recorded = {}, set()
    for addressing, precision, fused, recording in product(addressings, precisions, (False, True), recordings):
        for name, variant in variants(addressing, precision, fused, recording).items():
            if variant.key not in recorded:
                recorded.add(variant.key)
                description = f"{addressing} {precision}{' residual' if fused else ''}"
                if (
                    not {"ALIGN", "ROWS"} & variant.constants.keys()
                ):  # this kernel works only on vectors and partial results
                    description = " ".join(sorted({t for t in variant.signature.values() if t.startswith("*")}))
                entry = f"{name.removesuffix('_kernel')} {description} {recording}".rstrip()
                entries[entry] = (variant, compile_for(variant, architecture))
    return entries


def conv_variants(arguments: tuple, wanted: tuple[bool, ...]) -> list[Variant]:
    """The kernels that a call of conv_grad_signs launches."""
    with launches() as launched:
        backend.conv_grad_signs(*arguments, wanted)
    return launched


def conv_entries_of(architecture: int, precisions: list[str]) -> dict[str, tuple[Variant, Usage]]:
    """Like ``entries_of``, for the convolutions: kernel, dtype, addressing, the requested sums."""
    entries, recorded = {}, set()
    for (addressing, (inputs, outputs, kernel, memory_format)), precision in product(CONVOLUTIONS.items(), precisions):
        shapes = (8, inputs, 32, 32), (8, outputs, 32, 32)
        x, dy = (torch.empty(s, dtype=DTYPES[precision][0]).contiguous(memory_format=memory_format) for s in shapes)
        for description, wanted in WANTED.items():
            for variant in conv_variants((x, dy, (kernel, kernel), (1, 1), (kernel // 2, kernel // 2)), wanted):
                if variant.key not in recorded:
                    recorded.add(variant.key)
                    entry = f"conv_grad_signs {precision} {addressing} {description}"
                    if "ROWS" not in variant.constants:  # this kernel works only on partial results
                        entry = f"conv_fold {'fp64' if precision == 'fp64' else 'fp32'} {description}"
                    entries[entry] = (variant, compile_for(variant, architecture))
    return entries


def table_entries(architecture: int) -> dict[str, tuple[Variant, Usage]]:
    """All entries of the committed table."""
    plain = entries_of(architecture, list(ADDRESSINGS), list(TABLED), RECORDINGS[:1])
    recorded = entries_of(architecture, list(RECORDED_ADDRESSINGS), list(TABLED), RECORDINGS[1:])
    return plain | recorded | conv_entries_of(architecture, list(TABLED))


def main() -> None:
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    table[triton.__version__] = {
        f"sm_{architecture}": {name: usage.entry for name, (_, usage) in table_entries(architecture).items()}
        for architecture in ARCHITECTURES
    }
    text = json.dumps(dict(sorted(table.items())), indent=1)
    text = re.sub(r"\[\s+(\d+),\s+(\d+),\s+(\d+)\s+\]", r"[\1, \2, \3]", text)  # one kernel per line
    if "--write" in sys.argv:
        TABLE.write_text(text + "\n")
    else:
        print(text)


if __name__ == "__main__":
    main()
