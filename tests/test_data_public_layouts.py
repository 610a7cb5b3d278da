"""Data sets as their publishers and labelling tools lay them out: read as meant, or refused by what they are."""

import json
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
from support.training_data import PREPROCESSING, coloured, folder

from models.data.dataset import load
from models.data.samples import DatasetSource, Reading
from models.data.sources import open_source
from models.errors import DatasetError

X = b"\xff"
COCO = json.dumps({"images": [{"id": 1}], "annotations": [{"bbox": [1, 2, 3, 4]}], "categories": []}).encode()
YOLO = b"0 0.5 0.5 0.1 0.1\n1 0.4 0.4 0.1 0.1\n"


def numbered(name: str, count: int = 4) -> dict[str, bytes]:
    return {name.format(i): X for i in range(count)}


def rows(line: str, count: int, labels: str = "ab") -> str:
    return "".join(line.format(i=i, label=labels[i % len(labels)]) + "\n" for i in range(count))


def read(root: Path, files: dict[str, bytes], reading: Reading | None = None) -> DatasetSource:
    with open_source(folder(root, files), reading or Reading()) as source:
        return source


def refused(root: Path, files: dict[str, bytes]) -> DatasetError:
    with pytest.raises(DatasetError) as caught:
        read(root, files)
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize(
    ("files", "classes"),
    [
        pytest.param(
            {f"CUB/images/00{k}.{name}/{i}.jpg": X for k, name in enumerate("ab") for i in range(2)}
            | {"CUB/classes.txt": b"1 a", "CUB/parts/parts.txt": b"1 beak", "attributes.txt": b"1 x"},
            ("000.a", "001.b"),
            id="CUB-200",
        ),
        pytest.param(
            numbered("Images/n1-a/{}.jpg") | numbered("Images/n2-b/{}.jpg")
            | {f"Annotation/n{k}-{name}/{i}": b"<annotation>" for k, name in ((1, "a"), (2, "b")) for i in range(2)},
            ("n1-a", "n2-b"),
            id="Stanford Dogs: annotations without suffix",
        ),
        pytest.param(
            numbered("101/a/{}.jpg") | numbered("101/b/{}.jpg") | {"101/b/tmp": b"text"}, ("a", "b"), id="Caltech-101"
        ),
        pytest.param(
            numbered("img{}.jpg", 8) | {"all.csv": rows("TRAIN,gs://bucket/x/img{i}.jpg,{label}", 8).encode()},
            ("a", "b"),
            id="AutoML: parts and addresses, no header",
        ),
        pytest.param(
            numbered("img{}.jpg") | {"all.csv": rows("UNASSIGNED,gs://b/img{i}.jpg,{label}", 4).encode()},
            ("a", "b"),
            id="AutoML: unassigned",
        ),
        pytest.param(
            numbered("{}.jpg") | {"x.jsonl": rows('{{"image_url": "azureml://s/{i}.jpg?v=1", "label": "{label}"}}', 4).encode()},
            ("a", "b"),
            id="Azure ML",
        ),
        pytest.param(
            numbered("{}.jpg") | {"x.csv": ("\ufeffsep=;\r\nDatei;Klasse\r\n" + rows("{i}.jpg;{label}", 4)).encode()},
            ("a", "b"),
            id="Excel, headers of another language",
        ),
        pytest.param(
            numbered("images/{}.png") | {"d.csv": ("Image Index,Finding Labels,Age\n" + rows("{i}.png,{label},5", 4)).encode()},
            ("a", "b"),
            id="NIH",
        ),
        pytest.param(
            numbered("train/a/{}.jpg") | numbered("train/b/{}.jpg") | numbered("val/{}.jpg", 30)
            | {"val.csv": ("ImageId,PredictionString\n" + rows("{i},n0 1 2 {i}", 30)).encode()},
            ("a", "b"),
            id="ILSVRC: boxes in a table",
        ),
    ],
)  # fmt: skip
def test_is_read_as_meant(tmp_path: Path, files: dict[str, bytes], classes: tuple[str, ...]) -> None:
    assert read(tmp_path, files).classes == classes


@pytest.mark.parametrize(
    ("files", "message"),
    [
        pytest.param(
            numbered("bottle/train/good/{}.png") | numbered("bottle/test/good/{}.png")
            | numbered("bottle/test/broken/{}.png") | numbered("bottle/ground_truth/broken/{}.png"),
            "test has classes that train lacks (broken), and train has good: a class needs training images",
            id="MVTec",
        ),
        pytest.param(numbered("img/{}.jpg") | {"labels/0.txt": YOLO}, "labels/0.txt is a file of YOLO", id="YOLO"),
        pytest.param(
            numbered("images/train/{}.jpg") | {"labels/train/0.txt": YOLO, "data.yaml": b"nc: 2"},
            "labels/train/0.txt is a file of YOLO",
            id="YOLO in parts",
        ),
        pytest.param(
            numbered("images/{}.jpg") | {"annotations/x.json": COCO}, "annotations/x.json is a COCO file", id="COCO"
        ),
        pytest.param(
            numbered("train2017/{}.jpg") | numbered("val2017/{}.jpg") | {"annotations/x.json": COCO},
            "annotations/x.json is a COCO file",
            id="COCO in parts",
        ),
        pytest.param(
            numbered("train/images/{}.jpg") | numbered("train/labels/{}.png"),
            "images/, labels/ are called like images and what belongs to them",
            id="masks in parts",
        ),
        pytest.param(
            numbered("JPEGImages/{}.jpg") | {"Annotations/0.xml": b"<annotation/>"}, "is a file of Pascal VOC", id="VOC"
        ),
        pytest.param(
            numbered("images/a_{}.jpg") | numbered("images/b_{}.jpg") | numbered("annotations/trimaps/{}.png"),
            "labels in names of files are not read (a, b)",
            id="Oxford Pets",
        ),
        pytest.param(
            numbered("train/cat.{}.jpg") | numbered("train/dog.{}.jpg") | numbered("test1/{}.jpg"),
            "labels in names of files are not read (cat, dog)",
            id="Kaggle's cats and dogs",
        ),
        pytest.param(
            numbered("jpg/image_{}.jpg") | {"imagelabels.mat": b"MATLAB"}, "is a MATLAB file", id="Flowers-102"
        ),
        pytest.param(numbered("{}.jpg") | {"l.xlsx": b"PK"}, "l.xlsx is a spreadsheet, which is not read", id="Excel"),
        pytest.param(numbered("{}.jpg") | {"l.csv": b"PK\3\4"}, "1.jpg, 2.jpg, 3.jpg, l.csv", id="renamed workbook"),
        pytest.param({"a.zip": b"PK", "b.zip": b"PK"}, "a.zip is an archive in the dataset", id="zips in a folder"),
        pytest.param({"train.tfrecord": b"x"}, "is a file of arrays or records", id="TFRecord"),
        pytest.param(
            numbered("img/{}.jpg") | {"train.lst": b"0\t1\timg/0.jpg\n"}, "train.lst is a list of images", id="MXNet"
        ),
        pytest.param(
            numbered("images/{}.jpg") | {"train.txt": b"images/0.jpg 1\n"}, "train.txt is a list of images", id="Caffe"
        ),
        pytest.param(
            numbered("images/{}.jpg") | {"x.json": b'[{"id": "1", "tags": ["a"], "regions": []}]'},
            "x.json is an export of Azure Custom Vision",
            id="Custom Vision",
        ),
        pytest.param(
            numbered("{}.jpg") | {"x.json": b'[{"img": "/data/upload/0.jpg", "kind": "a", "annotator": 1, "annotation_id": 1}]'},
            "x.json is an export of Label Studio without the columns image and choice",
            id="Label Studio under other names",
        ),
        pytest.param(
            numbered("{}.jpg") | {"x.json": b'{"0.jpg1": {"filename": "0.jpg", "regions": [], "file_attributes": {}}}'},
            "x.json is an export of VGG Image Annotator",
            id="VIA",
        ),
        pytest.param(
            numbered("{}.jpg") | {"o.manifest": b'{"source-ref": "s3://b/0.jpg", "class": 1}'},
            "o.manifest is a manifest of SageMaker Ground Truth",
            id="SageMaker",
        ),
        pytest.param(
            numbered("images/{}.jpg") | {"a.xml": b"<?xml?><annotations><image/></annotations>"},
            "a.xml is an export of CVAT",
            id="CVAT",
        ),
        pytest.param(
            numbered("{}.jpg") | {"l.csv": b'file,label\n0.jpg,a\n1.jpg,b\n2.jpg,"a,b"\n'},
            "labels are lists of other labels ('a,b')",
            id="several labels",
        ),
        pytest.param(
            numbered("{}.jpg") | {"l.csv": b"file,label\n0.jpg,a\n1.jpg,b\n2.jpg,a|c\n"},
            "labels are lists of other labels ('a|c')",
            id="NIH's several labels",
        ),
        pytest.param(
            numbered("{}.jpg") | {"l.csv": b"filename,class,xmin,ymin,xmax,ymax\n0.jpg,a,1,1,2,2\n0.jpg,b,3,3,4,4\n1.jpg,b,1,1,2,2\n"},
            "l.csv has boxes, and several rows for one image, such as 0.jpg",
            id="Roboflow's boxes",
        ),
        pytest.param(
            numbered("train/{}.jpg", 30) | {"train/metadata.jsonl": rows('{{"file_name": "{i}.jpg", "text": "A dog {i}"}}', 30).encode()},
            "train/ has no class folders, so the images have no labels",
            id="captions of Hugging Face",
        ),
    ],
)  # fmt: skip
def test_is_refused_by_what_it_is(tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    assert message in str(refused(tmp_path, files))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        pytest.param("a.zip", b"Rar!\x1a\7\1\0", "is a RAR file: unpack it, and give the folder", id="RAR"),
        pytest.param("a.zip", b"7z\xbc\xaf\x27\x1c", "is a 7z file: unpack it", id="7z"),
        pytest.param("a.zip", b"<!DOCTYPE html><html>", "is an HTML page, which was saved in its place", id="HTML"),
        pytest.param("a.zip", b"version https://git-lfs.github.com/spec/v1\n", "is a pointer of Git LFS", id="Git LFS"),
        pytest.param("a.zip", b"PK\3\4" + b"x" * 99, "is a zip file that is damaged or cut off", id="cut off"),
        pytest.param("a.zip", b"", "is empty", id="empty"),
        pytest.param("a.tar.xz", b"\xfd7zXZ\0", "is an xz file: unpack it", id="xz"),
        pytest.param("a.jpg", b"\xff\xd8\xff\xe0", "is one image, and no dataset", id="image"),
        pytest.param("a.mat", b"MATLAB 5.0 MAT-file", "is a MATLAB file", id="MATLAB"),
        pytest.param("a.h5", b"\x89HDF\r\n\x1a\n", "is an HDF5 file", id="HDF5"),
        pytest.param("a.xlsx", b"PK\3\4", "is a spreadsheet, which is not read: save it as CSV UTF-8", id="Excel"),
        pytest.param("a.json", COCO, "is a COCO file", id="COCO"),
        pytest.param("a.csv", b"emotion,pixels,Usage\n1,0 0 0,Training\n", "holds pixels and no paths", id="FER-2013"),
        pytest.param(
            "a.csv", ("label," + ",".join(f"pixel{i}" for i in range(9)) + "\n").encode(), "holds pixels", id="MNIST"
        ),
        pytest.param("a.csv", b"url,label\nhttps://a.b/0.jpg,x\n", "nothing is fetched", id="addresses"),
        pytest.param(
            "a.csv", ("file,text\n" + rows("{i}.jpg,A dog {i}", 30)).encode(), "too many for labels", id="captions"
        ),
    ],
)
def test_a_file_that_is_no_dataset_says_what_it_is(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DatasetError) as caught, open_source(tmp_path / name):
        pass
    assert message in str(caught.value)


def test_labels_that_are_lists_are_classes_where_layout_says_so(tmp_path: Path) -> None:
    files = numbered("{}.jpg", 3) | {"l.csv": b'file,label\n0.jpg,a\n1.jpg,b\n2.jpg,"a,b"\n'}
    assert read(tmp_path, files, Reading("csv")).classes == ("a", "a,b", "b")


@pytest.mark.parametrize(
    ("files", "reading", "param"),
    [
        pytest.param(numbered("train/{}.jpg") | numbered("bus/{}.jpg"), Reading(), "layout", id="doubt"),
        pytest.param(numbered("a/{}.jpg"), Reading("splits"), "layout", id="splits"),
        pytest.param(numbered("a/{}.jpg") | numbered("b/{}.jpg"), Reading("csv"), "layout", id="csv"),
        pytest.param(
            numbered("{}.jpg") | {"l.csv": "file,label\n0.jpg,Käse\n".encode("cp1252")}, Reading(), "encoding", id="code page"
        ),
        pytest.param(
            numbered("{}.jpg") | {"l.csv": "file,label\n0.jpg,Käse\n".encode("cp1252")},
            Reading(encoding="ascii"),
            "encoding",
            id="wrong code page",
        ),
    ],
)  # fmt: skip
def test_an_error_names_the_field_that_settles_it(
    tmp_path: Path, files: dict[str, bytes], reading: Reading, param: str
) -> None:
    with pytest.raises(DatasetError) as caught:
        read(tmp_path, files, reading)
    assert caught.value.param == param


@pytest.mark.skipif(shutil.which("zip") is None, reason="zip is not installed")
def test_a_symbolic_link_in_a_zip_is_named_and_not_read_as_text(tmp_path: Path) -> None:
    root = folder(tmp_path / "data", coloured(4))
    (root / "red" / "link.png").symlink_to("000.png")
    subprocess.run(["zip", "-qyr", "../a.zip", "."], cwd=root, check=True)
    audit = load(tmp_path / "a.zip", PREPROCESSING, val_fraction=0.25, seed=0).audit
    assert [bad.reason for bad in audit.bad] == ["cannot be read: a symbolic link, which is not followed in an archive"]
    assert (
        "1 file is a symbolic link, which is not followed, the first red/link.png: pack the zip again"
        in audit.warnings[-1]
    )


def test_zips_in_a_zip_are_named(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as packed:
        packed.writestr("train.zip", b"PK")
        packed.writestr("sample_submission.csv", "id,label\n")
    with pytest.raises(DatasetError, match=r"train\.zip is an archive in the dataset"), open_source(tmp_path / "a.zip"):
        pass
