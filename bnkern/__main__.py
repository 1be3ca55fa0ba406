"""``python -m bnkern [--json]`` prints versions, devices, and for each backend whether it works here or why not."""

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
from pathlib import Path

import torch

import bnkern
from bnkern import backends

BUILD = "build it with `pip install -e .` in the source tree, or `make setup`"


def versions() -> dict[str, str]:
    def installed(package: str) -> str:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return "not installed"

    result = {"bnkern": bnkern.__version__, "python": platform.python_version(), "torch": torch.__version__}
    return result | {package: installed(package) for package in ("triton", "numpy")}


def devices() -> dict[str, str]:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), platform.machine())
    result = {"cpu": f"{model}, {os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads"}
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        result[f"cuda:{i}"] = f"{gpu.name}, capability {gpu.major}.{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB"
    if "cuda:0" not in result:
        result["cuda"] = "none: " + ("torch finds no GPU" if torch.version.cuda else "this torch is built without CUDA")
    return result


def native() -> dict[str, str]:
    """What the compiled module contains, and the instruction set that it has chosen on this CPU."""
    try:
        module = importlib.import_module("bnkern._native")
    except ImportError as error:
        return {"module": f"not found ({error}); {BUILD}"}
    info = module.build_info()
    isa = module.isa() if hasattr(module, "isa") else "not reported by this build"
    cuda = f"CUDA {info['cuda']} for {' '.join(info['cuda_archs'])}" if info["cuda"] else "not compiled in: CPU only"
    result = {
        "compiler": info["compiler"],
        "cpu kernels": f"{isa} (compiled: {' '.join(info['isas'])})",
        "cuda kernels": cuda,
    }
    if info["cuda"] and torch.cuda.is_available():
        rule = importlib.import_module("bnkern.backends.cuda").rule_of(torch.cuda.get_device_name())
        result["cuda strategy"] = f"one kernel from {rule.single_read_from} bytes, else two ({rule.source})"
    return result


def working_backends() -> dict[str, str]:
    """For each backend the devices whose tensors it can compute here, or the reason why there are none."""
    present = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    result = {}
    for name in backends.NAMES:
        working = [device for device in present if backends.unavailable(name, device) is None]
        reason = backends.unavailable(name, "cuda") or backends.unavailable(name, "cpu")
        result[name] = f"works on {' and '.join(working)} tensors" if working else f"no: {reason}"
    return result


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bnkern", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    as_json = parser.parse_args().json
    report = {
        "versions": versions(),
        "devices": devices(),
        "native module": native(),
        "backends": working_backends(),
    }
    if as_json:
        print(json.dumps(report, indent=2))
        return
    for title, rows in report.items():
        print(title)
        for name, text in rows.items():
            print(f"  {name:<12}  {text}")


if __name__ == "__main__":
    main()
