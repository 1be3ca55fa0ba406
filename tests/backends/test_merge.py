"""The phase ``merge``: moments of parts to moments of the whole."""

import pytest
import torch

from bnkern import backends
from bnkern.backends import reference
from tests.support.cases import CASE, FP32, FP64, Precision, Target, assert_close, exact, mean_bound, var_bound


def parts_of(x: torch.Tensor, sizes: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Counts [K], means and M2s [K, C] of x split into samples, by the reference."""
    parts = [reference.moments(part) for part in x.split(sizes)]
    counts, means, m2s = zip(*parts, strict=True)
    return torch.tensor(counts, device=x.device), torch.stack(means), torch.stack(m2s)


@pytest.mark.parametrize("precision", [FP32, FP64], ids=lambda p: p.name)
@pytest.mark.parametrize("case", ["ratio_100", "ratio_1e4", "ratio_1e4_nc", "outlier", "constant"])
@pytest.mark.parametrize("split", ["one", "even", "uneven", "with_empty"])
def test_parts_make_the_whole(target: Target, precision: Precision, case: str, split: str) -> None:
    x = CASE[case].problem(precision, target.device).x
    n = x.shape[0]
    sizes = {"one": [n], "even": [n // 4] * 4, "uneven": [1, n - 3, 2], "with_empty": [0, n - 1, 0, 1, 0]}[split]
    counts, means, m2s = parts_of(x, sizes)
    merge = backends.choose(target.backend, target.device, x.dtype).merge
    count, mean, m2 = merge(counts, means, m2s)
    # The truth of the merge is that of the parts given, exact from there on.
    true_count, true_mean, true_m2 = reference.merge(counts.cpu(), *exact(means, m2s))
    assert count == true_count
    true_var = true_m2 / true_count
    assert_close(mean, true_mean, mean_bound(true_mean, true_var, x.dtype), "mean")
    assert_close(m2 / true_count, true_var, var_bound(true_mean, true_var, x.dtype), "variance")
    # And the reference's merge, in float64, gives the moments of the undivided tensor.
    wide_count, wide_mean, wide_m2 = reference.moments(*exact(x))
    _, mean_of_parts, m2_of_parts = reference.merge(*parts_of(exact(x)[0], sizes))
    assert count == wide_count
    torch.testing.assert_close(mean_of_parts, wide_mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(m2_of_parts, wide_m2, rtol=1e-7, atol=1e-20)


def test_nothing_merges_to_nothing(target: Target) -> None:
    """Parts of count 0 have no mean, whatever they hold; all of them together give zeros, not 0/0."""
    merge = backends.choose(target.backend, target.device, torch.float32).merge
    counts = torch.zeros(3, dtype=torch.int64, device=target.device)
    nan = torch.full((3, 4), torch.nan, device=target.device)
    count, mean, m2 = merge(counts, nan, nan)
    assert count == 0
    assert mean.tolist() == m2.tolist() == [0.0] * 4


def test_counts_beyond_float32(target: Target) -> None:
    """Counts are integers: 2^24 + 1 and 2^33 + 1 are kept, though float32 holds neither."""
    merge = backends.choose(target.backend, target.device, torch.float32).merge
    counts = torch.tensor([2**33 + 1, 2**24 + 1], device=target.device)
    count, mean, m2 = merge(counts, torch.ones(2, 3, device=target.device), torch.zeros(2, 3, device=target.device))
    assert count == 2**33 + 2**24 + 2
    assert mean.tolist() == [1.0] * 3
    assert m2.tolist() == [0.0] * 3
