"""The phase ``merge``: moments of the whole from moments of its parts."""

import pytest

from tests.support.cases import FP32, FP64, Precision, Target
from tests.support.phases import check_merge, check_merge_counts, check_merge_of_nothing


@pytest.mark.parametrize("precision", [FP32, FP64], ids=lambda p: p.name)
@pytest.mark.parametrize("case", ["ratio_100", "ratio_1e4", "ratio_1e4_nc", "outlier", "constant"])
@pytest.mark.parametrize("split", ["one", "even", "uneven", "with_empty"])
def test_parts_make_the_whole(target: Target, precision: Precision, case: str, split: str) -> None:
    check_merge(target, precision, case, split)


def test_empty_parts_merge_to_zeros(target: Target) -> None:
    check_merge_of_nothing(target)


def test_counts_beyond_float32(target: Target) -> None:
    check_merge_counts(target)
