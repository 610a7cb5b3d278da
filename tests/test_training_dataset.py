import math
import zipfile
from pathlib import Path

import pytest
import torch
from training_data import PREPROCESSING, SIDE, archive, coloured, folder

from models.errors import DatasetError
from models.training import dataset
from models.training.dataset import Dataset, load, stratified_split

BAD = {"red/broken.png": b"\x89PNG\r\n\x1a\nnothing"}


def load_all(path: Path, **options: object) -> Dataset:
    return load(path, PREPROCESSING, **{"val_fraction": 0.25, "seed": 0, **options})  # type: ignore[arg-type]


def sizes(data: Dataset) -> list[int]:
    return [len(data.rows[part]) for part in dataset.PARTS]


def test_class_folders_are_split_by_class(tmp_path: Path) -> None:
    data = load_all(folder(tmp_path, coloured(8)))
    assert data.classes == ("blue", "green", "red")
    assert sizes(data) == [18, 6, 0]
    assert data.labels[data.rows["val"]].bincount().tolist() == [2, 2, 2]


def test_pixels_are_what_decode_gives_and_in_channels_last_memory(tmp_path: Path) -> None:
    data = load_all(folder(tmp_path, coloured(4)))
    assert data.pixels.shape == (12, 3, SIDE, SIDE)
    assert data.pixels.is_contiguous(memory_format=torch.channels_last)
    means = data.pixels.float().mean(dim=(2, 3))  # (12, 3): the class's own colour is the brightest
    assert torch.equal(means.argmax(dim=1), 2 - data.labels)


def test_given_parts_are_kept(tmp_path: Path) -> None:
    files = coloured(4, "train/") | coloured(2, "val/", seed=50) | coloured(1, "test/", seed=60)
    assert sizes(load_all(folder(tmp_path, files))) == [12, 6, 3]


def test_without_val_a_part_of_train_is_held_out_and_test_is_left_alone(tmp_path: Path) -> None:
    files = coloured(4, "train/") | coloured(2, "test/", seed=60)
    assert sizes(load_all(folder(tmp_path, files))) == [9, 3, 6]


@pytest.mark.parametrize("top", [pytest.param("", id="plain"), pytest.param("photos/", id="wrapped in one folder")])
def test_a_zip_is_the_same_dataset_as_its_folder(tmp_path: Path, top: str) -> None:
    files = coloured(4, "train/") | coloured(2, "val/", seed=50)
    one = load_all(folder(tmp_path / "dir", files))
    other = load_all(archive(tmp_path / "a.zip", {top + name: content for name, content in files.items()}))
    assert one.sha256 == other.sha256
    assert torch.equal(one.pixels, other.pixels)
    assert torch.equal(one.rows["val"], other.rows["val"])


def test_the_hash_follows_the_content(tmp_path: Path) -> None:
    files = coloured(2)
    one = load_all(folder(tmp_path / "one", files)).sha256
    files["red/000.png"] = files["red/001.png"]
    assert load_all(folder(tmp_path / "two", files)).sha256 != one


def test_hidden_files_are_no_part_of_it(tmp_path: Path) -> None:
    hidden = {"__MACOSX/red/000.png": b"x", "red/.DS_Store": b"x", ".git/config": b"x", "README.txt": b"x"}
    data = load_all(archive(tmp_path / "a.zip", coloured(2) | hidden))
    assert (data.classes, len(data.pixels), data.bad) == (("blue", "green", "red"), 6, ())


def test_members_outside_the_archive_are_only_names(tmp_path: Path) -> None:
    evil = {"../../red/evil.png": b"x", "/red/evil.png": coloured(1)["red/000.png"]}
    load_all(archive(tmp_path / "a.zip", coloured(9) | evil))
    assert [path.name for path in tmp_path.iterdir()] == ["a.zip"]


def test_a_bad_file_is_named_and_left_out(tmp_path: Path) -> None:
    data = load_all(folder(tmp_path, coloured(4) | BAD))
    assert [file.path for file in data.bad] == ["red/broken.png"]
    assert "PNG" in data.bad[0].reason
    assert sum(sizes(data)) == 12


def test_fail_stops_at_a_bad_file(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"red/broken\.png"):
        load_all(folder(tmp_path, coloured(4) | BAD), on_bad_file="fail")


def test_too_many_bad_files_are_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="2 of 8 files"):
        load_all(folder(tmp_path, coloured(2) | BAD | {"blue/text.png": b"hello"}))


def test_an_encrypted_or_damaged_member_is_a_bad_file(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.zip", coloured(4))
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as source:
        start = source.getinfo("red/000.png").header_offset
    content[start + 60] ^= 0xFF  # a byte of the first red image: its checksum no longer fits
    path.write_bytes(content)
    assert [file.path for file in load_all(path).bad] == ["red/000.png"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        pytest.param({}, "0 classes", id="empty"),
        pytest.param({"red/000.png": coloured(1)["red/000.png"]}, "1 classes", id="one class"),
        pytest.param(coloured(1), "at least 2 are needed", id="one image per class"),
        pytest.param(coloured(2, "train/") | {"val/pink/1.png": b"x"}, "val/pink: no such class", id="strange class"),
    ],
)
def test_what_is_no_dataset_says_why(tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        load_all(folder(tmp_path, files))


def test_neither_folder_nor_zip(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"x")
    with pytest.raises(DatasetError, match="neither a folder nor a zip"):
        load_all(tmp_path / "a.tar")


def test_large_datasets_lie_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = load_all(folder(tmp_path, coloured(4)))
    monkeypatch.setattr(dataset, "MAX_BYTES_IN_MEMORY", 0)
    assert torch.equal(load_all(tmp_path).pixels, small.pixels)


def test_the_split_follows_the_seed() -> None:
    labels = torch.arange(2).repeat_interleave(50)
    first, again, other = (stratified_split(torch.arange(100), labels, ("a", "b"), 0.2, s)[1] for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("fraction", [0.01, 0.2, 0.5])
def test_the_split_leaves_something_on_either_side(fraction: float) -> None:
    labels = torch.tensor([0, 0, 1, 1, 1, 1, 1])
    train, val = stratified_split(torch.arange(7), labels, ("a", "b"), fraction, 0)
    assert sorted([*train.tolist(), *val.tolist()]) == list(range(7))
    assert math.prod(labels[train].bincount().tolist()) * math.prod(labels[val].bincount().tolist()) > 0
