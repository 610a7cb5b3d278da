from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from support.packed_data import CIFAR10, CIFAR100, cifar_rows
from support.training_data import PREPROCESSING, archive, folder

from models.data.dataset import load
from models.data.samples import DatasetSource
from models.data.sources import open_source
from models.errors import DatasetError
from models.images.decoding import decode
from models.preprocessing import Preprocessing

PLAIN = Preprocessing(resize=32, crop=32)


def listed(path: Path) -> DatasetSource:
    with open_source(path) as source:
        return source


def test_cifar_10(tmp_path: Path) -> None:
    source = listed(folder(tmp_path, CIFAR10))
    assert source.classes == ("airplane", "automobile")
    assert Counter(item.part for item in source.items) == {"train": 6, "test": 2}
    assert [item.class_name for item in source.items[:2]] == ["airplane", "automobile"]
    assert source.items[4].path == "data_batch_2.bin[0]"
    assert source.layout.startswith("CIFAR-10, binary version: data_batch_1.bin (4 images)")


def test_cifar_100_has_the_fine_labels(tmp_path: Path) -> None:
    source = listed(folder(tmp_path, CIFAR100))
    assert source.classes == ("apple", "aquarium_fish", "baby")
    assert [item.part for item in source.items] == ["test"] * 3 + ["train"] * 6


@pytest.mark.parametrize("name", ["batches.meta.txt", "fine_label_names.txt"])
def test_without_names_a_class_is_its_number(tmp_path: Path, name: str) -> None:
    files = CIFAR10 if name in CIFAR10 else CIFAR100
    assert listed(folder(tmp_path, {key: files[key] for key in files if key != name})).classes[:2] == ("0", "1")


def test_pixels_are_planes_turned_to_colours(tmp_path: Path) -> None:
    with open_source(folder(tmp_path, CIFAR10)) as source:
        pixels = decode(source.read("data_batch_1.bin[2]"), PLAIN)
    row = np.frombuffer(CIFAR10["data_batch_1.bin"], np.uint8)[2 * 3073 + 1 : 3 * 3073]
    assert np.array_equal(pixels.numpy(), row.reshape(3, 32, 32))


def test_a_zip_in_a_folder_is_the_same_dataset(tmp_path: Path) -> None:
    inner = {f"cifar-10-batches-bin/{name}": content for name, content in CIFAR10.items()}
    one, other = (
        load(path, PREPROCESSING, val_fraction=0.5, seed=0)
        for path in (folder(tmp_path / "d", CIFAR10), archive(tmp_path / "a.zip", inner))
    )
    assert (one.sha256, one.paths, other.audit.parts["test"]) == (other.sha256, other.paths, 2)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        pytest.param({"data_batch_1.bin": b"x" * 3072}, r"data_batch_1\.bin has 3,072 bytes, no multiple", id="cut"),
        pytest.param({"data_batch_1.bin": b""}, "has 0 bytes", id="empty"),
        pytest.param({"data_batch_1.bin": cifar_rows([0, 1, 7])}, "label 7 of image 2 has no name", id="label"),
        pytest.param({"batches.meta.txt": b"a\na\n"}, "twice", id="names"),
        pytest.param({"other/train.bin": b""}, "CIFAR-100 in other", id="several"),
    ],
)
def test_what_is_malformed_is_refused(tmp_path: Path, changed: dict[str, bytes], message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        listed(folder(tmp_path, CIFAR10 | changed))


@pytest.mark.parametrize(
    ("names", "title"),
    [
        pytest.param(("data_batch_1", "data_batch_2", "test_batch", "batches.meta"), "CIFAR-10", id="10"),
        pytest.param(("train", "test", "meta", "file.txt~"), "CIFAR-100", id="100"),
        pytest.param(tuple(f"cifar-10-batches-py/{name}" for name in ("data_batch_1", "test_batch")), "10", id="deep"),
        pytest.param(tuple(f"cifar-100-python/{name}" for name in ("train", "test", "meta")), "100", id="deep 100"),
    ],
)
@pytest.mark.parametrize("pack", [pytest.param(folder, id="folder"), pytest.param(archive, id="zip")])
def test_pickles_are_refused_and_the_binary_version_named(
    tmp_path: Path, names: tuple[str, ...], title: str, pack: object
) -> None:
    path = pack(tmp_path / "d", dict.fromkeys(names, b"\x80\x02}q\x01."))  # type: ignore[operator]
    with pytest.raises(DatasetError, match=rf"Python pickle, which may run code.*{title}.*-binary\.tar\.gz"):
        listed(path)


def test_pickles_beside_the_binary_version_are_left_alone(tmp_path: Path) -> None:
    assert len(listed(folder(tmp_path, CIFAR10 | {"data_batch_1": b"\x80", "batches.meta": b"\x80"})).items) == 8
