"""The table of quantities that can be recorded in a network, each with formula, unit, source and a slow oracle.

A quantity defines which modules it can record (:meth:`Quantity.refuses`), how it is attached to them
(:meth:`Quantity.attach`), how records of several ranks become one (:meth:`Quantity.merge`), and which arrays a reader
gets (:meth:`Quantity.derive`). ``rows`` names the recorded rows. The oracle computes the same arrays with plain tensor
operations from tensors that autograd provides, and the tests compare the two. docs/adding_a_probe.md explains how to
add a quantity.

"The paper" is Bjorck, Gomes, Selman and Weinberger, "Understanding Batch Normalization", 2018. Gradients are those of
the loss on which backward was called. If it is a mean over the batch, a summand contains the factor 1 / B.
"""

import importlib
import pkgutil
from typing import Any

from .base import QUANTITIES, Quantity

for _module in pkgutil.iter_modules(__path__):  # every file in this folder adds its quantities to the table
    importlib.import_module(f"{__name__}.{_module.name}")


def make(what: str | Quantity, **options: Any) -> Quantity:
    """Returns a quantity of the table by name, with options, or the given Quantity itself."""
    if isinstance(what, Quantity):
        return what
    if what not in QUANTITIES:
        raise ValueError(f"no quantity is called {what!r}; there are {', '.join(sorted(QUANTITIES))}")
    return QUANTITIES[what](**options)
