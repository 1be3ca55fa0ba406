"""The kernel of ``conv_norm_forward`` on the host, by its own function in csrc/cuda/kernels.h."""

import ctypes
from ctypes import POINTER, Structure, c_bool, c_char_p, c_int, c_int64, c_longlong, c_void_p
from typing import NamedTuple

import torch
from torch import Tensor

from bnkern.backends.calls import ForwardCall
from bnkern.backends.layout import layout
from tests.backends.cuda_on_cpu.native import (
    DTYPES,
    CudaDevice,
    CudaWorkspace,
    Device,
    Forward,
    Shape,
    View,
    WorkspaceSize,
    address,
    kernels,
    vector,
    view,
)

# A block with all the shared memory of an H200. The kernel reads no other property.
LARGE = Device(shared_bytes=227 << 10)


class CudaConvNorm(Structure):
    _fields_ = [
        *[(name, Forward) for name in ("input", "output")],
        ("weight", c_void_p),
        *[(name, c_int64) for name in ("weight_output", "weight_input", "weight_h", "weight_w", "h", "w")],
        ("device", CudaDevice),
        ("workspace", CudaWorkspace),
    ]


class Result(NamedTuple):
    y: Tensor | None
    mask: Tensor | None
    r: Tensor
    mean: Tensor
    invstd: Tensor
    running_mean: Tensor | None
    running_var: Tensor | None
    counter: Tensor | None


def images_like(x: Tensor) -> Tensor:
    return torch.full_like(x, torch.nan)


def conv_norm_forward(
    source: ForwardCall | Tensor,
    mean: Tensor | None,
    invstd: Tensor | None,
    keep: bool,
    weight: Tensor,
    norm: ForwardCall,
    *,
    device: Device = LARGE,
    seed: int = 0,
) -> Result:
    """The reference's function by the kernel, in the order of threads and blocks that ``seed`` determines.

    The workspace has exactly the requested size. It and the results are filled with noise, except for the signals.
    Running statistics and counter of ``norm`` are not changed, but returned as they are afterwards.
    """
    lib = kernels()
    assert lib.sizes(3) == ctypes.sizeof(CudaConvNorm), "CudaConvNorm is not as in kernels.h"
    lib.conv_norm_forward_within.restype, lib.conv_norm_forward_within.argtypes = c_char_p, [POINTER(CudaConvNorm)]
    normalizes = isinstance(source, ForwardCall)
    call = source if normalizes else ForwardCall(source)
    x = call.x
    shape, dtype = Shape(*layout(x)), DTYPES[x.dtype]
    y = images_like(x) if keep and normalizes else None
    mask = torch.full(layout(x).mask_shape, 255, dtype=torch.uint8) if normalizes and call.has_mask else None
    r = images_like(x)
    r_mean, r_invstd = (torch.full((x.shape[1],), torch.nan) for _ in range(2))
    state = [None if t is None else t.clone() for t in norm[4:7]]
    p = CudaConvNorm(
        Forward(
            shape,
            dtype,
            False,
            True,
            call.act is not None,
            *(view(t, True) for t in (x, call.residual, y)),
            address(mask),
            *map(vector, (call.weight, call.bias)),
            *map(address, (mean, invstd)),
        ),
        Forward(shape, dtype, True, True, 0, view(r, True), View(), View(), None),
        address(weight),
        *(weight.stride(axis) for axis in range(4)),
        *x.shape[2:],
        device.struct,
    )
    output = p.output
    output.mean, output.spread = address(r_mean), address(r_invstd)
    output.running_mean, output.running_var = map(vector, state[:2])
    output.counter, output.cumulative = address(state[2]), norm.momentum is None
    output.momentum, output.eps = norm.momentum or 0.0, norm.eps
    size = WorkspaceSize()
    lib.conv_norm_forward_workspace(ctypes.byref(p), ctypes.byref(size))
    signals = lib.signal_bytes(size.groups)
    generator = torch.Generator().manual_seed(seed)
    workspace = torch.randint(0, 256, (signals + size.bytes,), dtype=torch.uint8, generator=generator)
    workspace[:signals] = 0
    p.workspace = CudaWorkspace(workspace.data_ptr(), size)
    lib.configure(seed, 1 << 20)
    message = lib.conv_norm_forward_within(p).decode()
    if message:
        raise RuntimeError(message)
    assert not workspace[:signals].any(), "the kernel did not reset a signal"
    return Result(y, mask, r, r_mean, r_invstd, *state)


class BankConflicts(NamedTuple):
    """Loads of operands by 16 lanes, and the passes beyond one for each of them that bank conflicts cost."""

    loads: int
    further_passes: int


class counting_bank_conflicts:
    """Counts the bank conflicts of the launches within. ``result`` is a :class:`BankConflicts` afterwards."""

    result: BankConflicts

    def __enter__(self) -> "counting_bank_conflicts":
        self._lib = kernels()
        self._lib.count_bank_conflicts.argtypes = [c_bool]
        self._lib.bank_conflicts.restype, self._lib.bank_conflicts.argtypes = c_longlong, [c_int]
        self._lib.count_bank_conflicts(True)
        return self

    def __exit__(self, *error: object) -> None:
        self._lib.count_bank_conflicts(False)
        self.result = BankConflicts(*(self._lib.bank_conflicts(which) for which in range(2)))


def load_operands(stride: int) -> None:
    """Loads an operand of a product by one warp. Four lanes read 32 bytes of a row, and rows are ``stride`` apart."""
    load = kernels().fault_operands
    load.restype = c_char_p
    assert load(stride) == b""
