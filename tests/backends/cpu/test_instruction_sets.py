"""All instruction sets of the native module that this machine supports give the same bits.

A process chooses its instruction set once, so each set runs in a separate process, which prints digests of all results.
"""

import hashlib
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from bnkern import _native
from bnkern.backends import cpu
from bnkern.backends.calls import BackwardCall, ForwardCall
from tests import ROOT
from tests.backends.cpu.results import LARGE, all_results
from tests.support.cases import CASE, FEW, MIXED, Target
from tests.support.images import FORMATS, MANY, augment
from tests.support.updates import CASES, FP64, call_of, update
from tests.support.winograd import SIZES, gradient_of, operands


def run_child(isa: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "tests.backends.cpu.test_instruction_sets"],
        cwd=ROOT,
        env=os.environ | {"BNKERN_ISA": isa},
        capture_output=True,
        text=True,
    )


def digests(isa: str) -> list[str]:
    process = run_child(isa)
    if "this machine cannot run it" in process.stderr:
        pytest.skip(f"this machine does not run {isa}")
    assert process.returncode == 0, process.stderr
    first, *lines = process.stdout.splitlines()
    assert first == isa
    return lines


@pytest.mark.parametrize("isa", [isa for isa in _native.build_info()["isas"] if isa != _native.isa()])
def test_same_bits_as_the_instruction_set_in_use(isa: str) -> None:
    for expected, actual in zip(digests(_native.isa()), digests(isa), strict=True):
        assert expected == actual


def test_an_unknown_instruction_set_is_refused() -> None:
    process = run_child("sse9")
    assert process.returncode != 0 and "BNKERN_ISA=sse9" in process.stderr


def chain_and_direct(x: Tensor, weight: Tensor, dy: Tensor) -> list[Tensor]:
    """Results of a convolution between two batch norms, and of a strided one with its input gradient."""
    vectors = torch.linspace(-0.5, 0.5, x.shape[1]), torch.ones(x.shape[1])
    call = ForwardCall(x, residual=x, act="relu", save_mask=True)
    y, mask, r, mean, invstd = cpu.conv_norm_forward(call, *vectors, True, weight, None, ForwardCall(None))
    behind = BackwardCall(dy, r, None, None, mean, invstd)
    before = BackwardCall(None, x, None, None, *vectors, mask, "relu")
    g, sums, *_ = cpu.grad_before_act(behind)
    backward = cpu.conv_norm_backward(behind, sums, weight, before, y, None, (True, True))
    small = cpu.conv_direct(x, weight, (2, 2), (1, 1))
    dx = cpu.conv_direct(small, weight, (2, 2), (1, 1), tuple(x.shape[2:]))
    return [t for t in (y, mask, r, mean, invstd, g, sums, *backward, small, dx) if t is not None]


def main() -> None:
    print(_native.isa())
    torch.set_num_threads(2)
    for case in [*FEW, *LARGE, CASE["inf_rows"], CASE["ratio_1e4"]]:
        for precision in MIXED:
            bits = hashlib.sha256()
            for result in all_results(Target("cpu", "cpu"), case, precision):
                # The sign and payload of a NaN are not specified.
                result = torch.where(result.isnan(), torch.nan, result) if result.is_floating_point() else result
                bits.update(result.contiguous().view(torch.uint8).numpy().tobytes())
            print(case, precision.name, bits.hexdigest())
    for sizes in SIZES:
        x, weight, dy = operands(*sizes)
        for result in (
            cpu.conv3x3(x, weight).permute(0, 2, 3, 1),
            gradient_of(x, dy),
            *chain_and_direct(x, weight, dy),
        ):
            print(sizes, hashlib.sha256(result.contiguous().numpy().tobytes()).hexdigest())
    for precision in MIXED:
        for layout in FORMATS:
            images, _ = augment(Target("cpu", "cpu"), MANY, precision.dtype, layout)
            bits = hashlib.sha256(images.contiguous().view(torch.uint8).numpy().tobytes())
            print(MANY, layout, precision.name, bits.hexdigest())
    for cases, dtype in ((CASES, torch.float32), (FP64, torch.float64)):
        for case in cases:
            bits = hashlib.sha256()
            for result in update(Target("cpu", "cpu"), call_of(case, dtype)).results():
                bits.update(result.contiguous().view(torch.uint8).numpy().tobytes())
            print(case, dtype, bits.hexdigest())


if __name__ == "__main__":
    main()
