"""The arguments of batch norm's forward and backward, and of the update of a training step.

Each is defined once, in the order that all code uses. The public functions construct a call of batch norm. The
operator's schema is generated from its fields. The reference and every backend take a call as their argument, and
``csrc/call`` reads the same fields by position. A new argument is a new field here.
"""

from typing import NamedTuple

from torch import Tensor


class ForwardCall(NamedTuple):
    """One forward: ``y = act(weight * (x - mean) * invstd + bias + residual)`` per channel.

    In training the statistics are those of the batch, and the running statistics and the counter are updated in place.
    Otherwise they are the running statistics. Without running statistics x is not normalised (the identity).
    """

    x: Tensor  # [N, C, ...]
    weight: Tensor | None = None  # [C], as all vectors; of x's dtype, or float32 for bfloat16 and float16
    bias: Tensor | None = None
    residual: Tensor | None = None  # of x's shape and dtype
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    num_batches_tracked: Tensor | None = None  # int64 scalar, incremented in training
    training: bool = True
    momentum: float | None = 0.1  # None: the cumulative mean, 1 / num_batches_tracked
    eps: float = 1e-5
    act: str | None = None  # a name of activations.ACTIVATIONS
    save_mask: bool = False  # return the activation's mask; there is none without a residual
    record: Tensor | None = None  # float64 [9, C]; the same pass writes the rows records.ACTIVATION
    # int64 scalar. If it is given, a batch whose statistics are not all finite increments it in training, and changes
    # neither the running statistics nor num_batches_tracked.
    num_batches_skipped: Tensor | None = None
    # [N * S] in the order n, s, contiguous and of the accumulator's dtype. The weights of the values in the statistics
    # of a batch. Only in training, and without a record.
    sample_weight: Tensor | None = None

    @property
    def normalizes(self) -> bool:
        """Whether there are statistics. Without them normalisation is the identity."""
        return self.training or self.running_mean is not None

    @property
    def has_mask(self) -> bool:
        """Whether the forward returns a mask. Without a residual the backward recomputes the sign of z from x."""
        return self.save_mask and self.act is not None and self.residual is not None


class BackwardCall(NamedTuple):
    """The backward of a :class:`ForwardCall`: those gradients of x, weight, bias and residual that ``needs`` requests.

    mean [C], invstd [C] and mask are results of the forward.
    """

    dy: Tensor  # of x's shape and dtype
    x: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None
    mean: Tensor | None = None  # mean and invstd are None for the identity
    invstd: Tensor | None = None
    mask: Tensor | None = None  # if it is None and there is an activation, it is recomputed from x
    act: str | None = None
    training: bool = True
    needs: tuple[bool, bool, bool, bool] = (True, True, True, True)
    record_gradient: Tensor | None = None  # float64 [8, C], filled with records.GRADIENT if dx is needed
    record_affine: Tensor | None = None  # float64 [8, C], filled with records.AFFINE unless this is the identity
    record_samples: Tensor | None = None  # float64 [5, C], filled with records.SAMPLES unless this is the identity
    sample_weight: Tensor | None = None  # that of the forward

    @property
    def needs_sums(self) -> bool:
        """Whether the per-channel sums are needed: for parameters, for dx in training, or for a record of them."""
        need_x, need_weight, need_bias, _ = self.needs
        recorded = self.mean is not None and not (self.record_affine is None and self.record_samples is None)
        return need_weight or need_bias or (need_x and self.training) or recorded


class UpdateCall(NamedTuple):
    """One step of SGD for all parameters of a network, which are views of one flat tensor.

    With the gradient g of a parameter p, and its velocity v:

        before = p,  v = momentum * v + (g + weight_decay * p),  p = p - lr * v,  shadow = p rounded to bfloat16

    The kernels compute fma(weight_decay, p, g), round momentum * v before the addition, and compute fma(-lr, v, p).
    """

    parameters: list[Tensor]  # dense views of ``values`` by rising address, each from a multiple of 64 values on
    gradients: list[Tensor]  # shaped and strided as the parameters; bfloat16 where there is a shadow, else as values
    values: Tensor  # [P], float32 or float64; P is a multiple of 64. Values between the parameters are undefined
    before: Tensor  # [P] of the same dtype, as all flat tensors; written
    velocity: Tensor | None  # [P], updated; None if there is no momentum, and then v = g + weight_decay * p
    shadow: Tensor | None  # bfloat16 [S], written: the first S of ``values``, which are whole parameters
    lr: Tensor  # float32 scalar on the device, as stop
    stop: Tensor  # if it is not 0, nothing is written
    momentum: float
    weight_decay: float


Forward = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]  # y, mean, invstd, mask
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]  # dx, dweight, dbias, dresidual
Sums = tuple[Tensor, Tensor, int]  # sum g [C], sum g * xhat [C], and the number of summands per channel
