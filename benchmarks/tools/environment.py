"""The environment of a measurement."""

import os
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import torch

from benchmarks import ROOT
from bnkern import backends
from bnkern.__main__ import devices, native, versions


def environment(device: torch.device) -> dict:
    """Machine, versions, commit, backend, and other settings that influence times."""
    huge_pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted changes": bool(_git("status", "--porcelain", "--", ":!benchmarks/results")),
        "device": device.type,
        "backend": backends.choose(backends.forced(), device, torch.float32).__name__.rpartition(".")[2],
        "threads": torch.get_num_threads(),
        "torch isa": torch.backends.cpu.get_cpu_capability(),
        "transparent huge pages": huge_pages.read_text().strip() if huge_pages.exists() else "unknown",
        "load average at start": os.getloadavg()[0],
        "versions": versions(),
        "devices": devices(),
        "native module": native(),
        "settings": {name: os.environ[name] for name in sorted(os.environ) if name.startswith(("OMP_", "MALLOC_"))},
    }


def _git(*arguments: str) -> str:
    try:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
