"""Starts gpu-check in the stand-in; all arguments are passed on."""

import os
import sys
from pathlib import Path

from tests import ROOT

HERE = Path(__file__).parent


def environment() -> dict[str, str]:
    return os.environ | {
        "PATH": f"{HERE / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([str(HERE / "site"), str(ROOT)]),
        "PYTEST_PLUGINS": "without_bodies",  # in site
        "OMP_NUM_THREADS": "1",
    }


if __name__ == "__main__":
    argv = [sys.executable, "-m", "benchmarks.gpu", *sys.argv[1:]]
    os.chdir(ROOT)
    os.execve(sys.executable, argv, environment())
