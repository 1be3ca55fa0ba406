"""Figure 5 with padding shortcuts, in the form of Figure 5."""

from . import Rows
from .moments_by_depth import by_layer, draw

__all__ = ["CAPTION", "draw", "tables"]

CAPTION = (
    "The same as Figure 5, but with padding shortcuts. With batch norm our values do not fall back where a stage "
    "begins (dotted). The paper's values (hollow) do."
)


def tables(spec, results) -> dict[str, Rows]:
    """One table, see :func:`.moments_by_depth.by_layer`."""
    return {"padded_shortcuts": by_layer(spec, results)}
