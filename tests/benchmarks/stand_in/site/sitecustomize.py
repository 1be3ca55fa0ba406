"""Makes torch report a GPU, as tests/benchmarks/stand_in describes. Python imports this file at the start."""

import contextlib
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.overrides import TorchFunctionMode

SAMPLES = Path(__file__).resolve().parent.parent / "samples"
H200 = SimpleNamespace(
    name="NVIDIA H200",
    major=9,
    minor=0,
    total_memory=140 << 30,
    multi_processor_count=132,
    L2_cache_size=1 << 14,  # small, so that few sets of buffers are needed to exceed it
    shared_memory_per_block_optin=227 << 10,
    shared_memory_per_multiprocessor=228 << 10,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    warp_size=32,
)


def _on_cpu(value: object) -> object:
    """The value with CUDA devices replaced by the CPU."""
    if isinstance(value, torch.device) and value.type == "cuda":
        return torch.device("cpu")
    if isinstance(value, str) and value.startswith("cuda"):
        return "cpu"
    return value


class TensorsOnCpu(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.device:  # a device by itself may be a GPU
            return function(*args, **kwargs or {})
        kwargs = {name: _on_cpu(value) for name, value in (kwargs or {}).items()}
        return function(*map(_on_cpu, args), **kwargs)


class Event:
    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> None:
        self.seconds = 0.0

    def record(self, stream: object = None) -> None:
        self.seconds = time.perf_counter()

    def elapsed_time(self, end: "Event") -> float:
        return 1e3 * (end.seconds - self.seconds) + 1e-3

    def synchronize(self) -> None: ...
    def wait(self, stream: object = None) -> None: ...


class Stream:
    cuda_stream = 0

    def __init__(self, device: object = None, priority: int = 0) -> None: ...
    def wait_stream(self, stream: "Stream") -> None: ...
    def wait_event(self, event: Event) -> None: ...
    def synchronize(self) -> None: ...


class Graph:
    def replay(self) -> None: ...
    def pool(self) -> None: ...


class Profile(contextlib.nullcontext):
    """A profiler whose trace is a sample."""

    def __init__(self, activities: list[torch.profiler.ProfilerActivity]) -> None:
        super().__init__(self)

    def export_chrome_trace(self, path: str) -> None:
        shutil.copy(SAMPLES / "trace.json", path)


def _compile(module: torch.nn.Module, *, fullgraph: bool, dynamic: bool, mode: str = "default", options=None):
    """Checks the arguments of torch.compile and compiles nothing."""
    if mode != "default":
        torch._inductor.list_mode_options(mode)
    available = torch._inductor.list_options()
    assert all(name in available for name in options or {}), options
    return module


torch.version.cuda = "13.0"
torch.compile = _compile
torch.profiler.profile = Profile
for name, replacement in {
    "is_available": lambda: True,
    "_lazy_init": lambda: None,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "set_device": lambda device: None,
    "get_device_properties": lambda device=None: H200,
    "get_device_name": lambda device=None: H200.name,
    "get_device_capability": lambda device=None: (9, 0),
    "mem_get_info": lambda device=None: (130 << 30, 140 << 30),
    "max_memory_allocated": lambda device=None: 1 << 20,
    "memory_allocated": lambda device=None: 1 << 19,
    "reset_peak_memory_stats": lambda device=None: None,
    "empty_cache": lambda: None,
    "synchronize": lambda device=None: None,
    "is_current_stream_capturing": lambda: False,
    "get_rng_state": lambda device=None: torch.get_rng_state(),
    "set_rng_state": lambda state, device=None: None,
    "device": lambda device: contextlib.nullcontext(),
    "stream": lambda stream: contextlib.nullcontext(),
    "graph": lambda graph, pool=None, stream=None: contextlib.nullcontext(),
    "current_stream": lambda device=None: Stream(),
    "Stream": Stream,
    "Event": Event,
    "CUDAGraph": Graph,
}.items():
    assert hasattr(torch.cuda, name), name
    setattr(torch.cuda, name, replacement)
torch.cuda.profiler.start = torch.cuda.profiler.stop = lambda: None
TensorsOnCpu().__enter__()


def _replace_parts_of_bnkern() -> None:
    """Backends that compute on the CPU, and few images, layers, epochs and rounds."""
    from benchmarks.cases import shapes, steps, traffic
    from benchmarks.tools import timing
    from bnkern import backends
    from bnkern.backends import cuda, cuda_conv, reference
    from bnkern.train import cifar10, config, step
    from bnkern.train.cifar10 import sets

    small = {"depth": 8, "batch": 2}

    refuses, load, loop_step, synthetic = cuda.refuses, backends._load, steps.loop_step, sets.synthetic
    cuda.refuses = lambda device, dtype: refuses(torch.device("cuda", 0), dtype)
    cuda._queried[H200.name] = (66, 32, 16)  # CUDA cannot be asked
    backends._load = lambda name: reference if name == "triton" else load(name)
    cuda_conv.conv_norm_forward = reference.conv_norm_forward
    shapes.SHAPES = {
        name: (min(n, 2), c, *(min(side, 8) for side in space)) for name, (n, c, *space) in shapes.SHAPES.items()
    }
    timing.rounds_within = lambda budget_s, round_s: 2
    timing.MOST_SETS = 2
    traffic.COPY_BYTES = 1 << 20
    steps.loop_step = lambda config, *rest, **options: loop_step(config.replace(**small), *rest, **options)
    step.WARM_UP = 1
    config.PRESETS = {name: run.replace(epochs=1, **small) for name, run in config.PRESETS.items()}
    cifar10.synthetic = sets.synthetic = lambda train=16, test=16, **seed: synthetic(train, test, **seed)


_replace_parts_of_bnkern()
