"""Tables of labels in the dialects that people bring them in."""

import json
from collections import Counter
from pathlib import Path

import pytest
from support.training_data import archive, folder

from models.data.samples import DatasetSource, Reading
from models.data.sources import open_source
from models.errors import DatasetError

IMAGES = {f"img/{name}/{i}.jpg": f"{name}{i}".encode() for name in ("ant", "bee") for i in range(3)}
PARTS = ("train", "val", "test")
ROWS = [(name, name.split("/")[1], PARTS[int(name[-5])]) for name in IMAGES]
KAGGLE = {f"train/0a{i}.jpg": b"x" for i in range(4)} | {f"test/9b{i}.jpg": b"x" for i in range(2)}
LABELS = "id,label\n" + "".join(f"0a{i},{'ant' if i % 2 else 'bee'}\n" for i in range(4))


def write(root: Path, text: str, encoding: str = "utf-8", name: str = "list.csv") -> Path:
    path = folder(root, IMAGES) / name
    path.write_bytes(text.encode(encoding))
    return path


def table(header: str, delimiter: str = ",") -> str:
    lines = [header, *(delimiter.join(row) for row in ROWS)]
    return "\n".join(lines) + "\n"


def listed(path: Path, encoding: str = "auto") -> DatasetSource:
    with open_source(path, Reading(encoding=encoding)) as source:
        return source


def found(path: Path, encoding: str = "auto") -> list[tuple[str, str, str]]:
    """Content, class and part of each image."""
    with open_source(path, Reading(encoding=encoding)) as source:
        return sorted((source.read(item.file).decode(), item.class_name, item.part) for item in source.items)


ALL = sorted((content.decode(), label, part) for content, (_, label, part) in zip(IMAGES.values(), ROWS, strict=True))

DIALECTS = [
    pytest.param(table("path,label,part"), "utf-8", id="plain"),
    pytest.param(table("Path,Label,Part"), "utf-8-sig", id="capitals"),
    pytest.param(table("File Name;Class;Split", ";"), "utf-8", id="semicolons"),
    pytest.param("sep=;\n" + table("path;label;split", ";"), "cp1252", id="declared"),
    pytest.param(table("image\tclass_name\tset", "\t"), "utf-16", id="Unicode text"),
    pytest.param(table("image|category|phase", "|"), "utf-16-be", id="bars"),
    pytest.param(
        "\n,,\n" + table("filepath,target,data set").replace("\n", "\n,,,\n") + ",,,\n", "utf-8", id="blank rows"
    ),
    pytest.param(table("fname , species,subset,,").replace(",", " , "), "utf-8", id="blanks"),
    pytest.param(table(",img_path,diagnosis,usage").replace("\nimg/", "\n7,img/"), "utf-8", id="index of pandas"),
    pytest.param(table("path,label,split").partition("\n")[2], "utf-8", id="no header"),
    pytest.param(table('"path","label","split"').replace(",ant,", ',"ant",'), "utf-8", id="quotes"),
    pytest.param(table("path,label,split").replace("\n", "\r\n"), "utf-8", id="Windows"),
    pytest.param(table("image_id,breed,partition").replace(".jpg", ""), "utf-8", id="ids"),
    pytest.param(table("image,tag,fold").replace("img/", "/content/data/img/"), "utf-8", id="another machine"),
    pytest.param(table("image,tag,fold").replace("img/", "C:\\data\\img\\").replace("/", "\\"), "utf-8", id="a drive"),
    pytest.param(table("image,tag,fold").replace("img/", "../input/bees/img/"), "utf-8", id="a notebook"),
    pytest.param(table("image,tag,fold").replace("img/", "IMG/").replace(".jpg", ".JPG"), "utf-8", id="case"),
]


@pytest.mark.parametrize(("text", "encoding"), DIALECTS)
def test_a_table_in_any_dialect(tmp_path: Path, text: str, encoding: str) -> None:
    mark = "\ufeff" if encoding == "utf-16-be" else ""
    assert found(write(tmp_path, mark + text, encoding)) == ALL


@pytest.mark.parametrize("name", ["list.jsonl", "list.ndjson"])
def test_json_lines(tmp_path: Path, name: str) -> None:
    lines = [json.dumps({"file_name": path, "label": label, "split": part, "box": [1]}) for path, label, part in ROWS]
    assert found(write(tmp_path, "\n".join([*lines, ""]), name=name)) == ALL


@pytest.mark.parametrize(
    ("column", "train", "val", "test"),
    [
        pytest.param("split", "Training", "valid", "TEST", id="family"),
        pytest.param("usage", "Training", "PublicTest", "PrivateTest", id="fer2013"),
        pytest.param("subset", "train", "dev", "holdout", id="dev"),
        pytest.param("is_valid", "False", "True", "True", id="fastai"),
        pytest.param("IsTest", "0", "0", "1", id="numbers"),
        pytest.param("is_train", "1.0", "0.0", "0.0", id="is_train"),
        pytest.param("Valid", "no", "yes", "no", id="yes"),
        pytest.param("test_flag", "0", "0", "1", id="flag"),
        pytest.param("in_test", "0", "0", "1", id="in"),
        pytest.param("part", "", "val", "test", id="empty is train"),
    ],
)
def test_parts_by_the_usual_columns_and_values(tmp_path: Path, column: str, train: str, val: str, test: str) -> None:
    values = dict(zip(PARTS, (train, val, test), strict=True))
    text = f"path,label,{column}\n" + "".join(f"{path},{label},{values[part]}\n" for path, label, part in ROWS)
    parts = {content[-1]: part for content, _, part in found(write(tmp_path, text))}
    expected = {
        "is_valid": ("val", "val"),
        "IsTest": ("train", "test"),
        "test_flag": ("train", "test"),
        "in_test": ("train", "test"),
        "is_train": ("test", "test"),
        "Valid": ("val", "train"),
    }
    assert (parts["0"], parts["1"], parts["2"]) == ("train", *expected.get(column, ("val", "test")))


def test_two_columns_of_marks_are_read_together(tmp_path: Path) -> None:
    marks = {"train": "0,0", "val": "1,0", "test": "0,1"}
    text = "path,label,is_val,is_test\n" + "".join(f"{path},{label},{marks[part]}\n" for path, label, part in ROWS)
    assert found(write(tmp_path, text)) == ALL


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param(
            table("path,label,pile"),
            r"the column pile looks like the parts .*\(test, train, val\); rename",
            id="unknown",
        ),
        pytest.param(table("path,label,split").replace(",val", ",2"), "the column split has '2'", id="number"),
        pytest.param(table("path,label,usage").replace(",val", ",spare"), "the column usage has 'spare'", id="some"),
        pytest.param(
            table("path,label,is_valid").replace(",val", ",perhaps"), "the column is_valid has 'perhaps'", id="mark"
        ),
        pytest.param(
            "path,label,split,set\na,b,train,test\n", "the columns split, set may all give the part", id="two"
        ),
        pytest.param("path,label,class\nimg/ant/0.jpg,a,b\n", "label, class may all be the label", id="labels"),
        pytest.param("path,file\na.jpg,b.jpg\n", "path, file may all be the path", id="paths"),
        pytest.param(
            "a,b,label\nimg/ant/0.jpg,img/ant/1.jpg,x\n", "a, b may all be the path", id="two columns of images"
        ),
        pytest.param("path,width,height\nimg/ant/0.jpg,2,3\n", "has no column of labels", id="no labels"),
        pytest.param("path,label\nimg/ant/0.jpg,a,b\n", "line 2: the row has 3 cells, and the first row 2", id="cells"),
        pytest.param("path,label\n0,ant\n", r"'0' may be img/ant/0\.jpg, img/bee/0\.jpg", id="ambiguous id"),
        pytest.param("path,label\n/x/1/0.jpg,a\n", r"may be img/ant/0\.jpg, img/bee/0\.jpg", id="ambiguous end"),
        pytest.param("path,label\nimg/ant/0.jpg,\n", "at least two labels; 1 row has no label", id="no label at all"),
        pytest.param("# mine\npath,label\nimg/ant/0.jpg,a\n", "titles and comments above the names", id="a comment"),
        pytest.param("PK\3\4" + "\0" * 30, "is an Excel workbook or a zip, and no text", id="workbook"),
        pytest.param("path,label\nhttps://a.b/0.jpg,a\n", "nothing is fetched", id="url"),
    ],
)
def test_what_may_be_meant_in_two_ways_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DatasetError, match=message) as caught:
        listed(write(tmp_path, text))
    assert str(caught.value).isprintable()


def test_two_paths_of_another_machine_are_not_one_file(tmp_path: Path) -> None:
    folder(tmp_path, {"photos/1.jpg": b"", "photos/2.jpg": b""})
    (tmp_path / "t.csv").write_text("path,label\n/x/a/1.jpg,ant\n/x/b/1.jpg,bee\n")
    with pytest.raises(DatasetError, match=r"both end like photos/1\.jpg"):
        listed(tmp_path / "t.csv")


def test_what_was_understood_is_told(tmp_path: Path) -> None:
    rows = "".join(f"{path[:-4]};{label};{i};7\n" for i, (path, label, _) in enumerate(ROWS))
    source = listed(write(tmp_path, f"Image ID;Breed;fold;colour\n{rows}img/ant/0;;1;7\n"))
    assert source.layout == "the table list.csv (images in Image ID, labels in Breed, separated by semicolons)"
    assert source.notes == (
        "list.csv: fold has numbers of folds, which are no parts",
        "list.csv: ignored columns: fold, colour",
        "6 images are found by their names without a suffix, for example 'img/ant/0' is img/ant/0.jpg",
        "1 row has no label and is ignored, the first list.csv, line 8",
    )


def test_one_column_per_class(tmp_path: Path) -> None:
    rows = "".join(f"{path},{float(label == 'ant')},{float(label == 'bee')},{part}\n" for path, label, part in ROWS)
    assert found(write(tmp_path, f"image,ant,bee,split\n{rows}")) == ALL


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        pytest.param(("3.0", "10.0"), ("10", "3"), id="floats of pandas"),
        pytest.param(("3", "10"), ("10", "3"), id="integers, in the order of text"),
        pytest.param(("3.5", "10.0"), ("10.0", "3.5"), id="fractions"),
        pytest.param(("v1.0", "2.0"), ("2.0", "v1.0"), id="versions"),
    ],
)
def test_numbers_as_labels(tmp_path: Path, labels: tuple[str, str], classes: tuple[str, str]) -> None:
    text = "path,label\n" + "".join(f"{path},{labels[label == 'bee']}\n" for path, label, _ in ROWS)
    assert listed(write(tmp_path, text)).classes == classes


def test_parts_of_the_images_folders_count_where_no_column_has_them(tmp_path: Path) -> None:
    images = {f"{part}/{name}.jpg": b"x" for part in ("train", "valid") for name in ("1", "2")}
    (folder(tmp_path, images) / "t.csv").write_text("path,label\n" + "".join(f"{p},c{p[-5]}\n" for p in images))
    source = listed(tmp_path / "t.csv")
    assert Counter(item.part for item in source.items) == {"train": 2, "val": 2}
    assert source.notes == ("t.csv has no column of parts; they follow from the folders of the images",)


# Encodings


@pytest.mark.parametrize(
    ("encoding", "label"), [("cp1252", "K\u00e4fer"), ("gbk", "\u72d7"), ("cp932", "\u8868"), ("utf-16-le", "bee")]
)
def test_another_encoding_is_given_or_refused(tmp_path: Path, encoding: str, label: str) -> None:
    path = write(tmp_path, f"path,label\nimg/ant/0.jpg,{label}\nimg/bee/0.jpg,ant\n", encoding)
    assert set(listed(path, encoding).classes) == {"ant", label}
    with pytest.raises(
        DatasetError, match=rf"list\.csv .*(reads .*{label} as {encoding}|UTF-16).*--encoding"
    ) as caught:
        listed(path)
    assert str(caught.value).isprintable()


def test_a_wrong_encoding_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "path,label\nimg/ant/0.jpg,K\u00e4fer\nimg/bee/0.jpg,ant\n", "cp1252")
    with pytest.raises(DatasetError, match="is not text in ascii; it reads K\u00e4fer as cp1252"):
        listed(path, "ascii")


# Folders and archives


@pytest.mark.parametrize("pack", [pytest.param(folder, id="folder"), pytest.param(archive, id="zip")])
@pytest.mark.parametrize("top", ["", "bees/"])
def test_kaggles_folder(tmp_path: Path, pack: object, top: str) -> None:
    tables = {
        "train.csv": LABELS,
        "test.csv": "id,width\n9b0,2\n",
        "sample_submission.csv": "id,label\n9b0,ant\n9b1,ant\n",
    }
    files = KAGGLE | {name: text.encode() for name, text in tables.items()}
    source = listed(pack(tmp_path / "d", {top + name: data for name, data in files.items()}))  # type: ignore[operator]
    assert Counter((item.part, item.class_name) for item in source.items) == {("train", "ant"): 2, ("train", "bee"): 2}
    assert source.notes[-2].startswith(f"ignored tables, without labels or without images: {top}sample_submission.csv")
    assert source.notes[-1] == f"2 images are in no row and are ignored, the first {top}test/9b0.jpg"


def test_one_id_in_train_and_test(tmp_path: Path) -> None:
    files = {f"{part}/{i}.jpg": part.encode() for part in ("train", "test") for i in range(2)}
    source = listed(folder(tmp_path, files | {"train.csv": b"id,label\n0,ant\n1,bee\n"}))
    assert [item.file for item in source.items] == ["train/0.jpg", "train/1.jpg"]


def test_one_table_per_part(tmp_path: Path) -> None:
    by_part = {part: [(path, label) for path, label, own in ROWS if own == part] for part in PARTS}
    tables = {
        f"{part}_labels.csv": ("path,label\n" + "".join(f"{path},{label}\n" for path, label in rows)).encode()
        for part, rows in by_part.items()
    }
    assert found(folder(tmp_path, IMAGES | tables)) == ALL


def test_hugging_faces_metadata_per_part(tmp_path: Path) -> None:
    files: dict[str, bytes] = {}
    for part in ("train", "validation", "test"):
        lines = [json.dumps({"file_name": f"{name}.jpg", "label": name}) for name in ("ant", "bee")]
        files |= {f"{part}/ant.jpg": b"", f"{part}/bee.jpg": b"", f"{part}/metadata.jsonl": "\n".join(lines).encode()}
    source = listed(folder(tmp_path, files))
    assert Counter(item.part for item in source.items) == {"train": 2, "val": 2, "test": 2}


def test_a_folder_with_several_tables_is_refused(tmp_path: Path) -> None:
    root = folder(tmp_path, IMAGES | dict.fromkeys(("a.csv", "b.csv"), table("path,label,split").encode()))
    with pytest.raises(DatasetError, match=r"holds 2 tables with labels: a\.csv, b\.csv; name one of them"):
        listed(root)


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("id,name\n0,ant\n1,bee\n", id="names of classes"),
        pytest.param("epoch,loss\n1,0.5\n", id="figures"),
        pytest.param("path,label\ngone/1.jpg,ant\n", id="other images"),
    ],
)
def test_a_table_that_is_no_list_of_images_leaves_class_folders_alone(tmp_path: Path, text: str) -> None:
    source = listed(
        folder(tmp_path, {f"ant/{i}.png": b"" for i in (7, 8)} | {"bee/9.png": b"", "x.csv": text.encode()})
    )
    assert (source.layout, len(source.items), source.strays) == ("a folder per class", 3, ("x.csv",))


def test_a_table_beside_class_folders_gives_their_parts(tmp_path: Path) -> None:
    files = IMAGES | {"birds.csv": table("filepaths,labels,data set").encode()}
    assert found(archive(tmp_path / "a.zip", files)) == ALL
