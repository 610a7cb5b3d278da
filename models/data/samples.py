"""The labelled images of a dataset, none read yet: the one form that every layout and format is turned into."""

import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from lzma import LZMAError
from operator import attrgetter
from typing import Literal

from models.archive import check_count
from models.class_names import complaint, escaped
from models.errors import DatasetError, TooFewClasses

Part = Literal["train", "val", "test"]
Read = Callable[[str], bytes]

PARTS: tuple[Part, ...] = ("train", "val", "test")
PART_NAMES: dict[str, Part] = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}

MAX_NAMED = 20  # files, folders or classes in an error
# RuntimeError: encrypted, an unknown zip method, or a loop of links
UNREADABLE = (OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error, LZMAError)


@dataclass(frozen=True)
class Item:
    """One image, or a file that claims to be one; `path` is relative to the dataset, `/` between its parts, wrapping folders left out.

    An image inside a file of many is named `file[row]`, rows from 0.
    """

    path: str
    file: str  # its name for `Read`
    part: Part
    class_name: str


@dataclass(frozen=True, eq=False)
class Source:
    """All images of a dataset, none opened yet."""

    layout: str  # what was recognised, for people
    items: tuple[Item, ...]  # in an order that does not depend on the file system
    classes: tuple[str, ...]  # sorted: those of the training part
    labelled: bool  # whether the labels are told beside the paths (a table, a file of labels), and not by them
    read: Read
    strays: tuple[str, ...] = ()  # files outside the class folders, which are left alone
    notes: tuple[str, ...] = ()  # what a person should know before training: sentences for the audit


def part_of(name: str) -> Part | None:
    return PART_NAMES.get(name.lower())


def by_path(items: Iterable[Item]) -> list[Item]:
    return sorted(items, key=attrgetter("path", "file", "part", "class_name"))


def make_source(
    layout: str,
    items: Sequence[Item],
    read: Read,
    *,
    labelled: bool,
    strays: Sequence[str] = (),
    notes: Sequence[str] = (),
) -> Source:
    """An item whose path ends in `/` is an empty folder: it makes a class, which the audit finds to be too small.

    Raises TooFewClasses; DatasetError: too many images, or a class that the training part lacks.
    """
    check_count(len(items))
    items = [_normal(item) for item in items]
    classes = tuple(sorted({item.class_name for item in items if item.part == "train"}))
    if wrong := complaint(classes):
        raise DatasetError(wrong)
    files = tuple(item for item in items if not item.path.endswith("/"))
    if len(classes) < 2:
        raise _too_few(classes, strays, labelled)
    known = set(classes)
    strange = sorted({f"{item.part}/{item.class_name}" for item in files if item.class_name not in known})
    if strange:
        raise DatasetError(
            f"{_listed(strange[:MAX_NAMED])}: no such class in train/, which has {_listed(classes[:10])}"
            + (" ..." if len(classes) > 10 else "")
        )
    return Source(layout, files, classes, labelled, read, tuple(strays), tuple(notes))


def _listed(names: Iterable[str]) -> str:
    return ", ".join(escaped(name)[:100] for name in names)


def _normal(item: Item) -> Item:
    """With the class name in NFC: macOS writes `é` as two characters, others as one, and nobody sees a difference."""
    if unicodedata.is_normalized("NFC", item.class_name):
        return item
    return replace(item, class_name=unicodedata.normalize("NFC", item.class_name))


def _too_few(classes: tuple[str, ...], strays: Sequence[str], labelled: bool) -> TooFewClasses:
    found = f"the dataset has {len(classes)} classes" + "".join(f" ({escaped(name)[:100]})" for name in classes)
    needed = "two labels" if labelled else "two folders, one per class, with images in them"
    beside = f"; {len(strays)} files lie outside class folders: {', '.join(strays[:MAX_NAMED])}" if strays else ""
    return TooFewClasses(f"{found}; it needs at least {needed}{beside}")
