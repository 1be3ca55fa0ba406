"""The parts of ``make gpu-check``, most valuable first, with the seconds after which each is stopped.

The seconds are also the plan. The sum of the first parts fits the first command, and that of the next ones the second
(COMMANDS). A part usually ends earlier, and then later parts start in the first command already.
"""

import importlib.util
import os
import sys
from pathlib import Path
from typing import NamedTuple

from benchmarks.gpu import BUILD, fresh

COMMANDS = (540, 240)  # seconds of each command
LAST = 60  # the last part starts if so many seconds are left, and takes all of them


class Part(NamedTuple):
    name: str
    seconds: int | None  # None: all that are left
    # pytest or a module with its arguments, or benchmarks with theirs; {out} and {json} are replaced
    arguments: list[str]
    question: str

    @property
    def least(self) -> int:
        """The seconds that must be left for the part to start."""
        return LAST if self.seconds is None else self.seconds


CUDA_TESTS = "tests/backends/cuda/test_gpu.py"
TRAIN_TESTS = "tests/train/test_gpu.py"
SIGNS_TESTS = "tests/conv/test_conv_grad_signs.py"
STEPS, STRATEGIES, NORMS = "train/bench_step.py", "norm/bench_strategies.py", "norm/bench_batch_norm.py"
PROBES = "probes/bench_probes.py"


def tests(*arguments: str) -> list[str]:
    return ["pytest", "-q", "-p", "no:cacheprovider", "--junitxml={xml}", *arguments]


def bench(*arguments: str, budget: float) -> list[str]:
    """Benchmarks, with a factor on the time that is spent on each case."""
    return [*arguments, f"--budget={budget:g}"]


CONV_NORM_TESTS = tests("-m", "gpu", "tests/backends/cuda/test_conv_norm.py")
SHORT = tests("-m", "gpu", CUDA_TESTS, "-k", "test_every_strategy and bf16")
# The shared tests: 27,000, of which most compile Triton kernels, so one in eight runs.
SHARED = tests("-m", "gpu and not slow", "tests", f"--deselect={CUDA_TESTS}", f"--deselect={TRAIN_TESTS}", "--sample=8")
FIGURE1 = [
    "bnkern.train", "fig1-batch-0.1", "--out={out}/figure1", "--device=cuda",
    "--set", "precision=bf16", "channels_last=true", "evaluate_every=5",
]  # fmt: skip

PHASES = bench(
    "norm/bench_phases.py", "--shapes=stage1,large64", "-k", "graph and not records and not fp16", budget=0.2
)

PARTS = [
    Part("build", 75, [], "the native module, with the baseline's CPU kernels only"),
    Part("machine", 25, ["bnkern", "--json"], "which backends serve, and by which rule"),
    Part("smoke", 40, SHORT, "whether the CUDA kernels are right at all"),
    Part("device", 30, ["benchmarks.gpu.device", "{json}"], "which clusters fit, and how an MMA takes its operands"),
    Part("profile", 60, ["benchmarks.gpu.profile", "{json}"], "where the time of a ResNet-110 step goes"),
    Part("counters", 75, ["benchmarks.gpu.counters", "{json}"], "what the batch norm kernels wait for"),
    Part("strategies", 60, bench(STRATEGIES, "-k", "graph and bf16", budget=0.1), "one kernel or two: the rule"),
    Part("graphs", 50, bench(STEPS, "-k", "test_graph and bf16", budget=0.1), "steps in a graph"),
    Part("compiled", 125, bench(STEPS, "-k", "test_compiled_graph and default", budget=0.1), "torch.compile as a peer"),
    # ---- the second command
    Part("replicas", 35, bench(STEPS, "-k", "replicas", budget=0.1), "several runs on one GPU"),
    Part("cuda-tests", 75, tests("-m", "gpu and not slow", CUDA_TESTS), "the CUDA kernels on hardware"),
    Part("memcheck", 70, SHORT, "reads and writes out of bounds"),
    Part("train-tests", 40, tests("-m", "gpu", TRAIN_TESTS), "graphs and resumed runs on the CUDA kernels"),
    Part("cudnn", 20, bench("conv/bench_cudnn.py", "-k", "graph", budget=0.2), "cuDNN's convolutions by pass"),
    # ---- if time is left, or another day
    Part("host", 20, bench("norm/bench_overhead.py", "-k", "call", budget=0.2), "the host's time of a call"),
    Part("conv-norm-tests", 40, CONV_NORM_TESTS, "whether batch norm inside a convolution is right"),
    Part("conv-norm", 20, bench("conv/bench_conv_norm.py", "-k", "graph", budget=0.2), "whether it is kept: targets"),
    Part(
        "batch-norms",
        60,
        bench(NORMS, "--shapes=cifar", "-k", "bf16", "--no-compile", budget=0.05),
        "whole batch norms over their bytes",
    ),
    Part("autotuned", 130, bench(STEPS, "-k", "test_compiled_graph and autotune and 20", budget=0.1), "max-autotune"),
    Part("probes", 60, bench(PROBES, "-k", "graph and bf16", budget=0.05), "what recording costs in a graph"),
    Part("strategies-fp32", 60, bench(STRATEGIES, "-k", "graph and fp32", budget=0.1), "the rule in fp32"),
    Part("graphs-fp32", 60, bench(STEPS, "-k", "test_graph and fp32", budget=0.1), "steps in fp32"),
    Part("conv-grad-signs-tests", 60, tests("-m", "gpu", SIGNS_TESTS, "-k", "triton"), "whether these sums are right"),
    Part("conv-grad-signs", 40, bench("conv/bench_conv_grad_signs.py", budget=0.2), "sums of a gradient's summands"),
    Part("tests", 150, SHARED, "a sample of the shared tests"),
    Part("racecheck", 90, SHORT, "races in shared memory"),
    Part("phases", 60, PHASES, "phases over a copy"),
    Part("phases-triton", 60, PHASES, "the same in Triton"),
    Part(
        "records",
        30,
        bench("norm/bench_phases.py", "--shapes=stage1", "-k", "records", budget=0.2),
        "what records cost",
    ),
    Part("autotuned-110", 200, bench(STEPS, "-k", "test_compiled_graph and autotune and 110", budget=0.1), "the same"),
    Part("compiled-norms", 60, bench(NORMS, "--shapes=stage1", "-k", "bf16 and bn_add_relu", budget=0.3), "as a peer"),
    Part("resnet50", 60, bench(NORMS, "--shapes=resnet50-64", "--no-compile", budget=0.05), "larger tensors"),
    Part("small-and-odd", 60, bench(NORMS, "--shapes=small,odd", "--no-compile", budget=0.05), "other tensors"),
    Part("rest", 60, bench("train/bench_augment.py", "train/bench_optimizer.py", budget=0.2), "images, optimiser"),
    Part("memory", 60, bench("norm/bench_memory.py", budget=1), "memory of layers and networks"),
    Part("stress", 300, tests("-m", "gpu and slow", CUDA_TESTS), "100,000 launches, and more than 2^31 elements"),
    Part("figure1", None, FIGURE1, "Figure 1 with batch norm at 0.1, ResNet-110; resumes"),
]
NAMES = [part.name for part in PARTS]
SANITIZERS = ("memcheck", "racecheck")  # of compute-sanitizer; racecheck checks only shared memory
PARALLEL = ("cuda-tests", "tests", "conv-grad-signs-tests")  # in many processes, since compiling takes most of the time


def build() -> list[str]:
    """The command of the build. If pybind11 is not installed, the build uses the headers that torch contains."""
    options = {"Python_EXECUTABLE": sys.executable, "BNKERN_CUDA": 1, "BNKERN_CPU_ISAS": "generic"}
    if not importlib.util.find_spec("pybind11"):
        torch = importlib.util.find_spec("torch").origin
        options["BNKERN_PYBIND11_INCLUDE"] = Path(torch).parent / "include"
    defines = " ".join(f"-D{name}={value}" for name, value in options.items())
    return ["bash", "-c", f"cmake -S . -B {BUILD} -G Ninja {defines} && cmake --build {BUILD}"]


def command(part: Part, out: Path, data: Path | None = None) -> list[str]:
    """The command of a part, which writes its results to a new file in ``out``."""
    if part.name == "build":
        return build()
    places = {"out": out, "json": fresh(out, f"{part.name}.json"), "xml": fresh(out, f"{part.name}.xml")}
    arguments = [argument.format(**places) for argument in part.arguments]
    if arguments[0].endswith(".py"):
        files = [f"benchmarks/{argument}" if argument.endswith(".py") else argument for argument in arguments]
        results = f"--bnkern-json={fresh(out, f'bench-{part.name}.json')}"
        arguments = ["pytest", "-q", "-p", "no:cacheprovider", *files, results]
    if part.name in PARALLEL and importlib.util.find_spec("xdist"):
        arguments += ["-n", str(min(os.cpu_count() or 1, 12))]
    if part.name == "figure1" and data:
        arguments.append(f"--data={data}")
    sanitizer = ["compute-sanitizer", "--error-exitcode", "1", "--tool", part.name] if part.name in SANITIZERS else []
    return [*sanitizer, sys.executable, "-m", *arguments]


def environment(part: Part) -> dict[str, str]:
    """Further environment variables of a part."""
    return {"BNKERN_BACKEND": "triton"} if part.name.endswith("-triton") else {}


def plan() -> list[str]:
    """The table of planned seconds, with the sums of each command."""
    lines = [f"{'command':>7} {'part':<24} {'seconds':>7} {'sum':>5}  question"]
    number, total = 1, 0
    for part in PARTS:
        if number <= len(COMMANDS) and total + part.least > COMMANDS[number - 1]:
            lines.append(f"{'':7} {'':24} {'':7} {total:>5}  of {COMMANDS[number - 1]}")
            number, total = number + 1, 0
        total += part.least
        where = str(number) if number <= len(COMMANDS) else "later"
        seconds = "rest" if part.seconds is None else str(part.seconds)
        lines.append(f"{where:>7} {part.name:<24} {seconds:>7} {total:>5}  {part.question}")
    return lines
