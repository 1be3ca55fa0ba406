"""The modules of torch.nn's batch norms with ``act`` and ``residual``, a convolution, and chains of both.

A state_dict fits both torch's and these.
"""

from .chain import Chain, ChainLink, ConvBNAct, run_chain
from .convolution import Conv2d
from .norms import Activation, BatchNorm1d, BatchNorm2d, BatchNorm3d, SyncBatchNorm
from .statistics import freeze_statistics, skip_nonfinite
from .synchronise import convert_sync_batchnorm

__all__ = [
    "Activation",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "Chain",
    "ChainLink",
    "Conv2d",
    "ConvBNAct",
    "SyncBatchNorm",
    "convert_sync_batchnorm",
    "freeze_statistics",
    "run_chain",
    "skip_nonfinite",
]

# Pickles, error messages and documents have the public name, so that a file of this package may be moved.
for _name in __all__:
    globals()[_name].__module__ = __name__
