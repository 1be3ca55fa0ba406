"""The functions of the compiled module (csrc/bind.cpp, csrc/call), for type checkers.

Functions with C's calling convention take their arguments by position. Those of csrc/call with an optional result
return None if the kernels cannot read the operands. In this case nothing was written.
"""

from collections.abc import Sequence
from types import ModuleType
from typing import TypedDict

from torch import Tensor

from .backends.calls import BackwardCall, Forward, ForwardCall, Gradients
from .backends.protocol import ConvNormBackward, ConvNormForward

class BuildInfo(TypedDict):
    compiler: str
    isas: list[str]
    cuda: str | None
    cuda_archs: list[str]

# ---- csrc/bind.cpp

def build_info() -> BuildInfo: ...
def isa() -> str: ...
def view_layout(
    arg0: list[int] | tuple[int, ...], arg1: list[int] | tuple[int, ...], /
) -> tuple[bool, int, int, int, int, int, bool] | None: ...
def pool_idle() -> int: ...
def pool_limit() -> int: ...
def pool_clear() -> None: ...

# ---- csrc/call/batch_norm.cpp

def connect(module: ModuleType, /) -> bool: ...
def fields() -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]: ...
def forward(call: ForwardCall, validated: bool, /) -> Forward | None: ...
def moments(x: Tensor, /) -> tuple[Tensor, Tensor] | None: ...
def normalize(
    call: ForwardCall, mean: Tensor | None, invstd: Tensor | None, /
) -> tuple[Tensor, Tensor | None] | None: ...
def backward(call: BackwardCall, /) -> Gradients | None: ...
def grad_sums(call: BackwardCall, /) -> tuple[Tensor, Tensor] | None: ...
def grad_input(
    call: BackwardCall, sum_dy: Tensor | None, sum_dy_xhat: Tensor | None, /
) -> tuple[Tensor | None, Tensor | None] | None: ...

# ---- csrc/call/convolution.cpp

def conv3x3(x: Tensor, weight: Tensor, flipped: bool, /) -> Tensor: ...
def conv_direct(
    x: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int], size: tuple[int, int] | None, /
) -> Tensor: ...
def conv_grad_signs(
    x: Tensor,
    dy: Tensor,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    wanted: tuple[bool, bool, bool, bool],
    winograd: bool,
    /,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None] | None: ...
def conv_norm_forward(
    source: ForwardCall | Tensor,
    mean: Tensor | None,
    invstd: Tensor | None,
    keep: bool,
    weight: Tensor,
    bias: Tensor | None,
    norm: ForwardCall,
    /,
) -> ConvNormForward: ...
def conv_norm_refusal(x: Tensor, /) -> str | None: ...
def conv_norm_backward(
    behind: BackwardCall,
    sums: Tensor,
    weight: Tensor,
    before: BackwardCall | None,
    y: Tensor | None,
    shortcut: Tensor | None,
    needs: tuple[bool, bool],
    /,
) -> ConvNormBackward: ...
def grad_before_act(call: BackwardCall, /) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]: ...
def augment(
    images: Tensor,
    labels: Tensor,
    chosen: Tensor,
    table: Tensor,
    out: Tensor,
    labels_out: Tensor,
    random: bool,
    seed: int,
    epoch: int,
    /,
) -> None: ...

# ---- csrc/call/update.cpp

def update(
    parameters: list[Tensor],
    gradients: list[Tensor],
    values: Tensor,
    before: Tensor,
    velocity: Tensor | None,
    shadow: Tensor | None,
    lr: Tensor,
    stop: Tensor,
    momentum: float,
    weight_decay: float,
    /,
) -> None: ...

# ---- csrc/bind.cpp, only in builds with CUDA

def cuda_device(
    index: int,
    *,
    multiprocessors: int,
    shared_bytes: int,
    threads: int,
    clusters: Sequence[int],
    single_read_from: int,
) -> None: ...
def cuda_clusters(index: int, shared_bytes: int) -> list[int]: ...
def cuda_merge(
    dtype: int,
    count: int,
    mean: int,
    m2: int,
    merged_count: int,
    merged_mean: int,
    merged_m2: int,
    rows: int,
    channels: int,
    stream: int,
    /,
) -> None: ...
def cuda_workspace(stream: int, /) -> list[int]: ...
