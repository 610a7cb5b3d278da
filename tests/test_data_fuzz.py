"""Files of many images, with anything in them: a dataset, or a DatasetError of one line; nothing else, and soon."""

import io
import json
import tarfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import IO

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from support.packed_data import CIFAR10, CIFAR100, gzipped, mnist
from support.training_data import coloured
from test_data_parquet import TRAIN, hub
from test_data_roboflow import table

from models.data.files import Files
from models.data.formats.cifar import read_cifar
from models.data.formats.idx import read_idx
from models.data.formats.parquet import read_parquet
from models.data.samples import UNREADABLE, DatasetSource
from models.data.sources import open_source
from models.data.tables.table import read_label_studio, read_one_hot
from models.errors import DatasetError

SOON = settings(max_examples=60, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
EXPORT = json.dumps([{"image": f"/data/upload/1/{i}.png", "choice": f"c{i % 2}"} for i in range(4)]).encode()


class Memory(Files):
    """Files by name, in memory."""

    label = "memory"

    def __init__(self, files: dict[str, bytes]) -> None:
        self._files, self.closing = files, ExitStack()

    @property
    def names(self) -> dict[str, str]:
        return {name: name for name in self._files}

    def open(self, file: str) -> IO[bytes]:
        return io.BytesIO(self._files[file])

    def size(self, file: str) -> tuple[int, int]:
        return len(self._files[file]), len(self._files[file])


def damaged(content: bytes) -> st.SearchStrategy[bytes]:
    """The content cut off, with a few bytes changed, or with other bytes behind; or nothing but other bytes."""
    places = st.integers(0, max(0, len(content) - 1))
    start = st.integers(0, min(63, max(0, len(content) - 1)))  # where headers are
    changes = st.lists(st.tuples(places | start, st.integers(0, 255)), max_size=6)

    def change(at: list[tuple[int, int]], end: int, behind: bytes) -> bytes:
        changed = bytearray(content)
        for place, value in at:
            changed[place] = value
        return bytes(changed[: len(changed) - end]) + behind

    cut = st.just(0) | st.integers(0, len(content))
    return st.builds(change, changes, cut, st.just(b"") | st.binary(max_size=8)) | st.binary(max_size=64)


def one_line(error: Exception) -> None:
    assert str(error)
    assert "\n" not in str(error)


def look(read: Callable[[Files], DatasetSource | None], files: dict[str, bytes]) -> None:
    memory = Memory(files)
    with memory.closing:
        try:
            source = read(memory)
        except DatasetError as error:
            one_line(error)
            return
        for item in (source.items if source else ())[:3]:
            try:
                source.read(item.file)  # type: ignore[union-attr]
            except (KeyError, *UNREADABLE):  # KeyError: Memory's own
                continue


@pytest.mark.system
@SOON
@given(damaged(mnist()[IMAGES]), damaged(mnist()[LABELS]), st.booleans())
@example(b"\0\0\x08\x03" + b"\xff" * 12, mnist()[LABELS], False)
@example(b"\0\0\x08\x03" + bytes(12), b"\0\0\x08\x01" + bytes(4), False)
def test_idx(images: bytes, labels: bytes, one: bool) -> None:
    look(read_idx, mnist() | {IMAGES: images} | ({} if one else {LABELS: labels}))


@pytest.mark.system
@SOON
@given(damaged(gzipped(mnist())[f"{IMAGES}.gz"]), damaged(b"zero\none\n\xc3\xa4\n"))
def test_gzipped_idx_and_names(images: bytes, names: bytes) -> None:
    files = gzipped(mnist(classes=3)) | {f"{IMAGES}.gz": images, "classes.txt": names}
    look(read_idx, files)


@pytest.mark.system
@SOON
@given(st.sampled_from([CIFAR10, CIFAR100]), st.data())
def test_cifar(files: dict[str, bytes], data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(files)))
    look(read_cifar, files | {name: data.draw(damaged(files[name]))})


@SOON
@given(damaged(EXPORT), damaged(table("a.jpg, 1, 0", "b.jpg, 0, 1")))
def test_tables(export: bytes, classes: bytes) -> None:
    look(read_label_studio, {"min.json": export, "1/0.png": b"", "1/1.png": b""})
    look(read_one_hot, {"train/_classes.csv": classes, "train/a.jpg": b""})


@pytest.mark.system
@SOON
@given(damaged(hub()[TRAIN]))
@example(hub()[TRAIN][:12] + b"\x0c" + hub()[TRAIN][13:])  # a dictionary without values, and rows that refer to them
def test_parquet(content: bytes) -> None:
    look(read_parquet, {TRAIN: content})


def tar() -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for name, image in coloured(1).items():
            member = tarfile.TarInfo("long/" * 30 + name)
            member.size = len(image)
            archive.addfile(member, io.BytesIO(image))
    return content.getvalue()


@SOON
@given(damaged(tar()))
def test_tar(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(content)
    try:
        with open_source(path) as source:
            for item in source.items:
                source.read(item.file)
    except (DatasetError, *UNREADABLE) as error:
        one_line(error)
