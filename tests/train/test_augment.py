"""``augment``, which gathers, crops, flips and normalises a batch, compared with a slow oracle and the reference.

No test has a tolerance, because values are looked up in a table, and the random words are integers.
"""

import pytest
import torch

from bnkern.backends.reference.images import CROP, ORDER, philox, words
from tests.support.cases import Target
from tests.support.images import (
    BEYOND,
    CASES,
    FORMATS,
    MANY,
    Case,
    augment,
    check_augment,
    check_augment_in_other_dtypes,
    check_parts_of_a_batch,
    check_position_beyond_the_epoch,
    same,
)

# Random123's published results for philox4x32-10: counter, key, words.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def test_many_images_as_the_reference(target: Target) -> None:
    """All crops and flips occur many times, and there are enough images for several threads."""
    images, labels = augment(target, MANY, torch.float32, "nchw")
    expected, numbers = augment(Target("reference", "cpu"), MANY, torch.float32, "nchw")
    assert same(images, expected) and torch.equal(labels, numbers)


def test_any_number_of_threads(threads: None) -> None:
    results = []
    for count in (1, 2, 3, 8):
        torch.set_num_threads(count)
        results.append(augment(Target("cpu", "cpu"), MANY, torch.bfloat16, "channels_last")[0])
    assert all(same(result, results[0]) for result in results)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_against_the_oracle(target: Target, dtype: torch.dtype, layout: str, case: Case) -> None:
    check_augment(target, dtype, layout, case)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_other_dtypes(target: Target, dtype: torch.dtype) -> None:
    check_augment_in_other_dtypes(target, dtype)


@pytest.mark.parametrize("case", BEYOND, ids=str)
def test_a_position_beyond_the_epoch(target: Target, case: Case) -> None:
    check_position_beyond_the_epoch(target, case)


def test_parts_make_the_whole(target: Target) -> None:
    check_parts_of_a_batch(target)


# ------------------------------------------------------------------------------------------------ random numbers


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_philox_gives_the_known_answers(counter: str, key: str, answer: str) -> None:
    c, k, expected = ([int(word, 16) for word in text.split()] for text in (counter, key, answer))
    assert list(philox(k, c)) == expected
    tensors = philox([torch.tensor([w, w]) for w in k], [torch.tensor([w, w]) for w in c])
    assert [t.tolist() for t in tensors] == [[w, w] for w in expected]


def test_words_are_those_of_the_seed_s_bits() -> None:
    for seed in (0, 1, 2**32 + 7, 2**63, 2**64 - 1):
        assert words(seed) == (seed % 2**32, seed // 2**32)
        signed = torch.tensor([seed], dtype=torch.uint64).view(torch.int64)
        assert tuple(w.item() for w in words(signed)) == words(seed)


def test_crops_and_flips_are_even() -> None:
    """Of 90,000 images a ninth has each offset and half are flipped, to 5 standard deviations."""
    n = 90_000
    w0, w1, w2, _ = philox(words(0), (0, torch.arange(n), CROP, 0))
    for offsets in (w0 * 9 >> 32, w1 * 9 >> 32):
        counts = torch.bincount(offsets, minlength=9)
        assert len(counts) == 9
        assert ((counts - n / 9).abs() < 5 * (n * 1 / 9 * 8 / 9) ** 0.5).all()
    assert abs((w2 >> 31).sum().item() - n / 2) < 5 * (n / 4) ** 0.5


def test_streams_and_epochs_are_apart() -> None:
    """Words of different keys, streams, epochs and images differ, except by chance (2^-32 each)."""
    drawn = [
        torch.stack(philox(words(seed), (epoch, torch.arange(500), stream, 0)))
        for seed in (0, 1, 1 << 32)
        for epoch in (0, 1, 2**20)
        for stream in (ORDER, CROP)
    ]
    numbers = torch.stack(drawn)[:, :2].transpose(1, 2).reshape(-1, 2)
    assert len(numbers.unique(dim=0)) == len(numbers)
