"""The records that kernels compute beside their results, in the same pass over memory: the names of their rows.

A record is a float64 tensor [rows, C] that the caller provides and a kernel fills. float64 holds every count exactly.
Kernels record values as they are stored, after rounding. So a computation from the stored tensors gives the same
counts, and the same sums to within rounding. The formulas are :func:`activation`, :func:`gradient`, :func:`affine`
and :func:`samples` of ``reference``.
"""

from typing import NamedTuple

from torch import Tensor

# For a norm layer's input x: count, mean, sums of powers 2 to 4 of x - mean, least and largest value without NaN, the
# number of values that are infinite or NaN. For its output y: the number of values above zero.
ACTIVATION = ("count", "mean", "m2", "m3", "m4", "min", "max", "nonfinite", "active")

# For dx, the gradient at a norm layer's input (the convolution's output).
GRADIENT = ("count", "sum", "abs_sum", "square_sum", "positive", "negative", "zero", "nonfinite")

# For the summands of the affine parameters' gradients, which are g for the bias and g * xhat for the weight.
AFFINE = (
    "bias_sum",
    "bias_abs_sum",
    "bias_sign_sum",
    "bias_nonzero",
    "weight_sum",
    "weight_abs_sum",
    "weight_sign_sum",
    "weight_nonzero",
)

# For the contributions of the samples to the gradients of the affine parameters. The contribution of sample n is
# sum g (bias) or sum g * xhat (weight) over its S positions. m2 is the sum over the samples of squared distances from
# their mean.
SAMPLES = ("samples", "bias_sum", "bias_m2", "weight_sum", "weight_m2")


def fill_empty_activation(record: Tensor) -> None:
    """Fills ``record``, a tensor [9, C], with the rows ``ACTIVATION`` of an empty batch."""
    record.zero_()
    record[ACTIVATION.index("min")], record[ACTIVATION.index("max")] = float("inf"), float("-inf")


class Records(NamedTuple):
    """The buffers of the records of one call of a norm layer: float64 [rows, C], or None for a record not requested.

    ``mirrors`` are further buffers for the same numbers, if several recordings include the layer.
    """

    activation: Tensor | None = None
    gradient: Tensor | None = None
    affine: Tensor | None = None
    samples: Tensor | None = None
    mirrors: tuple["Records", ...] = ()

    def forward_written(self) -> None:
        """Called when a forward has filled ``activation``."""
        for mirror in self.mirrors:
            if mirror.activation is not None and self.activation is not None:
                mirror.activation.copy_(self.activation)

    def backward_written(self) -> None:
        """Called when a backward has filled ``gradient``, ``affine`` and ``samples``."""
        for mirror in self.mirrors:
            for copy, filled in zip(mirror[1:4], self[1:4], strict=True):
                if isinstance(copy, Tensor) and isinstance(filled, Tensor):
                    copy.copy_(filled)
