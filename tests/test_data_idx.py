import gzip
import struct
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from support.packed_data import SIDE, digits, gzipped, idx, mnist
from support.training_data import archive, folder

from models.data.dataset import LoadedDataset, load
from models.data.samples import DatasetSource
from models.data.sources import open_source
from models.errors import DatasetError
from models.images.decoding import decode
from models.preprocessing import Preprocessing

GRAY = Preprocessing(resize=SIDE, crop=SIDE, channels=1, mean=(0.5,), std=(0.5,))
IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


def listed(path: Path) -> DatasetSource:
    with open_source(path) as source:
        return source


def load_gray(path: Path) -> LoadedDataset:
    return load(path, GRAY, val_fraction=0.5, seed=0)


def refused(root: Path, files: dict[str, bytes]) -> str:
    with pytest.raises(DatasetError) as error:
        listed(folder(root, files))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_mnist_has_its_own_test_part_and_digits_for_classes(tmp_path: Path) -> None:
    source = listed(folder(tmp_path, mnist()))
    assert source.classes == tuple("0123456789")
    assert Counter(item.part for item in source.items) == {"train": 20, "test": 10}
    assert source.items[12].path == "train-images-idx3-ubyte[12]"
    assert source.items[12].class_name == "2"
    assert source.layout == "IDX files: train-images-idx3-ubyte (20 images), t10k-images-idx3-ubyte (10 images)"


def test_pixels_are_exact(tmp_path: Path) -> None:
    with open_source(folder(tmp_path, mnist())) as source:
        pixels = decode(source.read("train-images-idx3-ubyte[7]"), GRAY)
    assert np.array_equal(pixels[0].numpy(), digits(list(range(10)) * 2)[7])


@pytest.mark.parametrize(
    "files",
    [
        pytest.param(gzipped(mnist()), id="gzipped"),
        pytest.param(mnist() | gzipped(mnist()), id="both, as torchvision leaves them"),
        pytest.param({f"MNIST/raw/{name}": data for name, data in mnist().items()}, id="in folders"),
        pytest.param({f"{name}/{name}": data for name, data in mnist().items()}, id="each in a folder of its name"),
        pytest.param({"README.md": b"x", "photos/a.png": b"x"} | mnist(), id="among other files"),
    ],
)
def test_however_it_lies_it_is_the_same_dataset(tmp_path: Path, files: dict[str, bytes]) -> None:
    plain = load_gray(folder(tmp_path / "plain", mnist()))
    for path in (folder(tmp_path / "folder", files), archive(tmp_path / "a.zip", files)):
        other = load_gray(path)
        assert (other.sha256, other.paths, other.digests) == (plain.sha256, plain.paths, plain.digests)


def test_dots_for_dashes_and_one_part_alone(tmp_path: Path) -> None:
    source = listed(folder(tmp_path, mnist(train="", separator=".", test="test-")))
    assert next(item.path for item in source.items if item.part == "train") == "images.idx3-ubyte[0]"
    assert {item.part for item in source.items} == {"train", "test"}


@pytest.mark.parametrize("where", ["classes.txt", "labels.txt", "raw/classes.txt"])
def test_names_beside_the_files(tmp_path: Path, where: str) -> None:
    files = {f"raw/{name}": data for name, data in mnist(classes=3).items()}
    source = listed(folder(tmp_path, files | {where: "T-shirt/top\r\nTrouser\nKopftuch für Öl\n\n".encode()}))
    assert source.classes == ("Kopftuch für Öl", "T-shirt/top", "Trouser")
    assert source.items[1].class_name == "Trouser"


def test_emnist_is_named_by_its_mapping_and_its_orientation_is_told(tmp_path: Path) -> None:
    files = mnist(classes=3, train="emnist-letters-train-", test="emnist-letters-test-")
    data = load_gray(folder(tmp_path, files | {"emnist-letters-mapping.txt": b"0 65 97\n1 66 98\n2 67 99\n"}))
    assert data.classes == ("A", "B", "C")
    assert "mirrored along its diagonal" in data.audit.warnings[-1]


def test_the_audit_counts_parts_and_says_the_format(tmp_path: Path) -> None:
    audit = load_gray(folder(tmp_path, mnist(per_class=4))).audit
    assert (audit.files, audit.images, audit.totals["bad"]) == (50, 50, 0)
    assert audit.parts == {"train": 20, "val": 20, "test": 10}
    assert audit.layout.startswith("IDX files")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        pytest.param({IMAGES: mnist()[IMAGES][:-1]}, "should have 1,280 bytes.*ends after 1,279", id="truncated"),
        pytest.param({IMAGES: mnist()[IMAGES] + b"x"}, "it is longer", id="longer"),
        pytest.param({IMAGES: b"\0\0\x08"}, "begins with 00 00 08;", id="no magic"),
        pytest.param({IMAGES: b""}, "begins with nothing", id="empty"),
        pytest.param({IMAGES: b"\0\0\x08\x03\0\0"}, "ends in its header", id="header"),
        pytest.param({IMAGES: b"\0\0\x0d\x03" + mnist()[IMAGES][4:]}, "00 00 08 03", id="floats"),
        pytest.param({LABELS: mnist()[IMAGES]}, "00 00 08 01", id="images for labels"),
        pytest.param({LABELS: idx(np.zeros(19, np.uint8))}, "20 images and .* 19 labels", id="counts"),
        pytest.param({LABELS: idx(np.zeros(20, np.uint8))}, "1 class ", id="one class"),
        pytest.param({"classes.txt": b"zero\none\n"}, "label 2 of image 2 has no name", id="label out of range"),
        pytest.param({"classes.txt": b"zero\nzero\n"}, "'zero' twice", id="names twice"),
        pytest.param({"classes.txt": b"a", "labels.txt": b"b"}, "keep the one", id="two lists of names"),
        pytest.param({"classes.txt": b"\xff"}, "UTF-8", id="names that are no UTF-8"),
        pytest.param({"other-train-images-idx3-ubyte": b""}, "2 IDX data sets", id="several"),
        pytest.param({"raw/" + IMAGES: b""}, "name a folder", id="several folders"),
        pytest.param(
            {IMAGES: b"\0\0\x08\x03" + struct.pack(">3I", 10, 100_000, 100_000)}, "100000 x 100000", id="pixels"
        ),
        pytest.param({IMAGES: b"\0\0\x08\x03" + struct.pack(">3I", 10, 0, 8)}, "0 x 8", id="no pixels"),
        pytest.param(
            {IMAGES: b"\0\0\x08\x03" + struct.pack(">3I", 2**32 - 1, 28, 28)}, "more than 2,000,000", id="count"
        ),
        pytest.param({IMAGES: b"\0\0\x08\x03" + struct.pack(">3I", 10**6, 999, 999)}, "would grow", id="size"),
    ],
)
def test_what_is_malformed_is_refused_in_one_line(tmp_path: Path, changed: dict[str, bytes], message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        listed(folder(tmp_path, mnist() | changed))
    assert refused(tmp_path, {})


@pytest.mark.parametrize("gone", [IMAGES, LABELS])
def test_one_without_its_other(tmp_path: Path, gone: str) -> None:
    files = mnist()
    del files[gone]
    lacks = "images" if gone == IMAGES else "labels"
    assert f"has no {lacks} beside it" in refused(tmp_path, files)


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda data: data[:-9], id="cut off"),
        pytest.param(lambda data: data[:-20] + b"\0" + data[-19:], id="damaged"),
        pytest.param(lambda data: data + b"rubbish", id="rubbish behind"),
    ],
)
def test_a_damaged_gzip(tmp_path: Path, damage: object) -> None:
    files = gzipped(mnist())
    files[f"{IMAGES}.gz"] = damage(files[f"{IMAGES}.gz"])  # type: ignore[operator]
    assert f"{IMAGES}.gz is damaged or cut off: copy or download it again" in refused(tmp_path, files)


@pytest.mark.parametrize("pack", [pytest.param(folder, id="folder"), pytest.param(archive, id="zip")])
def test_a_gzip_bomb_is_refused_before_it_is_unpacked(tmp_path: Path, pack: object) -> None:
    header = b"\0\0\x08\x03" + struct.pack(">3I", 20, 1024, 1024)
    files = mnist() | {f"{IMAGES}.gz": gzip.compress(header + bytes(20 * 2**20))}
    del files[IMAGES]
    path = pack(tmp_path / "d", files)  # type: ignore[operator]
    with pytest.raises(DatasetError, match=r"would grow to 20,971,520"):
        listed(path)


def test_a_gzip_that_is_longer_than_its_header_says_is_not_read_to_its_end(tmp_path: Path) -> None:
    content = mnist()[IMAGES] + bytes(64 * 2**20)
    files = mnist() | {f"{IMAGES}.gz": gzip.compress(content, 1)}
    del files[IMAGES]
    assert "it is longer" in refused(tmp_path, files)
