"""Benchmarks of bnkern against its peers: ``pytest benchmarks``, and ``python -m benchmarks table FILE`` for a table.

Nothing here asserts a time. A run says what it measured, in which environment, and whether the stated targets hold.
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
