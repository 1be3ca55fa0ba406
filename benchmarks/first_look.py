"""The first three measurements on a GPU, which decide between one kernel and two: ``python benchmarks/first_look.py``.

What an empty launch costs with and without a barrier, and how fast copies are that stay in cache (first_look.cu); and
torch's own batch norm on the stages of a CIFAR ResNet, cuDNN (persistent in channels_last) against its native kernels.
One JSON object a line, as it comes.
"""

import json
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
STAGES = ((128, 16, 32, 32), (128, 32, 16, 16), (128, 64, 8, 8))
FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
CALLS, REPLAYS = 50, 21


def replayed(call) -> float:
    """Microseconds of one of CALLS calls within a graph, the median of REPLAYS replays."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()
    times = []
    for _ in range(REPLAYS + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return 1e3 * sorted(times[3:])[REPLAYS // 2] / CALLS


def batch_norm(shape: tuple[int, ...], memory_format: torch.memory_format, dtype: torch.dtype, cudnn: bool) -> dict:
    """Forward and backward of torch's batch norm, in training mode, L2-warm."""
    x = torch.randn(shape, device="cuda", dtype=dtype).contiguous(memory_format=memory_format).requires_grad_()
    vectors = [torch.rand(shape[1], device="cuda", requires_grad=k > 1) for k in range(4)]
    dy = torch.randn_like(x)
    with torch.backends.cudnn.flags(enabled=cudnn, benchmark=False, deterministic=False, allow_tf32=True):

        def forward() -> torch.Tensor:
            return F.batch_norm(x, *vectors, training=True)

        def both() -> None:
            torch.autograd.grad(forward(), (x, *vectors[2:]), dy)

        with torch.no_grad():
            forward_us = replayed(forward)
        return {"forward_us": forward_us, "both_us": replayed(both)}


def main() -> None:
    capability = torch.cuda.get_device_capability()
    program = ROOT / "build" / "first_look"
    program.parent.mkdir(exist_ok=True)
    target = f"-arch=sm_{capability[0]}{capability[1]}"
    source = str(ROOT / "benchmarks" / "first_look.cu")
    subprocess.run(["nvcc", "-std=c++20", "-O3", target, source, "-o", str(program)], check=True)
    sys.stdout.flush()
    subprocess.run([str(program)], check=False)
    for shape in STAGES:
        for name, memory_format in FORMATS.items():
            for dtype in (torch.float16, torch.float32, torch.bfloat16):
                for cudnn in (True, False):
                    found = {"what": "torch", "shape": shape, "format": name, "dtype": str(dtype), "cudnn": cudnn}
                    print(json.dumps(found | batch_norm(shape, memory_format, dtype, cudnn)), flush=True)


if __name__ == "__main__":
    main()
