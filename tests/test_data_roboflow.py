from pathlib import Path

import pytest
from support.training_data import archive, coloured, folder

from models.data.samples import DatasetSource
from models.data.sources import open_source
from models.errors import DatasetError

READMES = {"README.roboflow.txt": b"x", "README.dataset.txt": b"x"}
HEADER = "filename, ant, bee\n"


def listed(path: Path) -> DatasetSource:
    with open_source(path) as source:
        return source


def table(*lines: str) -> bytes:
    return (HEADER + "".join(f"{line}\n" for line in lines)).encode()


def test_class_folders_and_no_word_of_the_readmes(tmp_path: Path) -> None:
    files = coloured(2, "train/") | coloured(1, "valid/") | coloured(1, "test/")
    source = listed(archive(tmp_path / "a.zip", files | READMES))
    assert [item.part for item in source.items].count("val") == 3
    assert (source.strays, source.layout) == ((), "train/, valid/ as val, test/ with a folder per class")


@pytest.mark.parametrize("pack", [pytest.param(folder, id="folder"), pytest.param(archive, id="zip")])
def test_one_column_per_class(tmp_path: Path, pack: object) -> None:
    files = {
        "train/_classes.csv": table("a.jpg, 1, 0", "b.jpg, 0, 1"),
        "valid/_classes.csv": table("c.jpg, 0, 1"),
        "train/a.jpg": b"a",
        "train/b.jpg": b"b",
        "valid/c.jpg": b"c",
    }
    with open_source(pack(tmp_path / "d", files | READMES)) as source:  # type: ignore[operator]
        found = [(item.path, item.part, item.class_name, source.read(item.file)) for item in source.items]
    assert found == [
        ("train/a.jpg", "train", "ant", b"a"),
        ("train/b.jpg", "train", "bee", b"b"),
        ("valid/c.jpg", "val", "bee", b"c"),
    ]


def test_the_table_itself_may_be_named(tmp_path: Path) -> None:
    root = folder(tmp_path, {"_classes.csv": table("a.jpg, 1, 0", "b.jpg, 0, 1"), "a.jpg": b"a", "b.jpg": b"b"})
    assert listed(root / "_classes.csv").classes == ("ant", "bee")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(table("a.jpg, 1, 1"), "line 2: the image needs one label and has ant, bee", id="two"),
        pytest.param(table("a.jpg, 0, 0"), "has none", id="none"),
        pytest.param(table("a.jpg"), "has none", id="short"),
        pytest.param(table("../a.jpg, 1, 0"), "is no name of a file", id="outside"),
        pytest.param(table(", 1, 0"), "is no name of a file", id="no name"),
        pytest.param(b"filename, ant\n", "two classes or more", id="one class"),
        pytest.param(b"file, ant, bee\n", "first line of filename", id="columns"),
        pytest.param(b"", "it has none", id="empty"),
        pytest.param(b"\xff\n", "UTF-8", id="encoding"),
    ],
)
def test_a_wrong_table_says_what_is_wrong(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        listed(folder(tmp_path, {"train/_classes.csv": content, "train/a.jpg": b"x"}))
