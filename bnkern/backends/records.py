"""What the kernels record beside their results, in the same pass over memory: the rows of each record, by name.

A record is a float64 tensor [rows, C] that the caller provides and a kernel fills; float64 holds every count exactly.
Kernels see values as stored, after rounding, so that a slow reading of the tensors agrees: exactly in counts, to
rounding in sums. The formulas are :func:`activation`, :func:`gradient` and :func:`affine` of ``reference``.
"""

from typing import NamedTuple

from torch import Tensor

# Of a norm layer's input x: count, mean, sums of powers 2 to 4 of x - mean, least and largest value that is not NaN;
# of its output y: how many are above zero.
ACTIVATION = ("count", "mean", "m2", "m3", "m4", "min", "max", "active")

# Of dx, the gradient at a norm layer's input (the convolution's output).
GRADIENT = ("count", "sum", "abs_sum", "square_sum", "positive", "negative", "zero")

# Of the summands of the affine parameters' gradients: g for the bias, g * xhat for the weight.
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


def fill_empty_activation(record: Tensor) -> None:
    """Fills ``record``, a tensor [8, C], with the rows ``ACTIVATION`` of an empty batch."""
    record.zero_()
    record[ACTIVATION.index("min")], record[ACTIVATION.index("max")] = float("inf"), float("-inf")


class Records(NamedTuple):
    """Where one call of a norm layer records (``bnkern.backends.records``): float64 [rows, C], None where not wanted.

    ``mirrors`` are further places for the same numbers, where several recordings watch one layer.
    """

    activation: Tensor | None = None
    gradient: Tensor | None = None
    affine: Tensor | None = None
    mirrors: tuple["Records", ...] = ()

    def forward_written(self) -> None:
        """Called when a forward has filled ``activation``."""
        for mirror in self.mirrors:
            if mirror.activation is not None and self.activation is not None:
                mirror.activation.copy_(self.activation)

    def backward_written(self) -> None:
        """Called when a backward has filled ``gradient`` and ``affine``."""
        for mirror in self.mirrors:
            if mirror.gradient is not None and self.gradient is not None:
                mirror.gradient.copy_(self.gradient)
            if mirror.affine is not None and self.affine is not None:
                mirror.affine.copy_(self.affine)
