"""Which folders are parts, and which are classes."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest
from support.training_data import archive, folder
from test_data_tar import packed as tarred

from models.data.samples import DatasetSource, Layout, Reading
from models.data.sources import open_source
from models.errors import DatasetError

ANT_BEE = ("ant", "bee")
PACKS = [pytest.param(folder, id="folder"), pytest.param(archive, id="zip"), pytest.param(tarred, id="tar")]


def images(*folders: str, count: int = 2) -> dict[str, bytes]:
    return {f"{name}/{i}.jpg": b"x" for name in folders for i in range(count)}


def below(tops: Iterable[str], classes: Iterable[str] = ANT_BEE) -> dict[str, bytes]:
    return images(*(f"{top}/{name}" for top in tops for name in classes))


def read(root: Path, files: dict[str, bytes], layout: Layout = "auto", pack: object = folder) -> DatasetSource:
    with open_source(pack(root / "d", files), Reading(layout)) as source:  # type: ignore[operator]
        return source


def refused(root: Path, files: dict[str, bytes], layout: Layout = "auto") -> str:
    with pytest.raises(DatasetError) as caught:
        read(root, files, layout)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("names", "parts"),
    [
        pytest.param(["Training", "Testing"], {"train": 4, "test": 4}, id="mnist_png"),
        pytest.param(["training_set", "test_set"], {"train": 4, "test": 4}, id="cats and dogs"),
        pytest.param(["seg_train/seg_train", "seg_test/seg_test"], {"train": 4, "test": 4}, id="landscapes"),
        pytest.param(["train/train", "valid/valid", "test"], {"train": 4, "val": 4, "test": 4}, id="wrapped parts"),
        pytest.param(["images/train", "images/val"], {"train": 4, "val": 4}, id="images"),
        pytest.param(["a/b/TRAIN/images", "a/b/DEV/images"], {"train": 4, "val": 4}, id="wrapped twice"),
        pytest.param(["flowers_train", "flowers_eval"], {"train": 4, "test": 4}, id="a common prefix"),
        pytest.param(["train", "val", "eval", "test"], {"train": 4, "val": 4, "test": 8}, id="two test folders"),
    ],
)
@pytest.mark.parametrize("pack", PACKS)
def test_parts_of_many_names(tmp_path: Path, pack: object, names: list[str], parts: dict[str, int]) -> None:
    source = read(tmp_path, below(names), pack=pack)
    assert source.classes == ANT_BEE
    assert Counter(item.part for item in source.items) == parts


def test_the_layout_says_what_a_part_is_taken_for(tmp_path: Path) -> None:
    assert read(tmp_path, below(["Training", "test"])).layout == "Training/ as train, test/ with a folder per class"


@pytest.mark.parametrize("extra", ["seg_pred/seg_pred", "unlabeled", "test1", "test/test", "extra/more", "fold1"])
def test_folders_without_labels_beside_parts_are_ignored_aloud(tmp_path: Path, extra: str) -> None:
    source = read(tmp_path, below(["train", "val"]) | images(extra, count=3))
    assert source.classes == ANT_BEE
    assert [left.count for left in source.ignored] == [3]
    assert source.notes[0].startswith(f"3 files are ignored: {extra.split('/')[0]}/ ")


def test_a_single_class_of_a_part_is_no_wrapping_folder(tmp_path: Path) -> None:
    source = read(tmp_path, below(["train"]) | images("test/bee/2024"))
    assert Counter(item.class_name for item in source.items if item.part == "test") == {"bee": 2}


def test_parts_below_classes(tmp_path: Path) -> None:
    source = read(tmp_path, below(ANT_BEE, ["train", "Test"]))
    assert (source.classes, Counter(item.part for item in source.items)) == (ANT_BEE, {"train": 4, "test": 4})
    assert source.layout == "a folder per class, with train/, Test/ as test in each"


@pytest.mark.parametrize(
    "parts", [["train", "valid", "test"], ["Training", "Testing"], ["train/images", "test/images"]]
)
def test_parts_without_class_folders_are_refused(tmp_path: Path, parts: list[str]) -> None:
    message = refused(tmp_path, images(*parts))
    assert "have no class folders" in message
    assert "a CSV with the columns path and label" in message
    assert "--layout classes" in message


@pytest.mark.parametrize(
    ("files", "message"),
    [
        pytest.param(images("train", "car", "bus"), "train/ is named like a part of the dataset", id="train"),
        pytest.param(images("Test", "control"), "and control/ beside it is not", id="test"),
        pytest.param(images("valid", "invalid"), "`classes` takes invalid, valid as classes", id="valid"),
        pytest.param(images("img", "masks"), "img/, masks/ are called like images and what belongs to them", id="img and masks"),
        pytest.param(below(["train", "car"]), "beside it lies car/", id="train with folders beside a class"),
        pytest.param(below(["val", "test"]), "none is for training", id="no training part"),
        pytest.param(images("fold1", "fold2"), "called like folds", id="flat folds"),
        pytest.param(below(["fold1", "fold2", "fold3"]), "called like folds", id="folds"),
        pytest.param(below(["2019", "2020"]), "have the same folders in them (ant/, bee/)", id="years"),
        pytest.param(
            below(["2019", "2020"]) | images("2021/ant"), "have the same folders in them", id="one has not all"
        ),
        pytest.param(
            images(*ANT_BEE) | below(["all"], ANT_BEE), "all/ has folders in it called like those", id="a copy beside them"
        ),
        pytest.param(below(["img"]) | below(["data"], ["img/ant", "img/bee"]), "have the same folders in them", id="deeper"),
        pytest.param(below(ANT_BEE, ["train", "test"]) | images("ant"), "called like parts in them", id="and loose"),
        pytest.param(below(["images", "masks"], ["train", "val"]), "called like parts in them", id="masks"),
        pytest.param(images("Ant", "ant", "bee"), "classes differ in case, width or separators alone: 'Ant', 'ant'", id="case"),
        pytest.param(images("ant", "\uff41nt", "bee"), "classes differ in case", id="width"),
        pytest.param(images("fire ant", "fire_ant", "bee"), "classes differ in case", id="separators"),
    ],
)  # fmt: skip
def test_a_layout_in_doubt_is_refused_and_the_field_settles_it(
    tmp_path: Path, files: dict[str, bytes], message: str
) -> None:
    said = refused(tmp_path, files)
    assert message in said
    assert "--layout" in said
    tops = {name.split("/")[0] for name in files}
    assert read(tmp_path, files, "classes").classes == tuple(sorted(tops | ({"ant"} if "ant" in tops else set())))


def test_splits_takes_the_inner_folders(tmp_path: Path) -> None:
    source = read(tmp_path, below(["fold1", "fold2"]), "splits")
    assert (source.classes, {item.part for item in source.items}) == (ANT_BEE, {"train"})
    assert read(tmp_path, below(["Train", "car"]), "splits").classes == ANT_BEE


def test_nested_folders_that_differ_are_no_doubt(tmp_path: Path) -> None:
    files = images("ant/red", "ant/black", "bee/wild", "bee/honey") | images("wasp/images", "bee/images")
    assert read(tmp_path, files).classes == ("ant", "bee", "wasp")


def test_two_forms_of_unicode_are_one_class_and_a_note(tmp_path: Path) -> None:
    source = read(tmp_path, images("caf\u00e9", "cafe\u0301", "bar"))
    assert source.classes == ("bar", "caf\u00e9")
    assert "two forms of Unicode (NFC and NFD), and taken as one class: caf\u00e9" in source.notes[0]


def test_layout_csv_asks_for_the_table_in_a_folder(tmp_path: Path) -> None:
    files = images("train") | {"labels.csv": b"path,label\ntrain/0.jpg,ant\ntrain/1.jpg,bee\n"}
    assert read(tmp_path, files).classes == read(tmp_path, files, "csv").classes == ANT_BEE
    assert "1 class (train)" in refused(tmp_path, files, "classes")
    assert "needs a table of images and labels" in refused(tmp_path / "none", images(*ANT_BEE), "csv")


def test_labels_of_a_table_that_differ_in_case_are_refused_unless_it_is_said(tmp_path: Path) -> None:
    path = folder(tmp_path, images("a") | {"t.csv": b"path,label\na/0.jpg,ant\na/1.jpg,Ant\n"}) / "t.csv"
    with pytest.raises(DatasetError, match="differ in case"), open_source(path):
        pass
    with open_source(path, Reading("csv")) as source:
        assert source.classes == ("Ant", "ant")


# Files of text


@pytest.mark.parametrize("pack", PACKS)
def test_annotations_beside_images_are_ignored(tmp_path: Path, pack: object) -> None:
    texts = {
        "ant/0.txt": b"0 0.5 0.5 1 1\n",
        "ant/0.xml": b"<annotation/>",
        "ant/0.xmp": b"<x:xmpmeta/>",
        "ant/0.AAE": b"<?xml?>",
        "bee/labels.json": b"{}",
        "bee/README": b"Hi",
    }
    folders = {"labels/0.txt": b"0 1\n", "labels/1.txt": b""}
    source = read(tmp_path, images(*ANT_BEE) | texts | folders, pack=pack)
    assert (source.classes, len(source.items)) == (ANT_BEE, 4)
    assert [(left.reason, left.count) for left in source.ignored] == [
        ("text beside the images, such as annotations", 8)
    ]


def test_content_that_is_no_text_stays_whatever_its_name(tmp_path: Path) -> None:
    files = images(*ANT_BEE) | {"ant/photo.txt": b"\xff\xd8\xff\xe0\0", "ant/text.jpg": b"hello"}
    assert {item.path for item in read(tmp_path, files).items} >= {"ant/photo.txt", "ant/text.jpg"}


# What systems leave


LEFT = [
    *("ant/Thumbs.db", "ant/THUMBS.DB", "Desktop.ini", "$Recycle.Bin/1.jpg", "FOUND.000/1.jpg", "~$list.xlsx"),
    *("__macosx/ant/._0.jpg", "ant/._0.jpg", "ant/.ds_store", ".Trashes/1.jpg", "ant/Icon\r", "Temporary Items/a.jpg"),
    *("ant/@EADIR/0.jpg/SYNOPHOTO.jpg", "#Recycle/1.jpg", "#snapshot/ant/0.jpg", "@Recently-Snapshot/1.jpg"),
    *("Lost+Found/1.jpg", ".Trash-1000/files/1.jpg", "ant/.ipynb_checkpoints/0-checkpoint.jpg", ".dvc/config"),
    *("ant/0.jpg:Zone.Identifier", "ant/2.jpg.crdownload", "ant/3.jpg.part", "System Volume Information/x.jpg"),
    *("ant/0.THM", "ant/0.jpg - Shortcut.lnk", "ant/~0.tmp", "BridgeSort", "ant/pspbrwse.jbf"),
]


@pytest.mark.parametrize("name", LEFT)
@pytest.mark.parametrize("pack", PACKS)
def test_what_systems_leave_is_ignored_with_the_reason(tmp_path: Path, pack: object, name: str) -> None:
    source = read(tmp_path, images(*ANT_BEE) | {name: b"x"}, pack=pack)
    assert (source.classes, len(source.items), source.strays) == (ANT_BEE, 4, ())
    (left,) = source.ignored
    assert left.reason.startswith(("left by", "an unfinished download", "hidden"))
    assert left.count == 1


# Links


def linked(root: Path, *, folders: bool) -> Path:
    pool = folder(root / "pool", images(*ANT_BEE))
    data = root / "data"
    for name in ANT_BEE:
        (data if folders else data / name).mkdir(parents=True, exist_ok=True)
        for target in [pool / name] if folders else (pool / name).iterdir():
            (data / name / ("" if folders else target.name)).symlink_to(target)
    return data


@pytest.mark.parametrize("folders", [pytest.param(True, id="folders"), pytest.param(False, id="files")])
def test_links_are_followed_where_that_is_said(tmp_path: Path, folders: bool) -> None:
    with open_source(linked(tmp_path, folders=folders), Reading(follow_links=True)) as source:
        assert (source.classes, source.advice) == (ANT_BEE, "")
        assert {source.read(item.file) for item in source.items} == {b"x"}


@pytest.mark.abuse("J2")
def test_links_to_folders_are_not_followed_and_it_says_what_to_do(tmp_path: Path) -> None:
    with (
        pytest.raises(
            DatasetError, match=r"2 files are symbolic links, which are not followed, the first ant: upload .* `cp -rL`"
        ),
        open_source(linked(tmp_path, folders=True)),
    ):
        pass


@pytest.mark.abuse("J2")
def test_links_to_files_are_not_read_and_it_says_what_to_do(tmp_path: Path) -> None:
    with open_source(linked(tmp_path, folders=False)) as source:
        assert source.advice.startswith(
            "4 files are symbolic links, which are not followed, the first ant/0.jpg: upload"
        )
        with pytest.raises(OSError, match="leads out of the dataset"):
            source.read("ant/0.jpg")


@pytest.mark.abuse("J2")
@pytest.mark.parametrize(
    "target", [pytest.param("..", id="above"), pytest.param(".", id="itself"), pytest.param("../bee", id="beside")]
)
def test_loops_of_links_end(tmp_path: Path, target: str) -> None:
    root = folder(tmp_path / "d", images(*ANT_BEE))
    (root / "ant/more").symlink_to(target)
    (root / "bee/more").symlink_to("../ant")
    with open_source(root, Reading(follow_links=True)) as source:
        assert source.classes == ANT_BEE
        assert len(source.items) < 20


@pytest.mark.abuse("J2")
def test_devices_and_links_to_nothing_are_not_read(tmp_path: Path) -> None:
    root = folder(tmp_path / "d", images(*ANT_BEE))
    (root / "ant/device.jpg").symlink_to("/dev/zero")
    (root / "ant/gone.jpg").symlink_to(tmp_path / "nowhere")
    with open_source(root, Reading(follow_links=True)) as source:
        for name, message in (("device", "no regular file"), ("gone", "a link to a file that does not exist")):
            with pytest.raises(OSError, match=message):
                source.read(f"ant/{name}.jpg")
