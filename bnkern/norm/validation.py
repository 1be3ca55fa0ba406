"""The checks of the arguments of batch norm, and their error messages."""

import torch
from torch import Tensor

from .. import backends
from ..backends import activations
from ..backends.calls import ForwardCall


def check_tensors(name: str, x: Tensor, residual: Tensor | None = None, act: str | None = None) -> None:
    """Checks input, residual and activation of the function ``name``."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: input must be a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in backends.DTYPES:
        raise TypeError(f"{name}: input must be float32, bfloat16, float16 or float64, got {x.dtype}")
    if x.layout is not torch.strided:
        raise TypeError(f"{name}: input must be a strided (dense) tensor, got {x.layout}")
    if x.dim() < 2:
        raise ValueError(f"{name}: input must be [N, C, ...] with at least 2 dimensions, got shape {list(x.shape)}")
    activations.check(name, act)
    if residual is None:
        return
    if not isinstance(residual, Tensor):
        raise TypeError(f"{name}: residual must be a torch.Tensor or None, got {type(residual).__name__}")
    if residual.layout is not torch.strided:
        raise TypeError(f"{name}: residual must be a strided (dense) tensor, got {residual.layout}")
    if residual.shape != x.shape:
        raise ValueError(
            f"{name}: residual must have the shape of input, {list(x.shape)}, got {list(residual.shape)}; "
            "it is not broadcast"
        )
    if residual.dtype != x.dtype:
        raise TypeError(f"{name}: residual must have the dtype of input, {x.dtype}, got {residual.dtype}")
    if residual.device != x.device:
        raise ValueError(f"{name}: residual must be on the device of input, {x.device}, got {residual.device}")


def check_call(name: str, call: ForwardCall, *, joint: bool = False) -> None:
    """Checks all arguments of a batch norm.

    ``joint``: the statistics include the values of other ranks, so one value per channel is enough on this rank.
    """
    x, weight, bias, residual, running_mean, running_var, counter, training, momentum, eps, act, *_ = call
    check_tensors(name, x, residual, act)
    if not isinstance(training, bool):
        raise TypeError(f"{name}: training must be True or False, got {training!r}")
    if (running_mean is None) != (running_var is None):
        missing, given = ("running_mean", "running_var") if running_mean is None else ("running_var", "running_mean")
        raise ValueError(f"{name}: {missing} must be given, because {given} is given; pass both or neither")
    if not training and running_mean is None:
        raise ValueError(f"{name}: running_mean and running_var must be given when training=False")
    if not isinstance(eps, (float, int)) or isinstance(eps, bool):
        raise TypeError(f"{name}: eps must be a number, got {type(eps).__name__}")
    if training and not eps > 0:
        raise ValueError(f"{name}: eps must be positive during training, got {eps}")
    if not eps >= 0:
        raise ValueError(f"{name}: eps must not be negative, got {eps}")
    if momentum is not None and (not isinstance(momentum, (float, int)) or isinstance(momentum, bool)):
        raise TypeError(f"{name}: momentum must be a number or None, got {type(momentum).__name__}")
    running = {"running_mean": running_mean, "running_var": running_var}
    for argument, vector in (running | {"weight": weight, "bias": bias}).items():
        if vector is not None:
            _check_vector(f"{name}: {argument}", vector, x)
    for argument, vector in running.items():
        if vector is not None and not vector.is_contiguous():
            raise ValueError(f"{name}: {argument} must be contiguous, because it is updated in place")
    for argument, scalar in (("num_batches_tracked", counter), ("num_batches_skipped", call.num_batches_skipped)):
        if scalar is None:
            continue
        if not isinstance(scalar, Tensor) or scalar.dtype is not torch.int64 or scalar.numel() != 1:
            raise TypeError(f"{name}: {argument} must be an int64 tensor of one element or None")
        if scalar.device != x.device:
            raise ValueError(f"{name}: {argument} must be on the device of input, {x.device}, got {scalar.device}")
    if call.sample_weight is not None:
        _check_weights(f"{name}: sample_weight", call.sample_weight, x)
    if counter is None and training and momentum is None and running_mean is not None:
        raise ValueError(f"{name}: num_batches_tracked must be given when momentum is None (cumulative mean)")
    if training and not joint and x.shape[0] * x.shape[2:].numel() == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {list(x.shape)}")


def _check_weights(name: str, weights: Tensor, x: Tensor) -> None:
    if not isinstance(weights, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor or None, got {type(weights).__name__}")
    if weights.layout is not torch.strided:
        raise TypeError(f"{name} must be a strided (dense) tensor, got {weights.layout}")
    shapes = [[x.shape[0]], [x.shape[0], *x.shape[2:]]]
    if list(weights.shape) not in shapes:
        expected = " or ".join(str(shape) for shape in shapes[: 1 if x.dim() == 2 else 2])
        raise ValueError(f"{name} must have one weight per sample or position, {expected}, got {list(weights.shape)}")
    if weights.device != x.device:
        raise ValueError(f"{name} must be on the device of input, {x.device}, got {weights.device}")
    dtype = torch.float64 if x.dtype is torch.float64 else torch.float32
    if weights.dtype is not dtype:
        raise TypeError(f"{name} must be {dtype} for {x.dtype} input, got {weights.dtype}")


def _check_vector(name: str, vector: Tensor, x: Tensor) -> None:
    if not isinstance(vector, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor or None, got {type(vector).__name__}")
    if vector.layout is not torch.strided:
        raise TypeError(f"{name} must be a strided (dense) tensor, got {vector.layout}")
    if vector.dim() != 1 or vector.shape[0] != x.shape[1]:
        raise ValueError(
            f"{name} must have one element per channel of input, shape [{x.shape[1]}], got {list(vector.shape)}"
        )
    if vector.device != x.device:
        raise ValueError(f"{name} must be on the device of input, {x.device}, got {vector.device}")
    if vector.dtype != x.dtype and (vector.dtype is not torch.float32 or x.dtype is torch.float64):
        expected = f"{x.dtype}" if x.dtype in (torch.float32, torch.float64) else f"torch.float32 or {x.dtype}"
        raise TypeError(f"{name} must be {expected} for {x.dtype} input, got {vector.dtype}")
