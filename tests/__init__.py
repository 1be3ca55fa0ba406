"""The tests, in folders that mirror the package. `support` has what several folders share."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
