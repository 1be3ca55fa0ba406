"""What the kernels record beside their results, in the same pass over memory: the rows of each record, by name.

A record is a float64 tensor [rows, C] that the caller provides and a kernel fills; float64 holds every count exactly.
Kernels see values as stored, after rounding, so that a slow reading of the tensors agrees: exactly in counts, to
rounding in sums. The formulas are :func:`activation`, :func:`gradient` and :func:`affine` of ``reference``.
"""

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


def activation_of_nothing(record) -> None:
    """Fills ``record``, a tensor [8, C], with the rows ``ACTIVATION`` of an empty batch."""
    record.zero_()
    record[ACTIVATION.index("min")], record[ACTIVATION.index("max")] = float("inf"), float("-inf")
