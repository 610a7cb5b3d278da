import csv
import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from support.training_data import PREPROCESSING, archive, coloured, folder

from models.data.dataset import load
from models.data.samples import DatasetSource
from models.data.sources import open_source
from models.data.tables.label_studio import FilesByPathEnd
from models.errors import DatasetError

PHOTOS = {f"images/{name}.png": name.encode() for name in ("a", "b", "c")}
UPLOADS = [("/data/upload/1/0a1b2c3d-a.png", "ant"), ("/data/upload/1/b.png", "bee")]


def as_json(tasks: list[tuple[Any, Any]]) -> bytes:
    return json.dumps(
        [{"image": image, "id": 1, "choice": choice, "lead_time": 2.5} for image, choice in tasks]
    ).encode()


def as_csv(tasks: list[tuple[Any, Any]]) -> bytes:
    text = StringIO()
    table = csv.writer(text)
    table.writerow(["annotation_id", "choice", "image", "lead_time"])
    table.writerows(
        [1, choice if isinstance(choice, str) else json.dumps(choice), image, 2.5] for image, choice in tasks
    )
    return text.getvalue().encode()


def found(path: Path) -> list[tuple[str, str]]:
    with open_source(path) as source:
        return [(item.class_name, source.read(item.file).decode()) for item in source.items]


def listed(path: Path) -> DatasetSource:
    with open_source(path) as source:
        return source


@pytest.mark.parametrize(("name", "write"), [("project-1.json", as_json), ("project-1.csv", as_csv)])
@pytest.mark.parametrize(
    ("ant", "bee"),
    [
        pytest.param("images/a.png", "images/b.png", id="relative"),
        pytest.param("/data/upload/1/0a1b2c3d-a.png", "/data/upload/1/b.png", id="uploads"),
        pytest.param("/data/local-files/?d=photos/images/a.png", "/data/local-files/?d=images%2Fb.png", id="local"),
    ],
)
def test_images_beside_an_export_are_found(tmp_path: Path, name: str, write: Any, ant: str, bee: str) -> None:
    files = PHOTOS | {name: write([(ant, "ant"), (bee, {"choices": ["bee"]})])}
    root = folder(tmp_path / "d", files)
    for path in (root / name, root, archive(tmp_path / "a.zip", files)):
        assert sorted(found(path)) == [("ant", "a"), ("bee", "b")]


def test_an_export_in_a_folder_of_its_own(tmp_path: Path) -> None:
    files = {f"export/{name}": content for name, content in (PHOTOS | {"min.json": as_json(UPLOADS)}).items()}
    source = listed(archive(tmp_path / "a.zip", files))
    assert (source.layout, source.classes) == ("Label Studio's export", ("ant", "bee"))


def test_the_longest_ending_wins_and_two_that_are_alike_are_an_error() -> None:
    beside = FilesByPathEnd(["1/a.png", "2/a.png", "x/2/b.png"])
    assert beside.find("upload/1/a.png", "task 1") == "1/a.png"
    assert beside.find("b.png", "task 1") == "x/2/b.png"
    assert beside.find("gone.png", "task 1") == "gone.png"
    with pytest.raises(DatasetError, match=r"task 1: several files are named a\.png"):
        beside.find("3/a.png", "task 1")


def test_tasks_without_a_choice_are_left_out_and_counted(tmp_path: Path) -> None:
    tasks: list[tuple[Any, Any]] = [
        *UPLOADS,
        ("images/c.png", None),
        ("images/c.png", {"choices": []}),
        ("images/c.png", ""),
    ]
    source = listed(folder(tmp_path, PHOTOS | {"min.json": as_json(tasks)}))
    assert len(source.items) == 2
    assert source.notes == ("min.json: 3 tasks have no choice and are left out",)


def test_two_annotators_who_disagree_are_a_conflict(tmp_path: Path) -> None:
    files = coloured(4)
    tasks = [(name, name.partition("/")[0]) for name in files] + [("blue/000.png", "red")]
    data = load(folder(tmp_path, files | {"min.csv": as_csv(tasks)}), PREPROCESSING, val_fraction=0.25, seed=0)
    assert data.audit.conflicts == (("blue/000.png", "blue/000.png"),)


@pytest.mark.parametrize("pack", [pytest.param(folder, id="folder"), pytest.param(archive, id="zip")])
def test_an_image_that_is_not_there_is_a_bad_file(tmp_path: Path, pack: Any) -> None:
    files = coloured(4)
    tasks = [(name, name.partition("/")[0]) for name in files] + [("gone.png", "red")]
    data = load(pack(tmp_path / "d", files | {"min.json": as_json(tasks)}), PREPROCESSING, val_fraction=0.25, seed=0)
    (bad,) = data.audit.bad
    assert (bad.path, "cannot be read" in bad.reason, data.audit.images) == ("gone.png", True, 12)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(as_json([*UPLOADS, ("https://a.b/c.png", "ant")]), "task 3: 'https.*nothing is fetched", id="url"),
        pytest.param(as_json([*UPLOADS, ("s3://bucket/c.png", "ant")]), "another server", id="bucket"),
        pytest.param(as_json([*UPLOADS, ("/etc/passwd", "ant")]), "'/etc/passwd' is refused", id="absolute"),
        pytest.param(as_json([*UPLOADS, ("/data/upload/../../x", "ant")]), "is refused", id="outside"),
        pytest.param(as_json([*UPLOADS, ("/data/local-files/?d=../x", "ant")]), "is refused", id="local outside"),
        pytest.param(as_json([*UPLOADS, ("/data/local-files/", "ant")]), "is refused", id="local nothing"),
        pytest.param(as_json([*UPLOADS, (7, "ant")]), "`image` is no path", id="number"),
        pytest.param(as_json([*UPLOADS, ("a.png", 7)]), "choice is no text", id="choice"),
        pytest.param(as_json([*UPLOADS, ("a.png", {"choices": ["ant", "bee"]})]), "has 2 choices", id="several"),
        pytest.param(as_json([*UPLOADS, ("a.png", "{")]), "not valid JSON", id="choice of JSON"),
        pytest.param(b'[{"id": 1, "data": {}, "annotations": []}]', "export JSON-MIN or CSV", id="full"),
        pytest.param(b'[{"id": 1, "photo": "a.png"}]', "name the image `image`", id="other name"),
        pytest.param(
            b'[{"file": "a.png", "label": "x"}]', "of another tool, list the images in a CSV", id="other list"
        ),
        pytest.param(b'{"images": []}', "no list of tasks", id="no list"),
        pytest.param(b'{"a.png": "ant"}', "Studio, or list the images in a CSV", id="a map"),
        pytest.param(b"[1]", "no list of tasks", id="no tasks"),
        pytest.param(b"[", "not valid JSON", id="cut off"),
        pytest.param(b"[" * 100_000, "not valid JSON", id="deep"),
        pytest.param(b"\xff", "UTF-8", id="encoding"),
        pytest.param(b"[]", "0 classes", id="empty"),
    ],
)
def test_a_wrong_export_says_what_is_wrong(tmp_path: Path, content: bytes, message: str) -> None:
    path = folder(tmp_path, PHOTOS | {"min.json": content}) / "min.json"
    with pytest.raises(DatasetError, match=message) as error:
        listed(path)
    assert "\n" not in str(error.value)


def test_two_exports_in_one_folder(tmp_path: Path) -> None:
    files = PHOTOS | {"min.json": as_json(UPLOADS), "min.csv": as_csv(UPLOADS)}
    with pytest.raises(DatasetError, match=r"2 exports of Label Studio: min\.csv, min\.json"):
        listed(folder(tmp_path, files))


@pytest.mark.parametrize("name", ["list.csv", "notes.json"])
def test_other_tables_beside_class_folders_are_strays(tmp_path: Path, name: str) -> None:
    files = coloured(2) | {name: b'path,label\n[{"image": 1}]'}
    assert listed(folder(tmp_path, files)).strays == (name,)
