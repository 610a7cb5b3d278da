import json
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from models.data import audit
from models.data.audit import (
    Audit,
    AuditedImages,
    BadFile,
    drawn_colours,
    is_animated,
    make_audit,
    odd_drawings,
    reason_of,
)
from models.data.duplicates.groups import Near
from models.data.samples import PARTS, DatasetItem
from models.errors import ImageError
from models.images.decoding import decode
from models.preprocessing import Preprocessing

PREPROCESSING = Preprocessing(resize=8, crop=8)


def frames(file_format: str, count: int) -> bytes:
    images = [Image.new("RGB", (8, 8), (40 * i, 0, 0)) for i in range(count)]
    buffer = BytesIO()
    images[0].save(buffer, file_format, save_all=count > 1, append_images=images[1:])
    return buffer.getvalue()


def encoded(image: Image.Image, file_format: str = "PNG") -> bytes:
    buffer = BytesIO()
    image.save(buffer, file_format)
    return buffer.getvalue()


def items(count: int, classes: int = 2) -> list[DatasetItem]:
    return [DatasetItem(f"{i}.png", f"{i}.png", "train", str(i % classes)) for i in range(count)]


def near_groups(names: str, groups: list[int]) -> tuple[Near, ...]:
    by_group = {group: tuple(row for row, each in enumerate(groups) if each == group) for group in groups}
    return tuple(
        Near(rows, f"rule {group}") for group, rows in by_group.items() if len({names[row].lower() for row in rows}) > 1
    )


def audited(names: str, groups: list[int], per_part: tuple[int, int, int] | None = None, **more: Any) -> Audit:
    """Of images called by single letters, upper case in class 1; equal letters are equal images."""
    places = torch.arange(len(names))
    parts = torch.split(places, list(per_part or (len(names), 0, 0)))
    images = AuditedImages(
        classes=("low", "high"),
        paths=tuple(f"{letter}{row}" for row, letter in enumerate(names)),
        labels=torch.tensor([int(letter.isupper()) for letter in names]),
        digests=tuple(letter.lower().encode() for letter in names),
        groups=torch.tensor(groups),
        near=near_groups(names, groups),
    )
    files = more.pop("files", len(names))
    return make_audit(images, dict(zip(PARTS, parts, strict=True)), places[:0], files, layout="letters", **more)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        pytest.param(b"", "zero bytes", id="empty"),
        pytest.param(b"hello\n", "not an image: text", id="text"),
        pytest.param(b"a,b\n1,2\n", "not an image: text", id="csv"),
        pytest.param(b"%PDF-1.7 ...", "not an image: a PDF document", id="pdf"),
        pytest.param(b"\xd0\xcf\x11\xe0" + bytes(50), "not an image: an OLE file, such as Thumbs.db", id="thumbs"),
        pytest.param(b'<?xml version="1.0"?>\n<svg>', "not an image: an SVG drawing; save it as PNG", id="svg"),
        pytest.param(b"<!DOCTYPE html><p>404", "not an image: an HTML page", id="html"),
        pytest.param(b"\0\0\0\x18ftypheic" + bytes(20), "not an image: a HEIC image; save it as", id="heic"),
        pytest.param(b"\0\0\0\x18ftypisom" + bytes(20), "not an image: a video", id="video"),
        pytest.param(bytes(100), "not an image: of unknown format", id="zeros"),
        pytest.param(encoded(Image.new("RGB", (99, 99)), "JPEG")[:-99], "truncated JPEG", id="truncated"),
    ],
)
def test_reasons_are_specific(data: bytes, reason: str) -> None:
    with pytest.raises(ImageError) as caught:
        decode(data, PREPROCESSING)
    assert reason in reason_of(caught.value, data)


@pytest.mark.parametrize("file_format", ["GIF", "PNG", "WEBP"])
def test_more_than_one_frame_is_an_animation(file_format: str) -> None:
    assert is_animated(frames(file_format, 3))
    assert not is_animated(frames(file_format, 1))


def test_a_preview_behind_a_photograph_is_no_animation() -> None:
    assert not is_animated(frames("MPO", 2))


def test_few_exact_colours_are_a_drawing() -> None:
    image = Image.new("RGB", (200, 100), "white")
    image.paste("gray", (20, 20, 100, 60))
    assert drawn_colours(encoded(image)) == (2, 200, 100)
    assert drawn_colours(encoded(image, "GIF")) == (2, 200, 100)
    assert drawn_colours(encoded(image, "JPEG")) is None


@pytest.mark.parametrize("side", [pytest.param(200, id="photograph"), pytest.param(28, id="small")])
def test_noise_and_small_images_are_no_drawings(side: int) -> None:
    noise = np.random.default_rng(0).integers(0, 2 if side == 28 else 256, (side, side, 3), dtype=np.uint8)
    assert drawn_colours(encoded(Image.fromarray(noise))) is None


@pytest.mark.parametrize(
    ("drawn", "odd"),
    [
        pytest.param([3], [3], id="one among photographs"),
        pytest.param(range(50), [], id="a dataset of drawings"),
        pytest.param([], [], id="none"),
    ],
)
def test_only_what_stands_out_is_odd(drawn: list[int], odd: list[int]) -> None:
    assert list(odd_drawings(items(100), dict.fromkeys(drawn, (33, 300, 300)))) == odd


def test_a_class_of_drawings_is_not_odd() -> None:
    few = [*items(396), *(DatasetItem(f"d{i}", f"d{i}", "train", "drawings") for i in range(4))]
    assert not odd_drawings(few, dict.fromkeys(range(396, 400), (2, 90, 90)))


def test_groups_are_listed_by_what_they_are() -> None:
    found = audited("aabcdDee", [0, 0, 1, 1, 2, 2, 3, 4])  # the two e were taken apart
    assert found.duplicates == (("a0", "a1"), ("d4", "D5"), ("e6", "e7"))
    assert (found.near_duplicates, found.near_rules) == ((("b2", "c3"),), ("rule 1",))
    assert found.conflicts == (("d4", "D5"),)
    assert found.totals == {"bad": 0, "duplicates": 3, "near_duplicates": 1, "conflicts": 1, "left_out": 0}


def test_near_duplicates_are_no_wrong_label() -> None:
    found = audited("aBcD", [0, 0, 1, 2])
    assert (found.near_duplicates, found.conflicts) == ((("a0", "B1"),), ())


def test_counts_by_part_and_class() -> None:
    found = audited("abcABdC", list(range(7)), (5, 2, 0))
    assert found.parts == {"train": 5, "val": 2, "test": 0}
    assert found.class_counts["train"] == {"low": 3, "high": 2}
    assert found.imbalance == 1.5


@pytest.mark.parametrize(
    ("names", "parts", "warning"),
    [
        pytest.param("abcABC", None, "fewer than 10 training images in low (3), high (3)", id="tiny"),
        pytest.param("a" * 33 + "BCD", None, "11 times the training images", id="imbalance"),
        pytest.param("abABcd", (4, 2, 0), "no image in val of high", id="a class not validated"),
    ],
)
def test_warnings(names: str, parts: tuple[int, int, int] | None, warning: str) -> None:
    found = audited(names, list(range(len(names))), parts)
    assert any(warning in each for each in found.warnings)


def test_bad_files_and_remarks_are_warnings_too() -> None:
    bad = [BadFile(path=f"{i}.gif", reason="animated") for i in range(3)]
    found = audited("abAB", [0, 1, 2, 3], bad=bad, files=7, remarks=["by the way"])
    assert found.warnings[0] == "3 of 7 files are bad and left out, the first 0.gif: animated"
    assert found.warnings[-1] == "by the way"


def test_an_ordinary_dataset_has_no_warning() -> None:
    names = "abcdefghijklmNOPQRSTUVWXYZ"
    assert audited(names, list(range(26))).warnings == ()


@pytest.mark.abuse("J3")
def test_lists_are_capped_and_totals_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "MAX_LISTED", 1)
    monkeypatch.setattr(audit, "MAX_GROUP", 2)
    found = audited("aaabbAA", [0, 0, 0, 1, 1, 0, 0])
    assert found.duplicates == (("a0", "a1"),)
    assert found.totals["duplicates"] == 2


def test_it_is_json(tmp_path: Path) -> None:
    found = audited("aAb", [0, 0, 1])
    assert Audit.model_validate_json(found.model_dump_json()) == found
    json.dumps(found.model_dump(mode="json"))
