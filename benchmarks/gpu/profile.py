"""The kernels of a training step, by kind: ``python -m benchmarks.gpu.profile OUT.json``.

The step is that of bench_step.py's ``test_graph``: ResNet-110 in bf16 and channels_last as one CUDA graph. It is timed
without the profiler first, and then replayed under torch.profiler, whose trace has every kernel by name. The sum over
the kernels is less than the time of the step by the gaps between them.
"""

import json
import re
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import torch

from benchmarks.cases.steps import loop_step
from bnkern.train import cifar10
from bnkern.train.config import Config
from bnkern.train.loop import numerics

DEPTH, REPLAYS, TIMED = 110, 3, 20
VARIANTS = {"bnkern": {}, "no norm": {"norm": "none"}, "torch": {"kernels": "torch"}}

# The first pattern that a kernel's name contains decides its kind. The rows keep the names, so that another division is
# possible later.
KINDS = (
    ("Inductor", r"^triton_"),
    ("batch norm, bnkern", r"bnkern.*(rows_|planes_|fold_|merge_)|\b(rows|planes)_\w+_kernel"),
    ("batch norm, torch", r"batch_?norm|bn_fw|bn_bw|cudnn::bn"),
    ("convolution, weight gradient", r"wgrad|convolve_wgrad"),
    ("convolution, input gradient", r"dgrad"),
    ("layout", r"nchwToNhwc|nhwcToNchw|nchw2nhwc|nhwc2nchw|transpose"),
    ("convolution, forward", r"conv_norm_forward|fprop|implicit_gemm|implicit_convolve|cudnn|xmma|convolve"),
    ("optimiser", r"bnkern.*update|FusedSgd|multi_tensor_apply"),
    ("linear", r"gemm|nvjet|cublas|cutlass|splitK"),
    ("casts and copies", r"copy_kernel|CatArray|Memcpy|memcpy|\bcopy"),
    ("fills", r"FillFunctor|Memset|memset"),
    ("addition", r"CUDAFunctor_add|AddFunctor|add_kernel"),
    ("ReLU", r"threshold|clamp|relu"),
    ("batch of images", r"augment"),
    ("reductions, loss, metrics", r"reduce|softmax|[Nn]ll|[Aa]rg[Mm]ax"),
)


def kind_of(name: str) -> str:
    return next((kind for kind, pattern in KINDS if re.search(pattern, name)), "other")


def kernels(trace: dict, steps: int) -> list[dict]:
    """The kernels of a trace of ``steps`` equal steps: calls and microseconds per step, by name, the longest first.

    ``trace`` is the content of torch.profiler's file. Work on the device has the categories below.
    """
    total: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    for event in trace["traceEvents"]:
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            total[event["name"]][0] += 1
            total[event["name"]][1] += event["dur"]
    rows = [
        {"kind": kind_of(name), "name": name, "calls": calls / steps, "us": us / steps}
        for name, (calls, us) in total.items()
    ]
    return sorted(rows, key=lambda row: -row["us"])


def measured(settings: dict, device: torch.device) -> dict:
    config = Config(
        name="profile", depth=DEPTH, precision="bf16", data="synthetic", **{"channels_last": True} | settings
    )
    with numerics(config, device):
        step = loop_step(config, cifar10.synthetic(), device, graph=True)
        for _ in range(3):
            step(None)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(TIMED):
            step(None)
        end.record()
        torch.cuda.synchronize()
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            for _ in range(REPLAYS):
                step(None)
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        rows = kernels(json.loads(path.read_text()), REPLAYS)
    if not rows:
        raise RuntimeError("the profiler recorded no kernel")
    return {"step_us": 1e3 * start.elapsed_time(end) / TIMED, "kernels": rows}


def table(variants: dict[str, dict]) -> list[str]:
    """Microseconds and calls per step, by kind, for each variant."""
    sums: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(lambda: [0.0, 0.0]))
    for variant, result in variants.items():
        for row in result["kernels"]:
            for kind in (row["kind"], "all kernels"):
                sums[kind][variant][0] += row["us"]
                sums[kind][variant][1] += row["calls"]
    order = sorted(sums, key=lambda kind: (kind == "all kernels", -max(us for us, _ in sums[kind].values())))
    lines = [f"{'us a step (kernels)':<32}" + "".join(f"{variant:>20}" for variant in variants)]
    for kind in order:
        cells = [sums[kind][variant] for variant in variants]
        lines.append(f"{kind:<32}" + "".join(f"{us:>12.0f} ({calls:>5.0f})" for us, calls in cells))
    return [*lines, f"{'the step itself':<32}" + "".join(f"{r['step_us']:>12.0f}{'':8}" for r in variants.values())]


def main(out: Path) -> None:
    device, variants = torch.device("cuda"), {}
    for name, settings in VARIANTS.items():
        variants[name] = measured(settings, device)
        out.write_text(json.dumps({"depth": DEPTH, "variants": variants}, indent=1) + "\n")
        print(f"{name}: {len(variants[name]['kernels'])} different kernels", flush=True)
    print("\n".join(table(variants)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
