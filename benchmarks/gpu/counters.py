"""ncu's counters of the batch norm kernels: ``python -m benchmarks.gpu.counters OUT.json``.

It starts ncu on this file with ``--calls``, which makes each call once, with a warm second-level cache, as after a
convolution. ncu's own report stays beside OUT.json, for its graphical interface.
"""

import csv
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from benchmarks import ROOT

# --clock-control none leaves the clocks alone. --cache-control none keeps the caches as the pass before left them.
SETTINGS = ["--clock-control", "none", "--cache-control", "none", "--profile-from-start", "off"]
SECTIONS = (
    "SpeedOfLight",
    "LaunchStats",
    "Occupancy",
    "SchedulerStats",
    "WarpStateStats",
    "MemoryWorkloadAnalysis",
    "SourceCounters",
)
MEASURED = {
    "registers": "launch__registers_per_thread",
    "grid": "launch__grid_size",
    "threads": "launch__block_size",
    "cluster": "launch__cluster_size",
    "clusters at once": "launch__cluster_max_active",
    "waves": "launch__waves_per_multiprocessor",
    "issue slots %": "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "warps %": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "L2 hits %": "lts__t_sector_hit_rate.pct",
    "memory %": "gpu__compute_memory_throughput.avg.pct_of_peak_sustained_elapsed",
}
DURATION = "gpu__time_duration.sum"
MICROSECONDS = {"ns": 1e-3, "us": 1.0, "ms": 1e3, "s": 1e6}
# The warps that wait for each reason, per issued instruction. "selected" is the one that issues.
STALL = re.compile(r"smsp__average_warps_issue_stalled_(?!selected)(\w+?)(?<!_not_issued)_per_issue_active\.ratio")


class ProfiledCall(NamedTuple):
    shape: str
    layout: str
    provider: str  # of benchmarks/cases/strategies.py
    call: str
    kernels: int

    def __str__(self) -> str:
        return f"{self.call} {self.shape} {self.layout}, {self.provider.removeprefix('bnkern, ')}"


CALLS = [
    ProfiledCall(shape, layout, provider, call, kernels)
    for shape, layout, provider, kernels in (
        ("stage1", "channels_last", "bnkern, one kernel", 1),
        ("stage2", "channels_last", "bnkern, one kernel", 1),
        ("stage3", "channels_last", "bnkern, one kernel", 1),
        ("stage1", "nchw", "bnkern, one kernel", 1),
        ("stage1", "channels_last", "bnkern, two kernels", 2),
    )
    for call in ("forward", "backward")
]


def make_calls() -> None:
    """Each call of bf16 tensors twice, the second time under ncu."""
    import torch

    from benchmarks.cases.shapes import Case
    from benchmarks.cases.strategies import Layer, call_layer

    device = torch.device("cuda")
    for profiled_call in CALLS:
        layer = Layer(Case(profiled_call.shape, profiled_call.layout, "bf16"), device)
        call_layer(profiled_call.provider, profiled_call.call, layer)
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        call_layer(profiled_call.provider, profiled_call.call, layer)
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


def number(text: str) -> float | None:
    """A value of ncu's table, which has separators of thousands; None for text and for missing values."""
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None


def read(text: str) -> list[dict]:
    """The kernels in ncu's raw page as CSV, in the order in which they ran.

    The table has a line of names, one of units and one for each kernel. Other lines may come before it.
    """
    start = text.find('"ID",')
    if start < 0:
        raise ValueError(f"no table in ncu's output:\n{text[-2000:]}")
    units, *rows = csv.DictReader(io.StringIO(text[start:]))
    kernels = []
    for row in rows:
        values = {name: number(value) for name, value in row.items() if value is not None}
        duration = values[DURATION]
        stalls = {m[1]: value for name, value in values.items() if value is not None and (m := STALL.fullmatch(name))}
        if duration is None or not stalls:
            raise ValueError(f"ncu measured no duration or no stall reasons of {row['Kernel Name']}")
        kernels.append(
            {
                "name": row["Kernel Name"],
                "us": duration * MICROSECONDS[units[DURATION]],
                **{name: values.get(metric) for name, metric in MEASURED.items()},
                "stalls": dict(sorted(stalls.items(), key=lambda item: -item[1])),
            }
        )
    return kernels


def labelled(kernels: list[dict]) -> list[dict]:
    """The kernels with their calls, if there are as many as the calls should launch."""
    calls = [str(profiled_call) for profiled_call in CALLS for _ in range(profiled_call.kernels)]
    if len(calls) != len(kernels):
        print(f"{len(kernels)} kernels instead of {len(calls)}, so the calls are left out", file=sys.stderr)
        calls = ["?"] * len(kernels)
    return [{"call": call, **kernel} for call, kernel in zip(calls, kernels, strict=True)]


def table(kernels: list[dict]) -> list[str]:
    lines = [f"{'call':<44} {'us':>6} {'regs':>4} {'issue %':>7} {'L2 %':>5}  warps that wait per issue, by reason"]
    for kernel in kernels:
        stalls = ", ".join(f"{name} {value:.1f}" for name, value in [*kernel["stalls"].items()][:4])
        numbers = (kernel[name] for name in ("registers", "issue slots %", "L2 hits %"))
        cells = ["" if value is None else f"{value:.0f}" for value in numbers]
        lines.append(f"{kernel['call']:<44} {kernel['us']:>6.1f} {cells[0]:>4} {cells[1]:>7} {cells[2]:>5}  {stalls}")
    return lines


def main(out: Path) -> None:
    report = out.with_suffix(".ncu-rep")
    sections = [word for section in SECTIONS for word in ("--section", section)]
    program = [sys.executable, "-m", "benchmarks.gpu.counters", "--calls"]
    profile_command = ["ncu", *SETTINGS, *sections, "--force-overwrite", "--export", report, *program]
    subprocess.run(profile_command, cwd=ROOT, check=True)
    import_command = ["ncu", "--import", report, "--page", "raw", "--csv"]
    text = subprocess.run(import_command, stdout=subprocess.PIPE, text=True, check=True).stdout
    out.with_suffix(".csv").write_text(text)
    kernels = labelled(read(text))
    out.write_text(json.dumps(kernels, indent=1) + "\n")
    print("\n".join(table(kernels)))


if __name__ == "__main__":
    make_calls() if sys.argv[1] == "--calls" else main(Path(sys.argv[1]))
