"""CIFAR-10: its files (fetch.py), its images as tensors (sets.py), and the batches of a training (epochs.py)."""

from .epochs import Batches, batches, split_validation
from .fetch import FOLDER, PACKAGE, RECORD, SHA1, DataError, decode_sheet
from .sets import Cifar10, Split, cache_folder, load, synthetic

__all__ = [
    "FOLDER",
    "PACKAGE",
    "RECORD",
    "SHA1",
    "Batches",
    "Cifar10",
    "DataError",
    "Split",
    "batches",
    "cache_folder",
    "decode_sheet",
    "load",
    "split_validation",
    "synthetic",
]
