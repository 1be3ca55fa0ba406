"""All checks that need a GPU, with one command, without a network and without installing anything: ``make gpu-check``.

The script uses the Python that runs it, with its torch and triton. It builds the native module in the tree, runs the
tests marked gpu and the benchmarks, and writes logs and JSON to --out while it runs. The parts are in the order of
their importance. --parts build,tests runs some of them. A part that fails or exceeds its time does not stop the next
one. A part that would begin after --minutes is left out and reported.
"""

import argparse
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "gpu"
QUICKLY = ["--no-compile", "--budget=0.05"]
SAMPLED = ["--sample=8", "--junitxml={out}/tests.xml"]  # of 27,000 tests, most of which compile Triton kernels
OF_CUDA = "tests/backends/cuda/test_gpu.py"
TOOLS = ("memcheck", "racecheck")  # of compute-sanitizer; racecheck checks only shared memory
SHORT = ["pytest", "-q", "-m", "gpu", OF_CUDA, "-k", "test_every_strategy and bf16", "-p", "no:cacheprovider"]
PARTS = {  # after the build: arguments of python -m, and a limit in seconds
    "machine": (["bnkern", "--json"], 30),
    "cuda-tests": (["pytest", "-q", "-m", "gpu and not slow", OF_CUDA, "--junitxml={out}/cuda-tests.xml"], 120),
    "tests": (
        ["pytest", "-q", "-m", "gpu and not slow", "tests", f"--deselect={OF_CUDA}", *SAMPLED],
        150,
    ),
    "strategies": (["norm/bench_strategies.py", "-k", "graph", "--budget=0.1"], 60),
    "batch-norms": (["norm/bench_batch_norm.py", "--shapes=cifar", "-k", "bf16", *QUICKLY], 90),
    "probes-graph": (["probes/bench_probes.py", "-k", "graph", "--budget=0.05"], 90),
    "graphs": (["train/bench_step.py", "-k", "graph", "--no-compile", "--budget=0.1"], 90),
    "replicas": (["train/bench_step.py", "-k", "replicas", "--budget=0.1"], 60),
    "steps": (
        ["train/bench_step.py", "-k", "not graph and not replicas and not 110", "--no-compile", "--budget=0.1"],
        60,
    ),
    "phases": (["norm/bench_phases.py", "--shapes=stage1,large64", "-k", "not records", "--budget=0.2"], 60),
    "phases-triton": (["norm/bench_phases.py", "--shapes=stage1,large64", "-k", "not records", "--budget=0.2"], 60),
    "compiled": (["norm/bench_batch_norm.py", "--shapes=stage1", "-k", "bf16 and bn_add_relu", "--budget=0.3"], 60),
    "probes": (["probes/bench_probes.py", "-k", "not graph", "--budget=0.1"], 60),
    "conv-grad-signs": (["conv/bench_conv_grad_signs.py", "--budget=0.2"], 40),
    "records": (["norm/bench_phases.py", "--shapes=stage1", "-k", "records", "--budget=0.2"], 30),
    "records-triton": (["norm/bench_phases.py", "--shapes=stage1", "-k", "records", "--budget=0.2"], 30),
    "resnet50": (["norm/bench_batch_norm.py", "--shapes=resnet50-64", *QUICKLY], 60),
    "small-and-odd": (["norm/bench_batch_norm.py", "--shapes=small,odd", *QUICKLY], 60),
    "growth": (["norm/bench_growth.py", "--budget=0.2"], 60),
    "memory": (["norm/bench_memory.py"], 60),
    "rest": (["norm/bench_overhead.py", "train/bench_augment.py", "train/bench_optimizer.py", "--budget=0.2"], 60),
    "memcheck": (SHORT, 120),
    "racecheck": (SHORT, 120),
    "stress": (["pytest", "-q", "-m", "gpu and slow", OF_CUDA, "--junitxml={out}/stress.xml"], 300),
}


def missing() -> list[str]:
    """The tools and packages that this machine lacks and that every check needs."""
    lacks = [tool for tool in ("nvcc", "cmake", "ninja") if not shutil.which(tool)]
    if not importlib.util.find_spec("torch"):
        return [*lacks, f"torch (for {sys.executable})"]
    import torch

    if not torch.version.cuda:
        lacks.append(f"a torch built with CUDA (this is {torch.__version__})")
    elif not torch.cuda.is_available():
        lacks.append("an NVIDIA GPU (torch.cuda.is_available() is False)")
    return lacks


def build() -> list[str]:
    """The command of the build. If pybind11 is not installed, the build uses the headers that torch contains."""
    options = {"Python_EXECUTABLE": sys.executable, "BNKERN_CUDA": 1}
    if not importlib.util.find_spec("pybind11"):
        torch = importlib.util.find_spec("torch").origin
        options["BNKERN_PYBIND11_INCLUDE"] = Path(torch).parent / "include"
    defines = " ".join(f"-D{name}={value}" for name, value in options.items())
    return ["bash", "-c", f"cmake -S . -B {BUILD} -G Ninja {defines} && cmake --build {BUILD}"]


def command(name: str, out: Path) -> list[str]:
    """The command of a part: a module with its arguments, or benchmarks with their results file."""
    words = [word.format(out=out) for word in PARTS[name][0]]
    if words[0].endswith(".py"):
        paths = [f"benchmarks/{word}" if word.endswith(".py") else word for word in words]
        words = ["pytest", *paths, f"--bnkern-json={out}/bench-{name}.json"]
    if words[0] == "pytest" and name.endswith("tests") and importlib.util.find_spec("xdist"):
        words += ["-n", str(min(os.cpu_count(), 12))]  # compiling takes most of the time
    sanitizer = ["compute-sanitizer", "--error-exitcode", "1", "--tool", name] if name in TOOLS else []
    return [*sanitizer, sys.executable, "-m", *words]


def run(name: str, command: list[str], out: Path, env: dict[str, str], seconds: float) -> dict:
    """Runs one part, prints its output and writes it to a log. Stops the part when its time limit is reached."""
    # A background job ignores SIGINT, and its child processes would inherit this.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    print(f"\n== {name}, at most {seconds:.0f} s: {' '.join(command)}", flush=True)
    start = time.perf_counter()
    with (out / f"{name}.log").open("w", buffering=1) as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        timer = threading.Timer(seconds, process.send_signal, [signal.SIGINT])  # pytest prints its tables and exits
        killer = threading.Timer(seconds + 10, process.kill)
        for clock in (timer, killer):
            clock.start()
        for line in process.stdout:
            print(line, end="", flush=True)
            log.write(line)
        status = process.wait()
    took = time.perf_counter() - start
    for clock in (timer, killer):
        clock.cancel()
    result = "ok" if status == 0 else "out of time" if took >= seconds else "FAILED"
    return {"part": name, "result": result, "status": status, "seconds": round(took, 1)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheels", type=Path, help="folder with wheels of packages that are missing here")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu-check", help="folder for logs and JSON")
    parser.add_argument("--parts", default=",".join(["build", *PARTS]), help="comma-separated: %(default)s")
    parser.add_argument("--minutes", type=float, default=9, help="time limit for all parts together (%(default)g)")
    args = parser.parse_args()
    requested = args.parts.split(",")
    if unknown := set(requested) - {"build", *PARTS}:
        parser.error(f"unknown part {', '.join(sorted(unknown))}; the parts are build, {', '.join(PARTS)}")
    if lacks := missing():
        print(f"gpu-check cannot run here. Missing: {'; '.join(lacks)}.")
        return 1

    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    site = BUILD / "site"  # wheels are installed here, not into the Python that runs this
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{site}", "PYTHONUNBUFFERED": "1"}
    planned = {}
    if args.wheels:
        wheels = [str(wheel) for wheel in sorted(args.wheels.resolve().glob("*.whl"))]
        install = ["pip", "install", "--no-index", "--no-deps", "--upgrade", "--target", str(site), *wheels]
        planned["wheels"] = [sys.executable, "-m", *install], 60
    for name in requested:
        planned[name] = (build(), 300) if name == "build" else (command(name, out), PARTS[name][1])

    parts, end = [], time.perf_counter() + 60 * args.minutes
    for name, (words, seconds) in planned.items():
        left = end - time.perf_counter()
        if left < 5:
            parts.append({"part": name, "result": "left out, no time left", "status": None, "seconds": 0.0})
        else:
            backend = {"BNKERN_BACKEND": "triton"} if name.endswith("-triton") else {}
            parts.append(run(name, words, out, env | backend, min(seconds, left)))
        record = {"python": platform.python_version(), "parts": parts}
        (out / "gpu-check.json").write_text(json.dumps(record, indent=2) + "\n")

    print(f"\n{'part':<16} {'result':<28} {'seconds':>8}")
    for part in parts:
        print(f"{part['part']:<16} {part['result']:<28} {part['seconds']:>8}")
    print(f"\nlogs and JSON: {out}; `python -m benchmarks merge ALL.json {out}/bench-*.json` joins the measurements")
    return int(any(part["result"] == "FAILED" for part in parts))


if __name__ == "__main__":
    sys.exit(main())
