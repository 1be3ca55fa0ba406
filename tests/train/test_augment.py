"""``augment``: a batch gathered, cropped, flipped and normalised, against a slow oracle and, in bits, the reference.

Nothing here has a tolerance: values are looked up, not computed, and the random words are integers.
"""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from bnkern import backends
from bnkern.backends.reference.images import CROP, ORDER, philox, words
from tests.support.cases import Target

# Random123's known answers for philox4x32-10: counter, key, words.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]
FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


class Case(NamedTuple):
    """A batch of ``part`` images, those from ``first`` on of number ``position`` of ``size`` images, of ``n``."""

    name: str
    n: int
    size: int
    part: int
    first: int
    position: int
    seed: int = 1
    epoch: int = 0
    random: bool = True

    def __str__(self) -> str:
        return self.name


CASES = [
    Case("plain", 20, 6, 6, 0, 1, random=False),
    Case("moved", 20, 6, 6, 0, 1),
    Case("one_image", 5, 1, 1, 0, 4),
    Case("whole_split", 7, 7, 7, 0, 0),
    Case("last_of_three_ranks", 20, 6, 2, 4, 2),
    Case("high_seed", 20, 6, 6, 0, 0, seed=2**63),
    Case("highest", 20, 6, 6, 0, 0, seed=2**64 - 1, epoch=2**32 - 1),
    Case("late_epoch", 20, 6, 6, 0, 0, epoch=2**20 + 3),
    Case("high_word_of_the_seed", 20, 6, 6, 0, 0, seed=5 << 32),
]
BEYOND = [Case("before", 20, 6, 6, 0, -1), Case("short_batch", 20, 6, 6, 0, 3), Case("far", 20, 6, 6, 0, 2**40)]


def problem(case: Case, dtype: torch.dtype, layout: str, device: str = "cpu") -> tuple:
    """The arguments of a call on random images; its outputs, full of what must not stay, are the last but three."""
    generator = torch.Generator().manual_seed(case.n)
    images = torch.randint(1, 256, (case.n, 3, 32, 32), generator=generator, dtype=torch.uint8)  # 0 is the padding's
    images[0], images[-1] = 0, 255
    labels, order = torch.randint(0, 10, (case.n,), generator=generator), torch.randperm(case.n, generator=generator)
    seed = torch.tensor([case.seed], dtype=torch.uint64).view(torch.int64)
    state = torch.cat([seed, torch.tensor([case.epoch])])
    table = torch.randn(3, 256, generator=generator, dtype=torch.float64).to(dtype)
    tensors = (images, labels, order, state, torch.tensor(case.position), table)
    out = torch.full((case.part, 3, 32, 32), 99.0, dtype=dtype, device=device).contiguous(memory_format=FORMATS[layout])
    outputs = (out, torch.full((case.part,), 99, device=device))
    return (*(t.to(device) for t in tensors), *outputs, case.size, case.first, case.random)


def oracle(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Image by image, as one would with torchvision: pad, crop, flip, normalise."""
    images, labels, order, _, _, table, out, labels_out, *_ = problem(case, dtype, "nchw")
    for k in range(case.part):
        i = order[case.position * case.size + case.first + k].item()
        w0, w1, w2, _ = philox(words(case.seed), (case.epoch, i, CROP, 0))
        padded = torch.zeros(3, 40, 40, dtype=torch.uint8)
        padded[:, 4:36, 4:36] = images[i]
        down, right, flip = (w0 * 9 // 2**32, w1 * 9 // 2**32, w2 >= 2**31) if case.random else (4, 4, False)
        window = padded[:, down : down + 32, right : right + 32]
        window = window.flip(2) if flip else window
        out[k] = torch.stack([table[c][window[c].long()] for c in range(3)])
        labels_out[k] = labels[i]
    return out, labels_out


def same(one: Tensor, other: Tensor) -> bool:
    """Whether all values are, and lie, the same; NaN is NaN."""
    return one.stride() == other.stride() and torch.equal(one.nan_to_num(1e4), other.nan_to_num(1e4))


def augment(target: Target, case: Case, dtype: torch.dtype, layout: str) -> tuple[Tensor, Tensor]:
    arguments = problem(case, dtype, layout, target.device)
    backends.choose(target.backend, target.device, dtype, "augment").augment(*arguments)
    return tuple(t.cpu() for t in arguments[6:8])


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_against_the_oracle(target: Target, dtype: torch.dtype, layout: str, case: Case) -> None:
    images, labels = augment(target, case, dtype, layout)
    expected, numbers = oracle(case, dtype)
    assert same(images, expected.contiguous(memory_format=FORMATS[layout]))
    assert torch.equal(labels, numbers)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_other_dtypes(target: Target, dtype: torch.dtype) -> None:
    for layout in FORMATS:
        images, _ = augment(target, CASES[1], dtype, layout)
        assert same(images, oracle(CASES[1], dtype)[0].contiguous(memory_format=FORMATS[layout]))


MANY = Case("many", 3000, 3000, 3000, 0, 0, seed=2**40 + 1, epoch=2)


def test_many_images_as_the_reference(target: Target) -> None:
    """Every crop and flip there is, many times over, and enough images for several threads."""
    images, labels = augment(target, MANY, torch.float32, "nchw")
    expected, numbers = augment(Target("reference", "cpu"), MANY, torch.float32, "nchw")
    assert same(images, expected) and torch.equal(labels, numbers)


@pytest.mark.parametrize("case", BEYOND, ids=str)
def test_a_position_beyond_the_epoch(target: Target, case: Case) -> None:
    """Refused where the host can look; elsewhere nothing strange is read, and what comes out cannot be mistaken."""
    if target.backend == "cpu":
        with pytest.raises(IndexError, match=f"position must be 0 to 2, got {case.position}"):
            augment(target, case, torch.float32, "nchw")
    else:
        images, labels = augment(target, case, torch.float32, "nchw")
        assert images.isnan().all() and (labels == -1).all()


def test_parts_make_the_whole(target: Target) -> None:
    """Two ranks' parts are the halves of the whole."""
    whole = augment(target, Case("", 20, 6, 6, 0, 1), torch.float32, "nchw")
    parts = [augment(target, Case("", 20, 6, 3, first, 1), torch.float32, "nchw") for first in (0, 3)]
    for one, *halves in zip(whole, *parts, strict=True):
        assert torch.equal(one, torch.cat(halves))


def test_any_number_of_threads(threads: None) -> None:
    results = []
    for count in (1, 2, 3, 8):
        torch.set_num_threads(count)
        results.append(augment(Target("cpu", "cpu"), MANY, torch.bfloat16, "channels_last")[0])
    assert all(same(result, results[0]) for result in results)


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
    """Of 90,000 images each offset takes a ninth and each side a half, to 5 standard deviations."""
    n = 90_000
    w0, w1, w2, _ = philox(words(0), (0, torch.arange(n), CROP, 0))
    for offsets in (w0 * 9 >> 32, w1 * 9 >> 32):
        counts = torch.bincount(offsets, minlength=9)
        assert len(counts) == 9
        assert ((counts - n / 9).abs() < 5 * (n * 1 / 9 * 8 / 9) ** 0.5).all()
    assert abs((w2 >> 31).sum().item() - n / 2) < 5 * (n / 4) ** 0.5


def test_streams_and_epochs_are_apart() -> None:
    """No word of one key, stream, epoch and image is that of another, but by chance (2^-32 each)."""
    drawn = [
        torch.stack(philox(words(seed), (epoch, torch.arange(500), stream, 0)))
        for seed in (0, 1, 1 << 32)
        for epoch in (0, 1, 2**20)
        for stream in (ORDER, CROP)
    ]
    numbers = torch.stack(drawn)[:, :2].transpose(1, 2).reshape(-1, 2)
    assert len(numbers.unique(dim=0)) == len(numbers)
