"""Figure 5 with padding shortcuts, drawn as Figure 5 is."""

from . import Rows
from .moments_by_depth import by_layer, draw

__all__ = ["CAPTION", "draw", "tables"]

CAPTION = (
    "As the figure before, but with padding shortcuts. With batch norm ours no longer fall back where a stage begins "
    "(dotted), as the paper's (hollow) do."
)


def tables(spec, results) -> dict[str, Rows]:
    """One table, as Figure 5's."""
    return {"padded_shortcuts": by_layer(spec, results)}
