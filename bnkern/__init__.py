"""bnkern: fused batch norm for PyTorch that lets you look inside training. See :func:`batch_norm` and :mod:`bnkern.nn`.

Importing needs no GPU and no compiled module; the kernels of a backend are loaded at its first call.
"""

from . import nn
from .backends import use_backend
from .convert import convert, revert
from .functional import Moments, add_act, batch_norm, channel_moments, explain

__version__ = "0.1.0"
__all__ = ["Moments", "add_act", "batch_norm", "channel_moments", "convert", "explain", "nn", "revert", "use_backend"]
