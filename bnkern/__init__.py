"""bnkern: fused batch norm for PyTorch, with probes that record statistics of a training.

Start with :func:`batch_norm` and :mod:`bnkern.nn`. The import needs neither a GPU nor the compiled module. The kernels
of a backend are loaded at its first call.
"""

from . import nn, probes
from .backends import use_backend, use_cuda_chains
from .conv import GradSigns, conv2d_grad_signs
from .convert import convert, revert
from .norm import Moments, add_act, batch_norm, channel_moments, explain
from .statistics import recompute_statistics

__version__ = "0.2.0"
__all__ = [
    "GradSigns",
    "Moments",
    "add_act",
    "batch_norm",
    "channel_moments",
    "conv2d_grad_signs",
    "convert",
    "explain",
    "nn",
    "probes",
    "recompute_statistics",
    "revert",
    "use_backend",
    "use_cuda_chains",
]
