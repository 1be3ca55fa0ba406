"""``augment`` in Triton, through the interpreter, with the checks of every backend. Results must have the same bits."""

import pytest
import torch

import bnkern
from bnkern.train import cifar10
from tests.backends.triton.interpreter import interpreted
from tests.support.cases import Target
from tests.support.images import (
    BEYOND,
    CASES,
    FORMATS,
    Case,
    check_augment,
    check_augment_in_other_dtypes,
    check_fill,
    check_parts_of_a_batch,
    check_position_beyond_the_epoch,
)

pytest.importorskip("triton")

TRITON = Target("triton", "cpu")


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("layout", FORMATS)
def test_against_the_oracle(layout: str, case: Case) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        interpreted(check_augment, TRITON, dtype, layout, case)


def test_other_dtypes() -> None:
    for dtype in (torch.float16, torch.float64):
        interpreted(check_augment_in_other_dtypes, TRITON, dtype)


@pytest.mark.parametrize("case", BEYOND, ids=str)
def test_a_position_beyond_the_epoch(case: Case) -> None:
    interpreted(check_position_beyond_the_epoch, TRITON, case)


def test_parts_make_the_whole() -> None:
    interpreted(check_parts_of_a_batch, TRITON)


def filled(memory_format: torch.memory_format) -> None:
    split = cifar10.synthetic(50, 10).train
    with bnkern.use_backend("triton"):
        check_fill(TRITON, split, memory_format)


@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=str)
def test_batches(memory_format: torch.memory_format) -> None:
    interpreted(filled, memory_format)
