"""Bytes that must move between memory and the processor, by formula. Per-channel vectors are not counted.

``op`` is "bn" (batch norm alone) or "bn_add_relu" (with residual, ReLU and its saved mask). An element of
the input has s bytes, and its bit of the mask is 1/8 byte:

    call         reads                  writes                  bn    bn_add_relu
    moments      x                      -                       s     s
    normalize    x, residual            y, mask                 2s    3s + 1/8
    grad_sums    dy, x, mask            -                       2s    2s + 1/8
    grad_input   dy, x, mask            dx, dresidual           3s    4s + 1/8
    forward      x, residual            y, mask                 2s    3s + 1/8
    backward     dy, x, mask            dx, dresidual           3s    4s + 1/8

The last two lines are the minimum: every tensor is read once. If a tensor does not stay in the caches between two
phases, each phase reads it again. Forward then moves the bytes of moments and normalize, and backward those of
grad_sums and grad_input.
"""

OPS = ("bn", "bn_add_relu")
COPY_BYTES = 256 << 20  # of the copy beside each phase
PHASED = {"forward": ("moments", "normalize"), "backward": ("grad_sums", "grad_input")}
# passes over a tensor of the input's size, and over the mask, for each op
_PASSES = {
    "moments": {"bn": (1, 0), "bn_add_relu": (1, 0)},
    "normalize": {"bn": (2, 0), "bn_add_relu": (3, 1)},
    "grad_sums": {"bn": (2, 0), "bn_add_relu": (2, 1)},
    "grad_input": {"bn": (3, 0), "bn_add_relu": (4, 1)},
    "forward": {"bn": (2, 0), "bn_add_relu": (3, 1)},
    "backward": {"bn": (3, 0), "bn_add_relu": (4, 1)},
}


def minimal_bytes(call: str, op: str, elements: int, itemsize: int) -> int:
    """The least number of bytes that a phase or a whole pass moves."""
    tensors, masks = _PASSES[call][op]
    return tensors * elements * itemsize + masks * elements // 8


def phased_bytes(call: str, op: str, elements: int, itemsize: int) -> int:
    """Bytes that a phase moves, or a whole pass whose phases each read from memory."""
    return sum(minimal_bytes(phase, op, elements, itemsize) for phase in PHASED.get(call, (call,)))


def moved(calls: tuple[str, ...], op: str, elements: int, itemsize: int) -> dict[str, int]:
    """The sums over several calls: "bytes", the minimum, and "phased_bytes"."""
    return {
        "bytes": sum(minimal_bytes(call, op, elements, itemsize) for call in calls),
        "phased_bytes": sum(phased_bytes(call, op, elements, itemsize) for call in calls),
    }
