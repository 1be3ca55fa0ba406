"""Everything that needs a GPU, by one command, with no network and nothing installed: ``make gpu-check``.

Takes the Python it runs under, with the torch and triton that are there; builds the native module in the tree, runs
the tests marked gpu and the benchmarks, which end in their own table, and leaves JSON and logs in --out. A step that
fails does not stop the next.
"""

import argparse
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "gpu"


def missing() -> list[str]:
    """What this machine lacks to be checked at all."""
    lacks = [tool for tool in ("nvcc", "cmake", "ninja") if not shutil.which(tool)]
    if not importlib.util.find_spec("torch"):
        return [*lacks, f"torch (not in {sys.executable})"]
    import torch

    if not torch.version.cuda:
        lacks.append(f"a torch built with CUDA (this is {torch.__version__})")
    elif not torch.cuda.is_available():
        lacks.append("an NVIDIA GPU (torch sees none)")
    return lacks


def build() -> list[str]:
    """The build's command. torch carries pybind11's headers, for where the package itself is missing."""
    options = {"Python_EXECUTABLE": sys.executable, "BNKERN_CUDA": 1}
    if not importlib.util.find_spec("pybind11"):
        torch = importlib.util.find_spec("torch").origin
        options["BNKERN_PYBIND11_INCLUDE"] = Path(torch).parent / "include"
    defines = " ".join(f"-D{name}={value}" for name, value in options.items())
    return ["bash", "-c", f"cmake -S . -B {BUILD} -G Ninja {defines} && cmake --build {BUILD}"]


def run(name: str, command: list[str], out: Path, env: dict[str, str]) -> dict:
    """Runs one step, shown as it goes and kept in a log."""
    print(f"\n== {name}: {' '.join(command)}", flush=True)
    start = time.perf_counter()
    with (out / f"{name}.log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for line in process.stdout:
            print(line, end="", flush=True)
            log.write(line)
    return {"step": name, "status": process.wait(), "seconds": round(time.perf_counter() - start, 1)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheels", type=Path, help="folder with wheels of packages that are missing here")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu-check", help="folder for logs and JSON")
    args = parser.parse_args()
    if lacks := missing():
        print(f"gpu-check cannot run here, for lack of: {'; '.join(lacks)}.")
        return 1

    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    site = BUILD / "site"  # wheels go here, not into the machine's own Python
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{site}", "PYTHONUNBUFFERED": "1"}
    python = [sys.executable, "-m"]
    steps = []
    if args.wheels:
        wheels = [str(wheel) for wheel in sorted(args.wheels.resolve().glob("*.whl"))]
        install = [*python, "pip", "install", "--no-index", "--no-deps", "--upgrade", "--target", str(site), *wheels]
        steps.append(run("wheels", install, out, env))
    steps += [
        run("build", build(), out, env),
        run("machine", [*python, "bnkern", "--json"], out, env),
        run("tests", [*python, "pytest", "-m", "gpu", "tests", f"--junitxml={out}/tests.xml"], out, env),
        run("benchmarks", [*python, "pytest", "benchmarks", f"--bnkern-json={out}/benchmarks.json"], out, env),
    ]

    print(f"\n{'step':<12} {'result':<10} {'seconds':>8}")
    for step in steps:
        print(f"{step['step']:<12} {'ok' if step['status'] == 0 else 'FAILED':<10} {step['seconds']:>8}")
    record = {"python": platform.python_version(), "steps": steps}
    (out / "gpu-check.json").write_text(json.dumps(record, indent=2) + "\n")
    print(f"\nlogs and JSON: {out}")
    return int(any(step["status"] for step in steps))


if __name__ == "__main__":
    sys.exit(main())
