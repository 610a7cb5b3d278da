"""CIFAR-10 and CIFAR-100 in their binary versions. Their Python versions are pickles, which may run code, and are refused.

    data_batch_1.bin ... test_batch.bin [batches.meta.txt]            a row: label, 3 x 32 x 32 pixels
    train.bin test.bin [fine_label_names.txt, coarse_label_names.txt] a row: coarse label, fine label, 3 x 32 x 32 pixels

https://www.cs.toronto.edu/~kriz/cifar.html. The classes of CIFAR-100 are its 100 fine labels.
"""

import posixpath
import re
from typing import NamedTuple

from models.data.files import Files, opened
from models.data.formats.raw_pixels import PixelArray, class_names, names_beside, read_exactly, reader
from models.data.samples import DatasetItem, DatasetSource, Part, make_source
from models.errors import DatasetError
from models.files.zip_file import printable

SIDE = 32
PIXELS = 3 * SIDE * SIDE
PICKLED = re.compile(r"(.*/)?(data_batch_\d+|batches\.meta)")
PICKLED_100 = ("train", "test", "meta")


class CifarVersion(NamedTuple):
    """How CIFAR-10 or CIFAR-100 is stored."""

    title: str
    files: re.Pattern[str]
    labels: int  # bytes before the pixels, the last of which is the class
    classes: int
    names: tuple[str, ...]  # files of class names


VERSIONS = (
    CifarVersion("CIFAR-10", re.compile(r"(data_batch_\d+|test_batch)\.bin"), 1, 10, ("batches.meta.txt",)),
    CifarVersion("CIFAR-100", re.compile(r"(train|test)\.bin"), 2, 100, ("fine_label_names.txt",)),
)


def read_cifar(files: Files) -> DatasetSource | None:
    """Reads a binary CIFAR dataset; returns None if no file has such a name. Raises DatasetError for pickles only, several datasets, or a
    malformed file."""
    found: dict[tuple[str, str], list[str]] = {}
    for name in sorted(files.names):
        for version in VERSIONS:
            if version.files.fullmatch(posixpath.basename(name)):
                found.setdefault((posixpath.dirname(name), version.title), []).append(name)
    if len(found) > 1:
        listed = ", ".join(f"{title} in {printable(folder) or files.label}" for folder, title in sorted(found)[:10])
        raise DatasetError(
            f"{files.label} holds {len(found)} data sets ({listed}); name a folder that has one of them alone"
        )
    if not found:
        _refuse_pickles(files)
        return None
    (folder, title), names = next(iter(found.items()))
    version = next(version for version in VERSIONS if version.title == title)
    return _source(files, folder, names, version)


def _source(files: Files, folder: str, names: list[str], version: CifarVersion) -> DatasetSource:
    beside = names_beside(files, folder, version.names)
    known = beside[1] if beside else tuple(map(str, range(version.classes)))
    items: list[DatasetItem] = []
    arrays: dict[str, PixelArray] = {}
    for path in names:
        name, rows = posixpath.basename(path), _load(files, path, version)
        labels, pixels = rows[:, version.labels - 1], rows[:, version.labels :]
        arrays[name] = pixels.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1)  # (N, H, W, 3), a view
        part: Part = "test" if name.startswith("test") else "train"
        classes = class_names(labels, known, path, beside[0] if beside else version.title)
        items += [DatasetItem(f"{name}[{row}]", f"{name}[{row}]", part, label) for row, label in enumerate(classes)]
    layout = f"{version.title}, binary version: " + ", ".join(
        f"{name} ({len(a):,} images)" for name, a in arrays.items()
    )
    return make_source(layout, items, reader(arrays), labelled=True)


def _load(files: Files, name: str, version: CifarVersion) -> PixelArray:
    """Reads uint8 (N, labels and pixels)."""
    row = version.labels + PIXELS
    with opened(files, name) as content:
        size = files.size(files.names[name])[0]
        if not size or size % row:
            raise DatasetError(
                f"{printable(name)} has {size:,} bytes, no multiple of the {row:,} of an image in {version.title}'s binary version: "
                "download it again"
            )
        return read_exactly(content, (size // row, row), files, name)


def _refuse_pickles(files: Files) -> None:
    pickled = next((name for name in sorted(files.names) if PICKLED.fullmatch(name)), None)
    title = "CIFAR-10"
    if pickled is None:
        title, by_folder = "CIFAR-100", set(map(posixpath.dirname, files.names))
        candidates = (posixpath.join(folder, "meta") for folder in sorted(by_folder))
        pickled = next((name for name in candidates if _is_pickled_100(files, posixpath.dirname(name))), None)
    if pickled is not None:
        archive = f"{title.lower()}-binary.tar.gz"
        raise DatasetError(
            f"{printable(pickled)} is a Python pickle, which may run code when it is read, and is refused: download the binary version of "
            f"{title}, {archive}, and give that"
        )


def _is_pickled_100(files: Files, folder: str) -> bool:
    return all(posixpath.join(folder, name) in files.names for name in PICKLED_100)
