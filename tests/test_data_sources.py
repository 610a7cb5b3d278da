import os
import zipfile
from pathlib import Path

import pytest
from support.hostile_zips import claim
from support.training_data import archive, coloured, folder

from models.data import files
from models.data.samples import DatasetSource
from models.data.sources import open_source
from models.errors import DatasetError

TINY = {f"{name}/{i}.png": b"x" for name in ("ant", "bee") for i in range(2)}


def table(root: Path, lines: str, name: str = "list.csv") -> Path:
    path = folder(root, {"photos/1.png": b"1", "photos/2.png": b"2"}) / name
    path.write_text(lines)
    return path


def listed(path: Path) -> DatasetSource:
    with open_source(path) as source:
        return source


def content(path: Path, name: str) -> bytes:
    with open_source(path) as source:
        item = next(item for item in source.items if item.path == name)
        return source.read(item.file)


@pytest.mark.parametrize("top", [pytest.param("", id="plain"), pytest.param("a/b/", id="wrapped")])
@pytest.mark.parametrize("pack", [pytest.param(folder, id="folder"), pytest.param(archive, id="zip")])
def test_items_are_sorted_and_wrapping_folders_left_out(tmp_path: Path, pack: object, top: str) -> None:
    source = listed(pack(tmp_path / "d", {top + name: data for name, data in TINY.items()}))  # type: ignore[operator]
    assert [item.path for item in source.items] == ["ant/0.png", "ant/1.png", "bee/0.png", "bee/1.png"]
    assert source.classes == ("ant", "bee")


@pytest.mark.parametrize(("name", "part"), [("val", "val"), ("valid", "val"), ("Validation", "val"), ("test", "test")])
def test_parts_by_their_usual_names(tmp_path: Path, name: str, part: str) -> None:
    files = {f"train/{path}": data for path, data in TINY.items()} | {f"{name}/ant/9.png": b"x"}
    source = listed(folder(tmp_path, files))
    assert [item.part for item in source.items if item.path.endswith("9.png")] == [part]


def test_endings_in_capitals_or_written_out_are_alike(tmp_path: Path) -> None:
    files = {"ant/0.JPG": b"x", "ant/1.jpeg": b"x", "bee/0.Png": b"x", "bee/without": b"\0"}
    assert [item.path for item in listed(folder(tmp_path, files)).items] == sorted(files)


def test_hidden_files_are_no_part_of_it_and_strays_are_told(tmp_path: Path) -> None:
    hidden = {"__MACOSX/ant/0.png": b"x", "ant/.DS_Store": b"x", ".git/config": b"x"}
    source = listed(folder(tmp_path, TINY | hidden | {"README.txt": b"x"}))
    assert (len(source.items), source.strays) == (4, ("README.txt",))


@pytest.mark.parametrize("pack", [pytest.param(folder, id="folder"), pytest.param(archive, id="zip")])
@pytest.mark.parametrize("part", [pytest.param("", id="classes"), pytest.param("train/", id="parts")])
def test_files_beside_what_is_wrapped_are_strays(tmp_path: Path, pack: object, part: str) -> None:
    files = {f"a/b/{part}{name}": data for name, data in TINY.items()} | ({"a/b/val/ant/9.png": b"x"} if part else {})
    beside = {"README.md": b"x", "a/README.md": b"x", "a/b/LICENSE.txt": b"x"}
    source = listed(pack(tmp_path / "d", files | beside))  # type: ignore[operator]
    assert (source.classes, len(source.items)) == (("ant", "bee"), len(files))
    assert source.strays == ("LICENSE.txt", "README.md", "a/README.md")


def test_a_zip_of_the_folder_that_one_is_in(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.zip", {"./": b""} | {f"./{name}": data for name, data in TINY.items()})
    assert [item.path for item in listed(path).items] == list(TINY)
    assert content(path, "ant/0.png") == b"x"


@pytest.mark.parametrize(
    "name", ["../../ant/evil.png", "/ant/evil.png", "ant/../../evil.png", r"..\evil.png", "C:/evil.png"]
)
def test_a_zip_with_names_that_lead_outside_is_refused_by_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(DatasetError, match=r"evil\.png.*outside"):
        listed(archive(tmp_path / "a.zip", TINY | {name: b"x"}))


def test_a_zip_bomb_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("ant/big.png", bytes(17 * 2**20))
    with pytest.raises(DatasetError, match=r"ant/big\.png.*would grow"):
        listed(tmp_path / "a.zip")


def test_a_zip_that_is_a_bomb_as_a_whole_is_refused(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.zip", {f"ant/{i}.png": bytes(130_000) for i in range(40)})
    with pytest.raises(DatasetError, match="would grow to"):
        listed(claim(path, "ant", size=60 * 2**20))


def test_a_damaged_zip_says_so(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.zip", TINY)
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\1\2") + 1] ^= 0xFF  # the central directory
    path.write_bytes(content)
    with pytest.raises(DatasetError, match="pack or copy it again"):
        listed(path)


def test_an_empty_folder_is_a_class_without_images(tmp_path: Path) -> None:
    (folder(tmp_path, TINY) / "cow").mkdir()
    assert listed(tmp_path).classes == ("ant", "bee", "cow")


@pytest.mark.abuse("J2")
def test_links_stay_inside(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    root = folder(tmp_path / "d", TINY)
    (root / "ant/out.png").symlink_to(tmp_path / "secret")
    (root / "ant/in.png").symlink_to(root / "ant/0.png")
    assert content(root, "ant/in.png") == b"x"
    with pytest.raises(OSError, match="leads out"):
        content(root, "ant/out.png")


@pytest.mark.abuse("J2")
def test_a_folder_that_becomes_a_link_between_look_and_read_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, outside = folder(tmp_path / "d", TINY), folder(tmp_path / "outside", {"0.png": b"secret"})
    realpath = os.path.realpath

    def swapped(path: str, strict: bool = False) -> str:
        found = realpath(path, strict=strict)
        if strict:  # the look at one file, just before it is opened
            (root / "ant").rename(root / "gone")
            (root / "ant").symlink_to(outside)
        return found

    with open_source(root) as source:
        monkeypatch.setattr(os.path, "realpath", swapped)
        with pytest.raises(NotADirectoryError):
            source.read("ant/0.png")


@pytest.mark.abuse("J2")
@pytest.mark.parametrize(
    "make", [pytest.param(os.mkfifo, id="pipe"), pytest.param(lambda p: p.symlink_to("."), id="loop")]
)
def test_what_is_no_regular_file_is_not_read(tmp_path: Path, make: object) -> None:
    make(folder(tmp_path, TINY) / "ant/odd")  # type: ignore[operator]
    with pytest.raises(OSError, match="no regular file"):
        content(tmp_path, "ant/odd")


def test_reads_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "FILE_BYTES", 10)
    assert len(content(folder(tmp_path, TINY | {"ant/big.png": bytes(100)}), "ant/big.png")) == 11


@pytest.mark.abuse("J3")
@pytest.mark.parametrize(
    ("limit", "value", "message"),
    [
        pytest.param("models.files.zip_file.MAX_FILES", 3, "more than 3 files", id="files"),
        pytest.param("models.data.files.MAX_DEPTH", 0, "folders deep", id="depth"),
    ],
)
def test_scans_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, value: int, message: str
) -> None:
    monkeypatch.setattr(limit, value)
    with pytest.raises(DatasetError, match=message):
        listed(folder(tmp_path, TINY))


def test_names_that_are_no_utf8_are_escaped(tmp_path: Path) -> None:
    folder(tmp_path, TINY)
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/ant/\xff.png")).write_bytes(b"odd")
    assert content(tmp_path, r"ant/\udcff.png") == b"odd"


def test_a_csv_gives_labels_and_parts(tmp_path: Path) -> None:
    source = listed(
        table(tmp_path, "path,label,part\nphotos/1.png,ant,\n./photos/2.png,bee,train\nphotos/1.png,ant,val\n")
    )
    found = [(item.path, item.class_name, item.part) for item in source.items]
    assert found == [("photos/1.png", "ant", "train"), ("photos/1.png", "ant", "val"), ("photos/2.png", "bee", "train")]


def test_a_csv_may_come_from_a_spreadsheet_on_windows(tmp_path: Path) -> None:
    path = table(tmp_path, "\ufeffpath,label\r\nphotos\\1.png,ant\r\nphotos\\2.png,bee\r\n", "LIST.CSV")
    assert content(path, "photos/2.png") == b"2"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        pytest.param("width,height\n", "columns path and label", id="columns"),
        pytest.param("", "it has none", id="empty"),
        pytest.param("path,label\n,ant\n", "line 2: the row has no path", id="no path"),
        pytest.param("path,label\n/etc/passwd,ant\n", "'/etc/passwd' is refused", id="absolute"),
        pytest.param("path,label\n../9.png,ant\n", r"'\.\./9\.png' is refused", id="outside"),
        pytest.param("path,label\nhttp://a/1.png,ant\n", "1 class ", id="url"),
        pytest.param("path,label,part\nphotos/1.png,ant,exam\n", "the column part has 'exam'", id="part"),
        pytest.param('path,label\n"photos/1.png,ant\n', "a quotation mark is not closed", id="quote"),
        pytest.param("path,label\nphotos/1.png,ant\n", "1 class ", id="one class"),
    ],
)
def test_a_wrong_csv_says_what_is_wrong(tmp_path: Path, lines: str, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        listed(table(tmp_path, lines))


def test_neither_folder_nor_zip_nor_csv(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"x")
    with pytest.raises(DatasetError, match="is of a format that is not read; a dataset is"):
        listed(tmp_path / "a.tar")


def test_a_class_of_validation_alone_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(
        DatasetError,
        match=r"val has classes that train lacks \(pink\), and train has blue, green, red: .* or remove it",
    ):
        listed(folder(tmp_path, coloured(2, "train/") | {"val/pink/1.png": b"x"}))
