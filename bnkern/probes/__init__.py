"""Look inside training: record per-channel moments and gradient signs while the kernels run.

:func:`record` wraps training, :func:`load` reads what it wrote, ``QUANTITIES`` is what there is to record.
"""

from .files import Recording, load, truncate
from .quantities import QUANTITIES, Quantity, make
from .recorder import Recorder, record
from .schedules import every, log_spaced, steps, while_loss

__all__ = [
    "QUANTITIES",
    "Quantity",
    "Recorder",
    "Recording",
    "every",
    "load",
    "log_spaced",
    "make",
    "record",
    "steps",
    "truncate",
    "while_loss",
]
