"""MNIST's own format: MNIST, Fashion-MNIST, KMNIST and EMNIST as they are published, gzipped or not.

    train-images-idx3-ubyte[.gz]  train-labels-idx1-ubyte[.gz]  [t10k-images-...  t10k-labels-...]  [classes.txt]

An IDX file is a magic number, its sizes (big-endian, 4 bytes each), and uint8 values: http://yann.lecun.com/exdb/mnist/.
"""

import posixpath
import re
from typing import NamedTuple

from models.data.files import Files
from models.data.formats.raw_pixels import (
    PixelArray,
    check_image,
    class_names,
    names_beside,
    read_exactly,
    reader,
    unpacked,
)
from models.data.samples import DatasetItem, DatasetSource, Part, make_source, part_of
from models.errors import DatasetError
from models.files.zip_file import printable

NAME = re.compile(
    r"(?P<set>(?:.*?[-_.])??)(?P<part>(?:train|t10k|test|valid|validation|val)[-_.])?(?P<kind>images|labels)"
    r"[-_.]idx[13]-ubyte(?:\.gz)?",
    re.IGNORECASE,
)
PARTS: dict[str, Part] = {"": "train", "t10k": "test"}
NAMES = ("classes.txt", "labels.txt")
DIMENSIONS = {"images": 3, "labels": 1}
UBYTE = 0x08


class IdxFiles(NamedTuple):
    """The image file and the label file of a part, by their relative names."""

    part: Part
    images: str
    labels: str


def read_idx(files: Files) -> DatasetSource | None:
    """Reads an IDX dataset; returns None if no file has such a name. Raises DatasetError if a file is missing or malformed."""
    folder, pairs = _pairs(files)
    if not pairs:
        return None
    beside = names_beside(files, folder, NAMES) or _emnist_mapping(files, pairs[0])
    items: list[DatasetItem] = []
    arrays: dict[str, PixelArray] = {}
    for pair in pairs:
        labels = _load(files, pair.labels, "labels")
        images = _load(files, pair.images, "images")
        if len(images) != len(labels):
            raise DatasetError(
                f"{printable(pair.images)} has {len(images):,} images and {printable(pair.labels)} {len(labels):,} labels: they are not of "
                "one data set, or one is damaged; download both again"
            )
        name = posixpath.basename(_without_gz(pair.images))
        arrays[name] = images
        classes = class_names(labels, beside and beside[1], pair.labels, beside[0] if beside else "")
        items += [
            DatasetItem(f"{name}[{row}]", f"{name}[{row}]", pair.part, label) for row, label in enumerate(classes)
        ]
    layout = "IDX files: " + ", ".join(f"{name} ({len(array):,} images)" for name, array in arrays.items())
    return make_source(layout, items, reader(arrays), labelled=True, notes=_notes(pairs))


def _pairs(files: Files) -> tuple[str, list[IdxFiles]]:
    """Returns the folder and its pairs of files, train first. Raises DatasetError for an incomplete pair, or several datasets."""
    found: dict[tuple[str, str], dict[tuple[Part, str], str]] = {}
    for name in sorted(
        files.names, key=lambda name: (not name.endswith(".gz"), name)
    ):  # what is unpacked takes its place
        match = NAME.fullmatch(posixpath.basename(name))
        if match:
            name_of_part = (match["part"] or "").rstrip("-_.").lower()
            part = PARTS.get(name_of_part) or part_of(name_of_part) or "train"
            found.setdefault((_folder(name), match["set"]), {})[part, match["kind"].lower()] = name
    if len(found) > 1:
        listed = ", ".join(printable(f"{folder}/{prefix}*".lstrip("/")) for folder, prefix in sorted(found)[:10])
        raise DatasetError(
            f"{files.label} holds {len(found)} IDX data sets ({listed}); name a folder that has one of them alone"
        )
    for (folder, _), by_kind in found.items():
        return folder, [_pair(by_kind, part) for part in ("train", "val", "test") if _any_of(by_kind, part)]
    return "", []


def _folder(name: str) -> str:
    """Returns the folder of a file; some copies of MNIST have each file in a folder with its own name."""
    folder, file = posixpath.split(name)
    return posixpath.dirname(folder) if posixpath.basename(folder) == file else folder


def _any_of(by_kind: dict[tuple[Part, str], str], part: Part) -> bool:
    return (part, "images") in by_kind or (part, "labels") in by_kind


def _pair(by_kind: dict[tuple[Part, str], str], part: Part) -> IdxFiles:
    images, labels = by_kind.get((part, "images")), by_kind.get((part, "labels"))
    if images is None or labels is None:
        lacks = ("images", "labels")[images is not None]
        raise DatasetError(
            f"{printable(images or labels or '')} has no {lacks} beside it: put the file of its {lacks} there"
        )
    return IdxFiles(part, images, labels)


def _without_gz(name: str) -> str:
    return name.removesuffix(".gz").removesuffix(".GZ")


def _load(files: Files, name: str, kind: str) -> PixelArray:
    """Reads uint8 (N, H, W) of images, or (N,) of labels."""
    dimensions = DIMENSIONS[kind]
    with unpacked(files, name) as content:
        magic = content.read(4)
        if magic != bytes([0, 0, UBYTE, dimensions]):
            raise DatasetError(
                f"{printable(name)} begins with {magic.hex(' ') or 'nothing'}; IDX {kind} of unsigned bytes begin with "
                f"00 00 08 0{dimensions}: download it again"
            )
        sizes = content.read(4 * dimensions)
        if len(sizes) < 4 * dimensions:
            raise DatasetError(f"{printable(name)} ends in its header: download it again")
        shape = tuple(int.from_bytes(sizes[at : at + 4], "big") for at in range(0, len(sizes), 4))
        if kind == "images":
            check_image(shape[1], shape[2], name)
        return read_exactly(content, shape, files, name)


def _emnist_mapping(files: Files, pair: IdxFiles) -> tuple[str, tuple[str, ...]] | None:
    """Reads EMNIST's `emnist-letters-mapping.txt`: each line has a label and the codes of its characters; the first is the name."""
    folder, name = posixpath.split(pair.images)
    match = NAME.fullmatch(name)
    path = posixpath.join(folder, f"{match['set'] if match else ''}mapping.txt")
    if path not in files.names:
        return None
    lines = [line.split() for line in files.text(path).splitlines() if line.strip()]
    try:
        names = {int(label): chr(int(code)) for label, code, *_ in lines}
    except (ValueError, OverflowError):
        raise DatasetError(f"{printable(path)} is no list of labels and character codes; download it again") from None
    if not names or not all(0 <= label < 256 and name.isprintable() for label, name in names.items()):
        raise DatasetError(f"{printable(path)} names no characters of labels 0 to 255; download it again")
    return path, tuple(names.get(label, str(label)) for label in range(max(names) + 1))


def _notes(pairs: list[IdxFiles]) -> list[str]:
    if not posixpath.basename(pairs[0].images).lower().startswith("emnist"):
        return []
    return [
        "EMNIST's files hold each character mirrored along its diagonal, and are used as they are: mirror the images that are "
        "to be classified alike"
    ]
