"""Results that must not depend on the number of threads."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

Results = TypeVar("Results", Tensor, tuple[Tensor | None, ...])


def for_any_number_of_threads(kernel: Callable[[], Results]) -> Results:
    """The results of a kernel, which must have the same bits for one, two, three and torch's number of threads."""
    results, threads = [], torch.get_num_threads()
    for count in (1, 2, 3, threads):
        torch.set_num_threads(count)
        try:
            results.append(kernel())
        finally:
            torch.set_num_threads(threads)
    first, *others = ((result,) if isinstance(result, Tensor) else result for result in results)
    for other in others:
        assert all(equal(a, b) for a, b in zip(first, other, strict=True))
    return results[0]


def equal(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two tensors have the same values, where a NaN equals a NaN, or both are None."""
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
