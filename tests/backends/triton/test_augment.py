"""``augment`` in Triton, through the interpreter: the checks that every backend passes, bit for bit."""

import pytest
import torch

import bnkern
from bnkern.train import cifar10
from tests.backends.triton.interpreter import interpreted
from tests.support.cases import Target
from tests.train import test_augment as of_augment
from tests.train import test_cifar10 as of_cifar10

pytest.importorskip("triton")

TRITON = Target("triton", "cpu")


@pytest.mark.parametrize("case", of_augment.CASES, ids=str)
@pytest.mark.parametrize("layout", of_augment.FORMATS)
def test_against_the_oracle(layout: str, case: of_augment.Case) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        interpreted(of_augment.test_against_the_oracle, TRITON, dtype, layout, case)


def test_other_dtypes() -> None:
    for dtype in (torch.float16, torch.float64):
        interpreted(of_augment.test_other_dtypes, TRITON, dtype)


@pytest.mark.parametrize("case", of_augment.BEYOND, ids=str)
def test_a_position_beyond_the_epoch(case: of_augment.Case) -> None:
    interpreted(of_augment.test_a_position_beyond_the_epoch, TRITON, case)


def test_parts_make_the_whole() -> None:
    interpreted(of_augment.test_parts_make_the_whole, TRITON)


def filled(memory_format: torch.memory_format) -> None:
    split = cifar10.synthetic(50, 10).train
    with bnkern.use_backend("triton"):
        of_cifar10.test_fill_is_at_with_the_number_on_the_device(TRITON, split, memory_format)


@pytest.mark.parametrize("memory_format", of_cifar10.FORMATS, ids=str)
def test_batches(memory_format: torch.memory_format) -> None:
    interpreted(filled, memory_format)
