"""All results of a forward and a backward, on tensors that several threads share."""

import torch
from torch import Tensor

from bnkern import backends
from bnkern.backends.calls import BackwardCall, ForwardCall
from bnkern.backends.records import ACTIVATION, AFFINE, GRADIENT
from tests.support.cases import EPS, Case, Precision, Target
from tests.support.record_cases import Call, empty_record

# Tensors that are large enough for several threads, one for each way to share the work.
LARGE = [
    Case("channels_for_all", (8, 16, 32, 33), "planes: whole channels per thread"),
    Case("odd_channels", (8, 5, 64, 65), "planes: the channels cannot be shared evenly"),
    Case("one_channel", (16, 1, 64, 65), "planes: one channel, shared along N"),
    Case("one_long_plane", (1, 1, 300, 301), "one plane, shared along S"),
    Case("short_planes", (2000, 7, 7), "many planes in a tile"),
    Case("nc_tall", (20000, 5), "N x C, narrow", "contiguous"),
    Case("rows_16", (32, 16, 16, 16), "channels_last, whole vectors", "channels_last"),
    Case("rows_17", (32, 17, 16, 17), "channels_last, odd C and a tail", "channels_last"),
    Case("rows_wide", (30, 700, 5, 5), "channels_last, several groups of channels", "channels_last"),
    Case("rows_strided", (32, 32, 10, 17), "rows with gaps", "sliced_channels_last"),
]


def all_results(target: Target, case: Case, precision: Precision) -> list[Tensor]:
    """All results of a forward and a backward, with and without the saved mask, and the records."""
    p = case.problem(precision, target.device)
    kernels = backends.choose(target.backend, target.device, p.x.dtype)
    results = [*kernels.moments(p.x)[1:]]
    for residual in (None, p.residual):
        running = [torch.zeros_like(p.weight), torch.ones_like(p.weight)]
        y, *saved = kernels.forward(
            ForwardCall(p.x, p.weight, p.bias, residual, *running, None, True, 0.1, EPS, "relu", True)
        )
        needs = (True, True, True, residual is not None)
        grads = kernels.backward(BackwardCall(p.dy, p.x, p.weight, p.bias, *saved, "relu", True, needs))
        results += [t for t in (y, *saved, *running, *grads) if t is not None]
    call = Call("training", "relu")
    activation, gradient, affine = (empty_record(rows, p.x) for rows in (ACTIVATION, GRADIENT, AFFINE))
    _, *saved = call.forward(kernels, p, activation)[:4]
    call.backward(kernels, p, saved, call.needs(p), record_gradient=gradient, record_affine=affine)
    unnormalised = empty_record(ACTIVATION, p.x)
    Call("identity", None).forward(kernels, p, unnormalised)
    return [*results, activation, gradient, affine, unnormalised]
