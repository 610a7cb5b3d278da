"""Names of files and classes that look alike, vanish, or cannot be printed."""

import json
import os
import struct
import zipfile
import zlib
from pathlib import Path

import pytest
from pydantic import ValidationError
from support.hostile_zips import packed
from support.training_data import PREPROCESSING, coloured, folder
from test_data_tar import packed as tarred

from models.classifier import ModelConfig
from models.data.dataset import load, pixels
from models.data.samples import DatasetSource, Reading
from models.data.sources import open_source
from models.data.tables import text
from models.errors import DatasetError
from models.files.class_names import complaint


def listed(path: Path, encoding: str = "auto") -> DatasetSource:
    with open_source(path, Reading(encoding=encoding)) as source:
        return source


ALIKE = {"./red/000.png": b"a", "red//001.png": b"b", "red\\002.png": b"c", "./red/./003.png": b"d"}


@pytest.mark.abuse("A1605")
@pytest.mark.parametrize("pack", [pytest.param(packed, id="zip"), pytest.param(tarred, id="tar")])
def test_files_that_share_a_name_are_counted(tmp_path: Path, pack: object) -> None:
    path = pack(tmp_path / "a", ALIKE | coloured(3))  # type: ignore[operator]
    audit = load(path, PREPROCESSING, val_fraction=0.3, seed=0).audit
    assert audit.files == 10
    (warning,) = [each for each in audit.warnings if "have the name of another" in each]
    assert warning.startswith("3 files have the name of another and are left out, the first red/000.png")


@pytest.mark.abuse("A1605")
def test_a_path_of_a_table_is_one_however_it_is_written(tmp_path: Path) -> None:
    lines = "path,label\nimgs/./r0.png,red\nimgs/r0.png,red\nimgs//r0.png,red\nimgs/b0.png,blue\n"
    source = listed(folder(tmp_path, {"t.csv": lines.encode(), "imgs/r0.png": b"", "imgs/b0.png": b""}) / "t.csv")
    assert [item.path for item in source.items] == ["imgs/b0.png", "imgs/r0.png"]


def named(path: Path, *folders: bytes) -> Path:
    """A zip with two images in each folder, whose name has these bytes and no flag that says how to read them."""
    names = {f"class{i}": raw for i, raw in enumerate(folders)}
    width = max(map(len, folders))
    files = {f"{name.ljust(width, '_')}/{i}.png": b"" for name in names for i in range(2)}
    content = packed(path, files).read_bytes()
    for name, raw in names.items():
        content = content.replace(name.ljust(width, "_").encode(), raw.ljust(width, b"_"))
    path.write_bytes(content)
    return path


@pytest.mark.abuse("A1605")
def test_names_in_utf_8_without_its_flag(tmp_path: Path) -> None:
    path = named(tmp_path / "a.zip", "K\u00e4fer__".encode(), b"Wespe___")
    for encoding in ("auto", "gbk"):
        assert listed(path, encoding).classes == ("K\u00e4fer__", "Wespe___")


CODED = [
    ("gbk", "\u732b\u732b\u732b\u732b", "\u72d7\u72d7\u72d7\u72d7"),
    ("cp932", "\u8868\u8868\u8868\u8868", "\u72ac\u72ac\u72ac\u72ac"),
]


@pytest.mark.abuse("A1605")
@pytest.mark.parametrize(("encoding", "first", "second"), CODED)
def test_class_names_in_a_code_page_are_read_by_it_or_refused(
    tmp_path: Path, encoding: str, first: str, second: str
) -> None:
    path = named(tmp_path / "a.zip", first.encode(encoding), second.encode(encoding))
    assert set(listed(path, encoding).classes) == {first, second}
    with pytest.raises(DatasetError, match=f"{first}, {second} as {encoding}.*--encoding") as caught:
        listed(path)
    assert str(caught.value).isprintable()
    with pytest.raises(DatasetError, match="cannot be read as ascii"):
        listed(path, "ascii")


def test_the_encoding_reaches_every_look_at_the_dataset(tmp_path: Path) -> None:
    lines = "path,label\n" + "".join(f"{name},{name[0]}\u72d7\n" for name in coloured(3))
    path = folder(tmp_path, coloured(3) | {"t.csv": lines.encode("gbk")}) / "t.csv"
    gbk = Reading(encoding="gbk")
    data = load(path, PREPROCESSING, val_fraction=0.3, seed=0, reading=gbk)
    assert data.classes == ("b\u72d7", "g\u72d7", "r\u72d7")
    assert pixels(path, data, PREPROCESSING, reading=gbk)[1] == data.digests


@pytest.mark.parametrize("pack", [pytest.param(folder, id="folder"), pytest.param(tarred, id="tar")])
def test_class_names_of_folders_and_tars_too(tmp_path: Path, pack: object) -> None:
    names = [os.fsdecode(name.encode("gbk")) for name in ("\u732b", "\u72d7")]
    path = pack(tmp_path / "a", {f"{name}/{i}.png": b"" for name in names for i in range(2)})  # type: ignore[operator]
    assert listed(path, "gbk").classes == ("\u72d7", "\u732b")
    with pytest.raises(DatasetError, match="1 class name of a cannot be read as UTF-8"):
        listed(path)
    with pytest.raises(DatasetError, match="cannot be read as ascii"):
        listed(path, "ascii")


def test_file_names_in_a_code_page_are_a_note(tmp_path: Path) -> None:
    path = packed(tmp_path / "a.zip", {"ant/xx1.png": b"", "bee/2.png": b""})
    path.write_bytes(path.read_bytes().replace(b"xx1", "\u72d71".encode("gbk")))
    source = listed(path)
    assert source.classes == ("ant", "bee")
    assert source.notes[0].startswith(
        "1 name is not UTF-8, and its code page is not known; the first reads ant/\u72d71"
    )


@pytest.mark.parametrize(("crc", "classes"), [(0, ("ant", "\u732b")), (1, ("ant", "cat"))])
def test_info_zips_unicode_path_counts_while_it_is_of_this_name(
    tmp_path: Path, crc: int, classes: tuple[str, ...]
) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as target:
        target.writestr("ant/1.png", b"")
        member = zipfile.ZipInfo("cat/1.png")
        spelled = b"\1" + struct.pack("<L", zlib.crc32(b"cat/1.png") ^ crc) + "\u732b/1.png".encode()
        member.extra = struct.pack("<HH", 0x7075, len(spelled)) + spelled
        target.writestr(member, b"")
    assert listed(tmp_path / "a.zip").classes == classes


def test_what_systems_leave_is_no_part_of_a_dataset(tmp_path: Path) -> None:
    left = ("red/Thumbs.db", "blue/desktop.ini", "@eaDir/x/1.jpg", "#recycle/1.jpg", "lost+found/x", "red/@eaDir/1.jpg")
    files = coloured(2) | dict.fromkeys(left, b"x")
    assert len(listed(packed(tmp_path / "a.zip", files)).items) == 6
    assert len(listed(folder(tmp_path / "d", files)).items) == 6


# Classes


@pytest.mark.abuse("A1606")
def test_a_class_is_one_in_nfc_and_nfd(tmp_path: Path) -> None:
    source = listed(packed(tmp_path / "a.zip", {"caf\u00e9/1.png": b"", "cafe\u0301/2.png": b"", "bar/1.png": b""}))
    assert (source.classes, len(source.items)) == (("bar", "caf\u00e9"), 3)


BAD = [
    pytest.param("x" * 256, "has 256 characters", id="long"),
    pytest.param("red\x1b[31m", r"'red\\x1b\[31m' has characters that cannot be printed", id="escape"),
    pytest.param("red\nblue", r"'red\\nblue' has characters", id="newline"),
    pytest.param("red\u202eder", r"'red\\u202eder' has characters", id="right to left"),
]


@pytest.mark.abuse("A1607")
@pytest.mark.parametrize(("name", "message"), BAD)
def test_a_class_that_cannot_be_printed_is_refused_in_one_line(tmp_path: Path, name: str, message: str) -> None:
    export = [{"image": f"{label}.png", "choice": label} for label in (name, "bee")]
    (tmp_path / "t.json").write_text(json.dumps(export))
    with pytest.raises(DatasetError, match=message) as caught:
        listed(tmp_path / "t.json")
    assert str(caught.value).isprintable()


@pytest.mark.abuse("A1607")
@pytest.mark.parametrize(("name", "message"), BAD)
def test_nor_is_it_served_from_a_stored_config_or_a_bundle(name: str, message: str) -> None:
    backbone = {"architecture": "lenet5", "sha256": "0" * 64, "preprocessing": PREPROCESSING}
    config = {"name": "a", "version": 1, "classes": ["bee", name], "head": {"layers": [{"in_features": 84}]}}
    with pytest.raises(ValidationError, match=message):
        ModelConfig.model_validate(config | {"backbones": [backbone], "head_sha256": "0" * 64})


def test_names_of_all_scripts_are_printable() -> None:
    assert complaint(["Käfer", "黒 猫", "می\u200cخواهم", "👩\u200d🔬", "a\u00a0b", "\\udcff"]) is None


# Tables


@pytest.mark.abuse("A904")
@pytest.mark.parametrize(
    "row",
    [
        pytest.param("a" * 2000 + ",red", id="one field"),
        pytest.param('"a\nb",' * 400 + "red", id="fields of two lines"),
        pytest.param("," * 2000, id="empty fields"),
    ],
)
def test_a_row_of_a_table_has_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: str) -> None:
    monkeypatch.setattr(text, "MAX_ROW", 1000)
    (tmp_path / "t.csv").write_text(f"path,label\n1.png,red\n{row}\n")
    with pytest.raises(DatasetError, match="row of more than 1,000 characters"):
        listed(tmp_path / "t.csv")


@pytest.mark.abuse("A904")
def test_a_path_of_a_table_has_a_bound(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(f"path,label\n1.png,red\n{'a' * 5000},blue\n")
    with pytest.raises(DatasetError, match="the path has 5,000 characters"):
        listed(tmp_path / "t.csv")
