"""Probes record per-channel moments, gradient signs and other quantities while a network trains.

:func:`record` is the context around the training, :func:`load` reads its files, and ``QUANTITIES`` is the table of all
quantities. :func:`flight_recorder` keeps the last steps, and names the first value that is not finite.
"""

from .files import Recording, load, truncate
from .flight import FlightRecorder, flight_recorder
from .quantities import QUANTITIES, Quantity, make
from .recorder import Recorder, record
from .schedules import every, log_spaced, steps, while_loss

__all__ = [
    "QUANTITIES",
    "FlightRecorder",
    "Quantity",
    "Recorder",
    "Recording",
    "every",
    "flight_recorder",
    "load",
    "log_spaced",
    "make",
    "record",
    "steps",
    "truncate",
    "while_loss",
]
