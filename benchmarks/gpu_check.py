"""Everything that needs a GPU, by one command, with no network and nothing installed: ``make gpu-check``.

Takes the Python it runs under, with the torch and triton that are there; builds the native module in the tree, then
goes through the parts, the most telling first: ``first_look`` (three measurements that decide between one kernel and
two), ``cuda_tests``, ``tests``, ``sanitizer``, ``benchmarks``, ``stress``. Logs and JSON are in --out as they come. A
part that fails does not stop the next. ``--only`` names parts to run by themselves; no part begins, and none goes on,
beyond --minutes.
"""

import argparse
import importlib.util
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "gpu"
TOOLS = ("memcheck", "racecheck")  # of compute-sanitizer; racecheck sees shared memory only


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


def run(name: str, command: list[str], out: Path, env: dict[str, str], deadline: float) -> dict:
    """Runs one step, shown as it goes and kept in a log; ended where it runs past the deadline."""
    start = time.perf_counter()
    if start >= deadline:
        return {"step": name, "status": "no time left", "seconds": 0.0}
    print(f"\n== {name}: {' '.join(command)}", flush=True)
    with (out / f"{name}.log").open("w", buffering=1) as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        end = threading.Timer(deadline - start, process.terminate)
        end.start()
        for line in process.stdout:
            print(line, end="", flush=True)
            log.write(line)
        end.cancel()
    return {"step": name, "status": process.wait(), "seconds": round(time.perf_counter() - start, 1)}


def parts(out: Path) -> dict[str, list[str]]:
    """The command of each part, the most telling first."""
    python = [sys.executable, "-m"]
    pytest = [*python, "pytest", "-q", "-m"]
    of_cuda = "tests/cuda/test_cuda_gpu.py"
    short = [*pytest, "gpu", of_cuda, "-k", "test_every_strategy and bf16", "-p", "no:cacheprovider"]
    sanitize = "compute-sanitizer --error-exitcode 1 --tool"
    return {
        "first_look": [sys.executable, "benchmarks/first_look.py"],
        "cuda_tests": [*pytest, "gpu and not slow", of_cuda, f"--junitxml={out}/cuda_tests.xml"],
        "tests": [*pytest, "gpu and not slow", "tests", f"--deselect={of_cuda}", f"--junitxml={out}/tests.xml"],
        "sanitizer": ["bash", "-c", " && ".join(f"{sanitize} {t} {' '.join(map(shlex.quote, short))}" for t in TOOLS)],
        "benchmarks": [*python, "pytest", "benchmarks", f"--bnkern-json={out}/benchmarks.json"],
        "stress": [*pytest, "gpu and slow", of_cuda, f"--junitxml={out}/stress.xml"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheels", type=Path, help="folder with wheels of packages that are missing here")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu-check", help="folder for logs and JSON")
    parser.add_argument("--only", nargs="+", metavar="PART", help=f"of {', '.join(parts(Path()))}")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all of it, the build included")
    args = parser.parse_args()
    if unknown := set(args.only or ()) - set(parts(Path())):
        parser.error(f"there is no part {', '.join(sorted(unknown))}; there are {', '.join(parts(Path()))}")
    if lacks := missing():
        print(f"gpu-check cannot run here, for lack of: {'; '.join(lacks)}.")
        return 1

    deadline = time.perf_counter() + 60 * args.minutes
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    site = BUILD / "site"  # wheels go here, not into the machine's own Python
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{site}", "PYTHONUNBUFFERED": "1"}
    wanted = {"build": build(), "machine": [sys.executable, "-m", "bnkern", "--json"]}
    if args.wheels:
        wheels = [str(wheel) for wheel in sorted(args.wheels.resolve().glob("*.whl"))]
        install = ["pip", "install", "--no-index", "--no-deps", "--upgrade", "--target", str(site), *wheels]
        wanted = {"wheels": [sys.executable, "-m", *install], **wanted}
    wanted |= {name: command for name, command in parts(out).items() if not args.only or name in args.only}
    steps = []
    for name, command in wanted.items():
        steps.append(run(name, command, out, env, deadline))
        record = {"python": platform.python_version(), "steps": steps}
        (out / "gpu-check.json").write_text(json.dumps(record, indent=2) + "\n")

    print(f"\n{'step':<12} {'result':<10} {'seconds':>8}")
    for step in steps:
        print(f"{step['step']:<12} {'ok' if step['status'] == 0 else 'FAILED':<10} {step['seconds']:>8}")
    print(f"\nlogs and JSON: {out}")
    return int(any(step["status"] for step in steps))


if __name__ == "__main__":
    sys.exit(main())
