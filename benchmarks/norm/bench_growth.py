"""How the time grows with N, C and S, one at a time, beyond the size of the caches, and with the depth of a network.

One axis grows by factors of four while the others are fixed. Along each axis tensors grow from 0.4 to 103 MB. If only
one curve bends upwards, its time is not proportional to the bytes.
"""

from collections.abc import Callable
from math import prod

import pytest
import torch

from benchmarks.cases import peers, shapes, traffic
from benchmarks.cases.norms import differentiate
from benchmarks.cases.shapes import LAYOUTS, Case, Inputs
from benchmarks.cases.steps import ACTIVATION_BYTES, networks, training_step

AXES = {name: (axis, size) for axis, sizes in shapes.GROWTH.items() for name, size in sizes.items()}
DEPTHS = (8, 20, 44, 80, 110)


def cases(device: torch.device) -> list[Case]:
    return [Case(name, layout, "fp32") for name in AXES for layout in LAYOUTS]


def point(axis: str, value: int) -> Callable[[object], dict]:
    """The entries that make a measurement a point of a curve."""
    return lambda output: {"axis": axis, "value": value}


def test_growth(case: Case, mode: str, inputs: Inputs, device: torch.device, compare: Callable) -> None:
    n, c, *plane = case.size
    axis = AXES[case.shape][0] if case.shape in AXES else "N"  # --quick has another shape
    modules = peers.batch_norms(c, "relu", device)
    moved = traffic.moved(("forward", "backward"), "bn_add_relu", case.elements, case.itemsize)
    compare(
        "bn_add_relu",
        case,
        {name: lambda data, m=modules[name]: differentiate(m, data) for name in ("bnkern", "eager", "eager in place")},
        make_data=lambda: inputs.clone().requiring_grad(),
        mode=mode,
        moved=lambda name: moved,
        check=point(axis, {"N": n, "C": c, "S": prod(plane)}[axis]),
        budget_s=1.0,
    )


@pytest.mark.parametrize("depth", DEPTHS)
def test_growth_by_depth(depth: int, device: torch.device, quick: bool, compare: Callable) -> None:
    """A training step at batch 32, channels_last."""
    if quick and depth != DEPTHS[0]:
        pytest.skip("--quick measures only the smallest depth")
    case = Case("few_images" if quick else "images32", "channels_last", "fp32")
    batch = torch.randn(case.size, device=device), torch.randint(10, case.size[:1], device=device)
    builders = networks(depth, None)
    compare(
        f"resnet{depth}",
        case,
        {
            name: training_step(builders[name]().to(device), case.layout)
            for name in ("bnkern", "eager", "eager in place", "no norm")
        },
        make_data=lambda: batch,
        check=point("depth", depth),
        nbytes=ACTIVATION_BYTES,
        budget_s=3.0,
    )
