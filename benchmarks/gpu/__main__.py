"""All checks that need a GPU, with one command, without a network and without installing anything: ``make gpu-check``.

The command uses the Python that runs it, with its torch and triton. It builds the native module in the tree and runs
the parts of parts.py in their order, most valuable first. A part that reaches its time limit is stopped, and a part
whose limit is longer than the time that is left is skipped. Logs and results are written to --out while the parts run.
A later command with the same --out, or with --resume, runs the parts that have not succeeded yet.
"""

import argparse
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import ROOT
from benchmarks.gpu import BUILD, fresh
from benchmarks.gpu.parts import COMMANDS, NAMES, PARTS, Part, command, environment, plan
from benchmarks.gpu.state import Record, State, pack, unpack

GRACE = 10  # seconds from SIGINT to SIGKILL
DATA = "there is no CIFAR-10: name its folder by DATA= or --data"


def missing() -> list[str]:
    """The tools and packages that this machine lacks and that every check needs."""
    absent = [tool for tool in ("nvcc", "cmake", "ninja") if not shutil.which(tool)]
    if not importlib.util.find_spec("torch"):
        return [*absent, f"torch (for {sys.executable})"]
    import torch

    if not torch.version.cuda:
        absent.append(f"a torch built with CUDA (this is {torch.__version__})")
    elif not torch.cuda.is_available():
        absent.append("an NVIDIA GPU (torch.cuda.is_available() is False)")
    return absent


def run(name: str, argv: list[str], log: Path, env: dict[str, str], seconds: float) -> Record:
    """Runs one part and writes its output to a log and to the terminal. Stops it when its time limit is reached.

    The part is a process group of its own and is stopped as a whole. It writes to a file, because a process that leaves
    the group could keep a pipe open for ever.
    """
    print(f"\n== {name}, at most {seconds:.0f} s: {' '.join(argv)}", flush=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it, and so would its processes
    start = time.perf_counter()
    stops = [(seconds, signal.SIGINT), (seconds + GRACE, signal.SIGKILL)]  # SIGINT lets pytest print its tables
    with log.open("wb") as log_file, log.open(errors="replace") as output:
        streams = {"stdin": subprocess.DEVNULL, "stdout": log_file, "stderr": subprocess.STDOUT}
        try:
            process = subprocess.Popen(argv, cwd=ROOT, env=env, process_group=0, **streams)
        except OSError as error:  # for example, no compute-sanitizer
            print(error)
            return Record(name, "FAILED", error.errno, 0.0)
        try:
            while process.poll() is None:
                time.sleep(0.1)
                print(output.read(), end="", flush=True)
                if stops and time.perf_counter() - start >= stops[0][0]:
                    os.killpg(process.pid, stops.pop(0)[1])
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        print(output.read(), end="", flush=True)
    duration = time.perf_counter() - start
    result = "ok" if process.returncode == 0 else "out of time" if duration >= seconds else "FAILED"
    return Record(name, result, process.returncode, round(duration, 1))


def has_data(data: Path | None) -> bool:
    from bnkern.train.cifar10 import sets

    return bool(data or os.environ.get("BNKERN_DATA")) or sets.cache_folder().is_dir()


def run_parts(parts: list[Part], state: State, end: float, env: dict[str, str], args: argparse.Namespace) -> None:
    for part in parts:
        remaining = end - time.perf_counter()
        if remaining < args.stretch * part.least:
            state.add(Record(part.name, "no time left", None, 0.0))
            continue
        if part.name == "figure1" and not has_data(args.data):
            state.add(Record(part.name, DATA, None, 0.0))
            continue
        argv = command(part, state.out, args.data)
        seconds = remaining - GRACE if part.seconds is None else args.stretch * part.seconds
        record = run(part.name, argv, fresh(state.out, f"{part.name}.log"), env | environment(part), seconds)
        state.add(record)
        if args.pack:
            pack(state.out, args.pack)
        if part.name == "build" and record.result != "ok":
            print("The other parts need the native module.")
            return


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu-check", help="folder for logs and results")
    parser.add_argument("--parts", help=f"only these, also those that have succeeded: {', '.join(NAMES)}")
    parser.add_argument(
        "--minutes", type=float, default=COMMANDS[0] / 60, help="time limit for all parts together (%(default)g)"
    )
    parser.add_argument("--stretch", type=float, default=1, help="a factor on the time limits, for a slow machine")
    parser.add_argument("--pack", type=Path, metavar="FILE", help="write the folder as FILE.00, FILE.01 ... too")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="start from the folder in FILE.00, FILE.01 ...")
    parser.add_argument("--data", type=Path, help="folder of CIFAR-10's binary version, for figure1")
    parser.add_argument("--wheels", type=Path, help="folder with wheels of packages that are missing here")
    parser.add_argument("--plan", action="store_true", help="print the plan of the parts and run nothing")
    parser.add_argument("--summary", action="store_true", help="print the tables of --out and run nothing")
    args = parser.parse_args()
    end = time.perf_counter() + 60 * args.minutes
    if args.plan:
        print("\n".join(plan()))
        return 0
    if unknown := set(requested := args.parts.split(",") if args.parts else []) - set(NAMES):
        parser.error(f"unknown part {', '.join(sorted(unknown))}; the parts are {', '.join(NAMES)}")
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if args.resume:
        unpack(args.resume, out)
    state = State(out)
    if not args.summary and (absent := missing()):
        print(f"gpu-check cannot run here. Missing: {'; '.join(absent)}.")
        return 1
    from benchmarks.gpu import summary  # not at the top: it imports torch, which may be missing

    if args.summary:
        print(summary.write(out, state))
        return 0

    site = BUILD / "site"  # wheels are installed here, not into the Python that runs this
    paths = [str(ROOT), str(site), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
    if args.wheels:
        wheels = [str(wheel) for wheel in sorted(args.wheels.resolve().glob("*.whl"))]
        install = ["pip", "install", "--no-index", "--no-deps", "--upgrade", "--target", str(site), *wheels]
        run("wheels", [sys.executable, "-m", *install], out / "wheels.log", env, 60)
    parts = state.remaining()  # also puts the module of an earlier command in its place
    if requested:
        parts = [part for part in PARTS if part.name in requested]
    try:
        run_parts(parts, state, end, env, args)
    finally:
        print(summary.write(out, state))
        if args.pack:
            pack(out, args.pack)
    print(f"logs and results: {out}")
    return int(any(record and record.result == "FAILED" for record in map(state.last, NAMES)))


if __name__ == "__main__":
    sys.exit(main())
