"""Valid and invalid arguments of ``batch_norm``."""

from collections.abc import Iterator

import torch

from tests.support.cases import CASE, LAYOUTS, Precision


def good_arguments(precision: Precision, layout: str, training: bool) -> dict[str, object]:
    """Valid arguments, with every argument given."""
    p = CASE["nchw_tail"].problem(precision)
    return {
        "input": LAYOUTS[layout](p.x),
        "running_mean": p.mean.to(p.weight.dtype),
        "running_var": (p.invstd**-2).to(p.weight.dtype),
        "weight": p.weight,
        "bias": p.bias,
        "training": training,
        "momentum": 0.1,
        "eps": 1e-5,
        "residual": LAYOUTS[layout](p.residual),
        "act": "relu",
        "num_batches_tracked": torch.tensor(0),
    }


def bad_arguments(good: dict[str, object]) -> Iterator[tuple[str, object, type[Exception]]]:
    """Yields (argument, invalid value, error)."""
    x, vector = good["input"], good["weight"]
    for name in ("input", "residual", *(vectors := ("running_mean", "running_var", "weight", "bias"))):
        tensor = good[name]
        for wrong in (1.0, [1.0], "tensor", object(), tensor.tolist(), *([None] if name == "input" else [])):
            yield name, wrong, TypeError
        for dtype in (torch.int64, torch.int32, torch.bool, torch.uint8, torch.complex64):
            yield name, tensor.to(dtype), TypeError
        yield name, tensor.float().to_sparse(), TypeError
    wrong_dtype = torch.float64 if x.dtype != torch.float64 else torch.float32
    another_half = torch.float16 if x.dtype == torch.bfloat16 else torch.bfloat16
    for dtype in (wrong_dtype, another_half):
        for name in ("residual", *vectors):
            yield name, good[name].to(dtype), TypeError
    yield "input", x.flatten(), ValueError
    yield "input", x.flatten()[0], ValueError
    yield "residual", x[:1], ValueError  # would broadcast
    yield "residual", x[:, :, :1, :1], ValueError
    yield "residual", x[0], ValueError
    yield "residual", x[0, 0, 0, 0], ValueError
    yield "residual", x.transpose(2, 3), ValueError
    yield "residual", x.flatten(2), ValueError
    yield "residual", x.to("meta"), ValueError
    for name in vectors:
        for wrong in (vector[:-1], vector[:1], vector[0], vector[:0], vector.repeat(2), vector[None], vector[:, None]):
            yield name, wrong, ValueError
        yield name, vector.to("meta"), ValueError
    for name in ("running_mean", "running_var"):
        yield name, vector.repeat_interleave(2)[::2], ValueError  # updated in place, so it must be contiguous
        yield name, vector[:1].expand(vector.shape), ValueError
        yield name, None, ValueError  # either both are given or neither
    for wrong in (-1e-5, -1.0, float("nan"), float("-inf"), *((0, 0.0, -0.0) if good["training"] else ())):
        yield "eps", wrong, ValueError
    for wrong in (None, "1e-5", [1e-5], 1j, True, torch.tensor(1e-5)):
        yield "eps", wrong, TypeError
    for wrong in ("0.1", [0.1], 1j, False, torch.tensor(0.1)):
        yield "momentum", wrong, TypeError
    for wrong in ("gelu", "ReLU", "", True, 1, torch.relu, torch.nn.ReLU()):
        yield "act", wrong, ValueError
    for wrong in (None, 1, 0.0, "yes", [True], torch.tensor(True)):
        yield "training", wrong, TypeError
    for wrong in (1, 1.0, torch.tensor(1.0), torch.tensor(1, dtype=torch.int32), torch.ones(2, dtype=torch.int64)):
        yield "num_batches_tracked", wrong, TypeError
    yield "num_batches_tracked", torch.tensor(1, device="meta"), ValueError
