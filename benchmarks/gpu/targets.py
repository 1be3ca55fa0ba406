"""The stated targets for GPUs, where each is stated, and what this run measured of it."""

from collections.abc import Callable, Iterator
from statistics import geometric_mean
from typing import NamedTuple

FIRST = "docs/log/2026-11.md, first minutes on a GPU"
COPY = 3.8e12  # bytes per second that a copy of 1 GB reads and writes together on an H200, from the same entry


class Run(NamedTuple):
    """What a run has measured: the measurements of all benchmarks, and the tests of each part of tests."""

    measurements: list[dict]
    failed_tests: dict[str, int | None]  # None: the part did not end, so its tests are not all known to pass

    def of(self, bench: str, **labels: object) -> Iterator[dict]:
        for m in self.measurements:
            if m["bench"] == bench and "median_ms" in m and all(m[name] == value for name, value in labels.items()):
                yield m

    def time(self, bench: str, **labels: object) -> float | None:
        """The last measurement of a case, in milliseconds."""
        return next((m["median_ms"] for m in reversed([*self.of(bench, **labels)])), None)


class Target(NamedTuple):
    name: str
    bar: float
    at_most: bool
    source: str
    measure: Callable[[Run], float | None]  # None: not measured

    def verdict(self, run: Run) -> tuple[str, float | None]:
        value = self.measure(run)
        if value is None:
            return "not measured", None
        return ("held" if (value <= self.bar if self.at_most else value >= self.bar) else "missed"), value


def over_best_of_torch(run: Run, network: str) -> float | None:
    """The time of torch's best form over ours. Forms compiled by torch.compile were measured in rounds of their own.

    A form that was not measured is left out, except that eager must have been measured.
    """
    ratios = []
    for m in (*run.of("graph", op=network, dtype="bf16"), *run.of("compiled_graph", op=network, dtype="bf16")):
        if m["provider"].startswith(("eager", "compile")):
            ours = run.time(m["bench"], op=network, dtype="bf16", provider="bnkern")
            ratios.append(m["median_ms"] / ours if ours else None)
    return min(ratios) if ratios and None not in ratios else None


def over_eager_called(run: Run, bench: str, combine: Callable) -> float | None:
    ratios = [
        m["speedup"]["best"] for m in run.of(bench, op="bn_add_relu", mode="call", provider="bnkern") if "speedup" in m
    ]
    return combine(ratios) if ratios else None


def over_bytes(run: Run) -> float | None:
    """The largest time of a batch norm of the first two stages in bf16, over that of its bytes at a copy's rate."""
    factors = [
        m["median_ms"] * 1e-3 / (m["bytes"] / COPY)
        for shape in ("stage1", "stage2")
        for m in run.of("batch_norm", shape=shape, dtype="bf16", mode="graph", provider="bnkern")
    ]
    return max(factors) if factors else None


def replicas(run: Run, network: str) -> float | None:
    """Images per second of four runs side by side over those of one."""
    four, one = (
        run.time("replicas", op=network, provider=name) for name in ("bnkern, four side by side", "bnkern, one")
    )
    return 4 * one / four if four and one else None


def recorded(run: Run, network: str) -> float | None:
    times = [
        m["times"]["unprobed"]
        for m in run.of("recorded_graph", op=f"{network} in a graph", provider="recorded", dtype="bf16")
    ]
    return times[-1] if times else None


def conv_norm(run: Run) -> float | None:
    """The time of batch norm inside the convolution over that of cuDNN's convolution and our batch norm, stage 1."""
    ours, apart = (
        run.time("conv_norm", shape="stage1", mode="graph", provider=name) for name in ("bnkern", "cudnn and bnkern")
    )
    return ours / apart if ours and apart else None


def failures(*parts: str) -> Callable[[Run], float | None]:
    def measure(run: Run) -> float | None:
        counts = [run.failed_tests[part] for part in parts if part in run.failed_tests]
        return None if len(counts) < len(parts) or None in counts else float(sum(counts))

    return measure


def _targets() -> Iterator[Target]:
    for depth, before in ((20, 1.73), (110, 8.65)):
        network = f"resnet{depth}"
        yield Target(
            f"ResNet-{depth} step in a graph, torch's best form over ours",
            1.3,
            False,
            f"{FIRST}: asked 1.3 times",
            lambda run, network=network: over_best_of_torch(run, network),
        )
        yield Target(
            f"ResNet-{depth} step in a graph, ms, no slower than before (+3 %)",
            1.03 * before,
            True,
            "docs/performance.md, NVIDIA H200",
            lambda run, network=network: run.time("graph", op=network, dtype="bf16", provider="bnkern"),
        )
        yield Target(
            f"ResNet-{depth}, images/s of four replicas over one",
            1.5,
            False,
            "benchmarks/train/bench_step.py, test_replicas",
            lambda run, network=network: replicas(run, network),
        )
        yield Target(
            f"ResNet-{depth} step that records every layer, over one that does not",
            1.02,
            True,
            "docs/log/2026-11.md, records in Triton's kernels",
            lambda run, network=network: recorded(run, network),
        )
    host = "docs/log/2026-11.md, one call, one way in: no more than torch's dispatch"
    yield Target(
        "Smallest call, speed over torch's, slower layout",
        1.0,
        False,
        host,
        lambda run: over_eager_called(run, "overhead", min),
    )
    yield Target(
        "Calls one by one, speed over torch's, geometric mean",
        1.0,
        False,
        host,
        lambda run: over_eager_called(run, "batch_norm", geometric_mean),
    )
    yield Target(
        "Batch norm in a graph over its bytes at a copy's rate, largest",
        3.0,
        True,
        f"{FIRST}: a factor of 3 and more is left",
        over_bytes,
    )
    # The exit rule of csrc/cuda/conv_norm_forward.cu: it is dropped if its first run on hardware misses this.
    yield Target(
        "Batch norm inside the convolution, stage 1 forward, over apart",
        0.5,
        True,
        "benchmarks/conv/bench_conv_norm.py, exit rule",
        conv_norm,
    )
    yield Target(
        "Failed tests of batch norm inside the convolution",
        0,
        True,
        "tests/backends/cuda/test_conv_norm.py",
        failures("conv-norm-tests"),
    )
    yield Target("Failed tests of the CUDA kernels", 0, True, "tests/backends/cuda/test_gpu.py", failures("cuda-tests"))
    yield Target("Failed tests of training on a GPU", 0, True, "tests/train/test_gpu.py", failures("train-tests"))
    yield Target("Failed tests under memcheck", 0, True, "docs/design.md, has not run there", failures("memcheck"))
    yield Target("Failed tests under racecheck", 0, True, "docs/design.md, has not run there", failures("racecheck"))


TARGETS = tuple(_targets())


def table(run: Run) -> list[str]:
    """One line for each target: held, missed or not measured, with the number."""
    lines = [f"{'target':<66} {'asked':>9} {'measured':>9}  verdict       stated in"]
    for target in TARGETS:
        verdict, value = target.verdict(run)
        asked = f"{'<=' if target.at_most else '>='} {target.bar:.3g}"
        shown = "" if value is None else f"{value:.3g}"
        lines.append(f"{target.name:<66} {asked:>9} {shown:>9}  {verdict:<12}  {target.source}")
    return lines
