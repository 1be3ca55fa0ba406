"""``make gpu-check``: all checks that need a GPU, most valuable first, within a few minutes (``__main__``).

``parts`` has the parts with their time limits, ``state`` what a later command goes on from, and ``summary`` the tables
at the end, with the ``targets`` and the rule of the strategies (``rules``). ``device``, ``profile`` and ``counters``
are parts of their own: what fits on the device, the kernels of a training step, and ncu's counters. All other parts are
tests and benchmarks of this repository.
"""

from pathlib import Path

from benchmarks import ROOT

BUILD = ROOT / "build" / "gpu"


def fresh(out: Path, name: str) -> Path:
    """The path of a new file in ``out``: ``name``, with -2, -3 and so on before its suffix if there are earlier ones.

    A part that is started again thus keeps what it measured before it was stopped. Readers take the files in order,
    and later results replace earlier ones.
    """
    count, path = len(attempts(out, name)), out / name
    return path if count == 0 else path.with_stem(f"{path.stem}-{count + 1}")


def attempts(out: Path, name: str) -> list[Path]:
    """The files that :func:`fresh` named, from the first to the last attempt."""
    path = out / name
    more = sorted(out.glob(f"{path.stem}-[0-9]{path.suffix}"))
    return [file for file in (path, *more) if file.exists()]
