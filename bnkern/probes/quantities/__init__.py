"""What can be recorded inside a network: the table of quantities, each with formula, unit, source and slow oracle.

A quantity says which modules it serves (:meth:`Quantity.refuses`), how it listens to them (:meth:`Quantity.attach`),
how records of several ranks become one (:meth:`Quantity.merge`), and what a reader gets (:meth:`Quantity.derive`).
``rows`` names what is recorded. The oracle of each computes the same by plain tensor operations from the tensors that
autograd shows; the tests hold the two together. docs/adding_a_probe.md adds one.

"The paper" is Bjorck, Gomes, Selman and Weinberger, "Understanding Batch Normalization", 2018. Gradients are those of
the loss that backward was called on: with a mean over the batch, a summand carries its 1 / B.
"""

import importlib
import pkgutil
from typing import Any

from .base import QUANTITIES, Quantity

for _module in pkgutil.iter_modules(__path__):  # a file put here is in the table
    importlib.import_module(f"{__name__}.{_module.name}")


def make(what: str | Quantity, **options: Any) -> Quantity:
    """A quantity from the table by name, with its options; or the one given."""
    if isinstance(what, Quantity):
        return what
    if what not in QUANTITIES:
        raise ValueError(f"no quantity is called {what!r}; there are {', '.join(sorted(QUANTITIES))}")
    return QUANTITIES[what](**options)
