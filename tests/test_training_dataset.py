import json
import math
import os
import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.training_data import PREPROCESSING, SIDE, archive, coloured, folder, png

from models.data import dataset
from models.data.dataset import LoadedDataset, load, pixels
from models.data.formats import raw_pixels
from models.data.samples import Reading
from models.errors import DatasetError, TooFewImages, TooManyBadFiles
from models.images.cost import Limits
from models.preprocessing import Preprocessing

BAD = {"red/broken.png": b"\x89PNG\r\n\x1a\nnothing"}
SAME = png((200, 40, 40), 7)


def load_all(path: Path, **options: Any) -> LoadedDataset:
    return load(path, PREPROCESSING, **{"val_fraction": 0.25, "seed": 0, **options})


def sizes(data: LoadedDataset) -> list[int]:
    return [len(data.rows[part]) for part in dataset.PARTS]


def paths(data: LoadedDataset, part: dataset.Part) -> list[str]:
    return [data.paths[row] for row in data.rows[part].tolist()]


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


def tiff(data: bytes) -> bytes:
    file = BytesIO()
    Image.open(BytesIO(data)).save(file, "TIFF")
    return file.getvalue()


@pytest.mark.system
def test_the_limits_hold_for_every_file(tmp_path: Path) -> None:
    files = coloured(4) | {"red/1.tif": tiff(SAME), "red/large.png": png((200, 40, 40), 8, side=40)}
    strict = load_all(folder(tmp_path, files), limits=Limits(max_side=39))
    assert [(bad.path, bad.reason[:27]) for bad in strict.audit.bad] == [
        ("red/1.tif", "not an image: a TIFF image;"),
        ("red/large.png", "the image is 40 x 40; the l"),
    ]
    data = load_all(tmp_path, limits=Limits(extra_formats=frozenset({"TIFF"})))
    assert not data.audit.bad
    kind = PREPROCESSING.model_copy(update={"resize": 6, "crop": 6})
    assert len(pixels(tmp_path, data, kind, limits=Limits(extra_formats=frozenset({"TIFF"})))[0]) == 14


def test_training_files_may_have_more_bytes_than_uploads() -> None:
    assert Limits(max_bytes=9).of_training() == Limits(max_bytes=64 * 2**20)
    assert Limits(max_bytes=99 * 2**20).of_training() == Limits(max_bytes=99 * 2**20)


def test_given_parts_are_kept(tmp_path: Path) -> None:
    files = coloured(4, "train/") | coloured(2, "val/", seed=50) | coloured(1, "test/", seed=60)
    assert sizes(load_all(folder(tmp_path, files), test_fraction=0.2)) == [12, 6, 3]


def test_without_val_a_part_of_train_is_held_out_and_test_is_left_alone(tmp_path: Path) -> None:
    files = coloured(4, "train/") | coloured(2, "test/", seed=60)
    assert sizes(load_all(folder(tmp_path, files))) == [9, 3, 6]


def test_without_test_a_part_of_train_is_held_out_and_val_is_left_alone(tmp_path: Path) -> None:
    files = coloured(4, "train/") | coloured(2, "val/", seed=60)
    assert sizes(load_all(folder(tmp_path, files), test_fraction=0.25)) == [9, 6, 3]


def test_shares_that_leave_nothing_to_train_on_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="too little to train on"):
        load_all(folder(tmp_path, coloured(4)), val_fraction=0.5, test_fraction=0.5)


@pytest.mark.parametrize("top", [pytest.param("", id="plain"), pytest.param("photos/", id="wrapped in one folder")])
def test_a_zip_is_the_same_dataset_as_its_folder(tmp_path: Path, top: str) -> None:
    files = coloured(4, "train/") | coloured(2, "val/", seed=50)
    one = load_all(folder(tmp_path / "dir", files))
    other = load_all(archive(tmp_path / "a.zip", {top + name: content for name, content in files.items()}))
    assert (one.sha256, one.paths, one.digests) == (other.sha256, other.paths, other.digests)
    assert torch.equal(one.pixels, other.pixels)
    assert torch.equal(one.rows["val"], other.rows["val"])


def test_the_hash_follows_the_content(tmp_path: Path) -> None:
    files = coloured(2)
    one = load_all(folder(tmp_path / "one", files)).sha256
    files["red/000.png"] = coloured(3)["red/002.png"]
    assert load_all(folder(tmp_path / "two", files)).sha256 != one


def test_the_hash_of_a_csv_follows_its_labels(tmp_path: Path) -> None:
    names = list(coloured(4))
    folder(tmp_path, coloured(4))
    lines = [f"{name},{name.split('/')[0]}" for name in names]
    csv = tmp_path / "list.csv"
    csv.write_text("\n".join(["path,label", *lines]))
    one = load_all(csv)
    csv.write_text("\n".join(["path,label", *reversed(lines)]))
    assert load_all(csv).sha256 == one.sha256
    csv.write_text("\n".join(["path,label", *lines[:-1], f"{names[-1]},blue"]))
    assert load_all(csv).sha256 != one.sha256


@pytest.mark.abuse("J3")
@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        pytest.param("red/broken.png", b"\x89PNG\r\n\x1a\nnothing", "damaged PNG", id="damaged"),
        pytest.param("red/half.png", SAME[:-40], "truncated PNG", id="truncated"),
        pytest.param("red/zero.png", b"", "zero bytes", id="empty"),
        pytest.param("red/notes.jpg", b"buy milk\n", "not an image: text", id="text"),
    ],
)
def test_a_bad_file_is_named_and_has_no_row(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    data = load_all(folder(tmp_path, coloured(4) | {name: content}))
    assert [file.path for file in data.audit.bad] == [name]
    assert reason in data.audit.bad[0].reason
    assert name not in data.paths
    assert (len(data.paths), len(data.pixels), len(data.labels), sum(sizes(data))) == (12, 12, 12, 12)


def test_rows_stay_with_their_paths_when_bad_files_lie_between(tmp_path: Path) -> None:
    whole = load_all(folder(tmp_path / "whole", coloured(4)))
    holes = {"blue/0000.png": b"", "green/0015.png": b"x", "red/0025.png": b"y"}
    data = load_all(folder(tmp_path / "holes", coloured(4) | holes))
    assert data.paths == whole.paths
    assert torch.equal(data.pixels, whole.pixels)


def test_links_that_lead_outside_and_pipes_are_bad_files(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(SAME)
    root = folder(tmp_path / "d", coloured(6))
    (root / "red/link.png").symlink_to(tmp_path / "secret.png")
    os.mkfifo(root / "red/pipe.png")
    reasons = {file.path: file.reason for file in load_all(root).audit.bad}
    assert reasons["red/link.png"] == "cannot be read: a link that leads out of the dataset"
    assert "pipe" in reasons["red/pipe.png"]


def linked(root: Path) -> Path:
    pool = folder(root / "pool", coloured(4))
    for target in sorted(pool.rglob("*.png")):
        link = root / "data" / target.relative_to(pool)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(target)
    return root / "data"


@pytest.mark.abuse("J2")
def test_a_dataset_of_links_is_refused_with_the_remedy_unless_they_are_followed(tmp_path: Path) -> None:
    root = linked(tmp_path)
    with pytest.raises(
        TooManyBadFiles, match=r"12 files are symbolic links, which are not followed, .* `cp -rL`"
    ) as caught:
        load_all(root)
    assert "\n" not in str(caught.value)
    data = load_all(root, reading=Reading(follow_links=True))
    assert data.audit.images == 12
    assert not any("links" in warning for warning in data.audit.warnings)


def test_the_audit_counts_what_is_ignored_and_what_the_images_are(tmp_path: Path) -> None:
    more = {"red/Thumbs.db": b"\xd0\xcf", "red/0.txt": b"0 1\n", "notes.md": b"hello"}
    audit = load_all(folder(tmp_path, coloured(4) | more)).audit
    assert (audit.files, audit.bad, audit.image_kinds) == (12, (), {"8-bit colour": 12})
    assert [(left.reason, left.examples) for left in audit.ignored] == [
        ("outside class folders", ("notes.md",)),
        ("left by Windows", ("red/Thumbs.db",)),
        ("text beside the images, such as annotations", ("red/0.txt",)),
    ]


def test_classes_smaller_than_asked_are_all_named(tmp_path: Path) -> None:
    root = folder(tmp_path, coloured(4) | {"red/9.png": png((1, 2, 3), 77)})
    assert load_all(root, min_per_class=4).audit.images == 13
    message = r"2 of 3 classes are too small: class 'blue' has 4 .*; class 'green' has 4 .*at least 5 .*--min-per-class"
    with pytest.raises(TooFewImages, match=message):
        load_all(root, min_per_class=5)


def test_animations_are_bad_files(tmp_path: Path) -> None:
    buffer = BytesIO()
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    data = load_all(folder(tmp_path, coloured(4) | {"red/moving.gif": buffer.getvalue()}))
    assert "animated" in data.audit.bad[0].reason


def test_fail_stops_at_a_bad_file(tmp_path: Path) -> None:
    with pytest.raises(TooManyBadFiles, match=r"red/broken\.png"):
        load_all(folder(tmp_path, coloured(4) | BAD), on_bad_file="fail")


@pytest.mark.abuse("J3")
def test_too_many_bad_files_are_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(TooManyBadFiles, match="2 of 8 files"):
        load_all(folder(tmp_path, coloured(2) | BAD | {"blue/text.png": b"hello"}))


def test_an_error_counts_all_problems_and_lists_twenty(tmp_path: Path) -> None:
    bad = {f"red/bad{i:02}.png": b"" for i in range(23)}
    with pytest.raises(TooManyBadFiles, match="23 of 29 files") as refused:
        load_all(folder(tmp_path, coloured(2) | bad))
    assert (str(refused.value).count("zero bytes"), str(refused.value)[-12:]) == (20, "; and 3 more")
    assert str(tmp_path) not in str(refused.value)


def test_a_damaged_member_is_a_bad_file(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.zip", coloured(4))
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as source:
        start = source.getinfo("red/000.png").header_offset
    content[start + 60] ^= 0xFF  # a byte of the first red image: its checksum no longer fits
    path.write_bytes(content)
    assert [file.path for file in load_all(path).audit.bad] == ["red/000.png"]


@pytest.mark.abuse("J3")
@pytest.mark.parametrize(
    ("files", "code", "message"),
    [
        pytest.param({}, "too_few_classes", "0 classes", id="empty"),
        pytest.param({"red/000.png": SAME}, "too_few_classes", r"1 class \(red\)", id="one class"),
        pytest.param(
            coloured(1),
            "too_few_images",
            "^3 of 3 classes .* 'blue' has 1 usable .* at least 2 are needed",
            id="one image per class",
        ),
        pytest.param(
            coloured(4) | {"pink/0.png": b"", "pink/1.png": b"x"},
            "too_few_images",
            "'pink' has 0 usable training images",
            id="all bad",
        ),
        pytest.param(
            coloured(4, "train/")
            | {f"{part}/x/{i}.png": png((9, 9, 9), i) for part in ("train", "val") for i in (1, 2)},
            "too_few_images",
            "2 more are identical to images of validation",
            id="all in validation",
        ),
    ],
)
def test_what_is_no_dataset_says_why(tmp_path: Path, files: dict[str, bytes], code: str, message: str) -> None:
    with pytest.raises(DatasetError, match=message) as refused:
        load_all(folder(tmp_path, files))
    assert refused.value.code == code


def test_folders_without_a_file_are_classes_without_images(tmp_path: Path) -> None:
    for name in ("blue", "red"):
        (tmp_path / name).mkdir()
    with pytest.raises(TooFewImages, match="none of the 2 class folders"):
        load_all(tmp_path)


@pytest.mark.abuse("J3")
def test_an_empty_class_folder_is_an_error(tmp_path: Path) -> None:
    (folder(tmp_path, coloured(4)) / "pink").mkdir()
    with pytest.raises(DatasetError, match="'pink' has 0 usable training images"):
        load_all(tmp_path)


def photograph(seed: int, version: int = 0) -> bytes:
    """A PNG of a picture; its versions are brighter."""
    noise = np.random.default_rng(seed).integers(0, 200, (4, 4, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    buffer = BytesIO()
    image.point(lambda value: value + 8 * version).save(buffer, "PNG")
    return buffer.getvalue()


def photographs(count: int, prefix: str = "", seed: int = 0) -> dict[str, bytes]:
    paths = [f"{prefix}{name}/{place}.png" for name in ("red", "blue") for place in range(count)]
    return {path: photograph(seed + place) for place, path in enumerate(paths)}


@pytest.mark.system
def test_near_duplicates_across_given_parts_stay_and_are_told(tmp_path: Path) -> None:
    names = ["train/red/a.png", "train/blue/b.png", "val/red/c.png"]
    files = photographs(20, "train/") | photographs(20, "val/", seed=100)
    files |= {name: photograph(999, version) for version, name in enumerate(names)}
    data = load_all(folder(tmp_path, files))
    assert sizes(data) == [42, 41, 0]
    assert (data.audit.left_out, data.audit.conflicts) == ((), ())
    assert [set(group) for group in data.audit.near_duplicates] == [set(names)]
    assert data.audit.near_rules[0].startswith("same photograph: hash differs in up to")
    assert any(said.startswith("2 training images have near-duplicates") for said in data.audit.warnings)


@pytest.mark.parametrize(("near", "listed", "groups"), [("group", 1, 1), ("report", 1, 6), ("off", 0, 6)])
def test_the_request_says_what_near_duplicates_do(tmp_path: Path, near: str, listed: int, groups: int) -> None:
    files = photographs(30) | {f"red/same{i}.png": photograph(999, i) for i in range(6)}
    data = load_all(folder(tmp_path, files), near_duplicates=near)
    rows = [row for row, path in enumerate(data.paths) if "same" in path]
    assert len(set(data.groups[rows].tolist())) == groups
    assert data.audit.totals["near_duplicates"] == listed


@pytest.mark.system
def test_a_class_of_near_duplicates_is_an_error_that_names_the_flag(tmp_path: Path) -> None:
    files = photographs(30) | {f"pink/{i}.png": photograph(999, i) for i in range(4)}
    with pytest.raises(
        DatasetError, match=r"all images of class 'pink' .* --near-duplicates report .* --near-duplicates off"
    ):
        load_all(folder(tmp_path, files))
    assert sizes(load_all(tmp_path, near_duplicates="report"))[1] > 0


@pytest.mark.abuse("J3")
def test_duplicates_share_a_group_and_a_side(tmp_path: Path) -> None:
    copies = {f"red/copy{i}.png": SAME for i in range(6)}
    data = load_all(folder(tmp_path, coloured(10) | copies))
    rows = [row for row, path in enumerate(data.paths) if "copy" in path]
    assert len(set(data.groups[rows].tolist())) == 1
    assert sum(bool(torch.isin(torch.tensor(rows), data.rows[part]).any()) for part in dataset.PARTS) == 1
    assert data.audit.duplicates == (tuple(copies),)


def test_training_images_that_are_in_test_are_left_out(tmp_path: Path) -> None:
    files = coloured(4, "train/") | coloured(2, "test/", seed=60)
    files["train/red/leak.png"] = files["test/red/000.png"]
    data = load_all(folder(tmp_path, files))
    assert data.audit.left_out == ("train/red/leak.png",)
    assert sizes(data) == [9, 3, 6]
    assert "train/red/leak.png" in data.paths


def test_a_picture_under_two_labels_is_told(tmp_path: Path) -> None:
    files = coloured(4) | {"red/same.png": SAME, "blue/same.png": SAME}
    data = load_all(folder(tmp_path, files))
    assert data.audit.conflicts == (("blue/same.png", "red/same.png"),)
    assert any("more than one label" in warning for warning in data.audit.warnings)


@pytest.mark.parametrize("near", ["report", "off"])
def test_a_class_of_one_picture_is_refused_unless_duplicates_are_split_like_others(tmp_path: Path, near: str) -> None:
    path = folder(tmp_path, coloured(4) | {f"pink/{i}.png": SAME for i in range(4)})
    with pytest.raises(
        DatasetError, match=r"all images of class 'pink' are one picture.*--near-duplicates report"
    ) as caught:
        load_all(path)
    assert caught.value.param == "near_duplicates"
    data = load_all(path, near_duplicates=near)
    assert [sum("pink" in path for path in paths(data, part)) for part in dataset.PARTS] == [3, 1, 0]
    assert any("pink are the same picture" in warning for warning in data.audit.warnings)


def test_another_preprocessing_keeps_the_rows(tmp_path: Path) -> None:
    data = load_all(folder(tmp_path, coloured(4) | BAD))
    larger = Preprocessing(resize=16, crop=16)
    found, digests = pixels(tmp_path, data, larger)
    assert found.shape == (12, 3, 16, 16)
    assert torch.equal(found.float().mean(dim=(2, 3)).argmax(dim=1), 2 - data.labels)
    assert len(set(digests)) == 12
    assert set(digests).isdisjoint(data.digests)


def test_the_split_is_the_same_under_another_preprocessing(tmp_path: Path) -> None:
    data = load_all(folder(tmp_path, coloured(16)), test_fraction=0.25)
    other = load(tmp_path, Preprocessing(resize=16, crop=16), val_fraction=0.25, test_fraction=0.25, seed=0)
    assert set(other.digests).isdisjoint(data.digests)
    assert other.files == data.files
    assert all(torch.equal(other.rows[part], data.rows[part]) for part in dataset.PARTS)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        pytest.param([], {"val_fraction": 0.25, "test_fraction": 0.1}, id="none"),
        pytest.param(["val"], {"val": "given", "test_fraction": 0.1}, id="val"),
        pytest.param(["test"], {"val_fraction": 0.25, "test": "given"}, id="test"),
        pytest.param(["val", "test"], {"val": "given", "test": "given"}, id="both"),
    ],
)
def test_how_it_was_split_is_told(tmp_path: Path, given: list[str], told: dict[str, Any]) -> None:
    files = coloured(6, "train/")
    for seed, part in enumerate(given):
        files |= coloured(2, f"{part}/", seed=50 + 10 * seed)
    rule = load_all(folder(tmp_path, files), test_fraction=0.1, seed=3).split
    assert rule == json.loads(json.dumps(rule)) == {"by": "content", "seed": 3, **told}


def test_a_dataset_that_changed_is_noticed(tmp_path: Path) -> None:
    data = load_all(folder(tmp_path, coloured(4)))
    (tmp_path / "red/000.png").write_bytes(SAME)
    with pytest.raises(DatasetError, match="has changed since the run began"):
        pixels(tmp_path, data, PREPROCESSING)


def test_large_datasets_lie_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = load_all(folder(tmp_path, coloured(4) | BAD))
    monkeypatch.setattr(raw_pixels, "MAX_BYTES_IN_MEMORY", 0)
    assert torch.equal(load_all(tmp_path).pixels, small.pixels)


def test_a_full_disk_is_an_error_and_no_dead_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(raw_pixels, "MAX_BYTES_IN_MEMORY", 0)
    with pytest.raises(OSError, match="bytes of pixels do not fit in"):
        raw_pixels.allocate((2**20, 1024, 1024, 3))


def test_progress_rises_to_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset, "TICK_S", 0)
    told: list[float] = []
    load_all(folder(tmp_path, coloured(4)), progress=told.append)
    assert told == sorted(told)
    assert len(told) > 12
    assert math.isclose(told[-1], 1)


@pytest.mark.data
def test_the_file_of_hymenoptera_that_is_no_photograph_is_found(data_dir: Path) -> None:
    data = load(data_dir / "hymenoptera.zip", Preprocessing(resize=32, crop=32), val_fraction=0.2, seed=0)
    assert [file.path for file in data.audit.bad] == ["train/ants/imageNotFound.gif"]
    assert "no photograph" in data.audit.bad[0].reason
    assert data.audit.parts == {"train": 244, "val": 153, "test": 0}
