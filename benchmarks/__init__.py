"""Benchmarks of bnkern and its peers: ``pytest benchmarks``; ``python -m benchmarks table FILE`` prints a results file.

No benchmark asserts a time. A run reports its measurements, its environment, and whether the stated targets hold.
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
