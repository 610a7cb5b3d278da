"""The labelled images of a dataset, before any is read: the form that every layout and format is converted to."""

import re
import unicodedata
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from lzma import LZMAError
from operator import attrgetter
from typing import Literal

from models.data.parts import PARTS, Part, part_of
from models.errors import DatasetError, TooFewClasses
from models.files.class_names import complaint, escaped
from models.files.text_encodings import AUTO
from models.files.zip_file import check_count, printable

NearDuplicates = Literal["group", "report", "off"]


__all__ = ["PARTS", "Part", "part_of"]

Layout = Literal["auto", "classes", "splits", "csv"]
Read = Callable[[str], bytes]

MAX_NAMED = 20  # files, folders or classes in an error
MAX_EXAMPLES = 5  # of what is ignored for one reason
# RuntimeError: encrypted, an unknown zip method, or a loop of links
UNREADABLE = (OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error, LZMAError)


@dataclass(frozen=True)
class DatasetItem:
    """One image, or a file that claims to be one.

    `path` is relative to the dataset, with `/` between its parts and without the folders that wrap all others. An image inside a file
    of many images is named `file[row]`, with rows from 0.
    """

    path: str
    file: str  # the name that `Read` takes
    part: Part
    class_name: str


@dataclass(frozen=True)
class IgnoredFiles:
    """Files and folders that do not belong to the dataset, with the reason."""

    reason: str
    count: int
    examples: tuple[str, ...]  # the first ones, sorted by name


@dataclass(frozen=True, eq=False)
class DatasetSource:
    """All images of a dataset, before any is opened."""

    layout: str  # the recognised layout, in words
    items: tuple[DatasetItem, ...]  # in an order that does not depend on the file system
    classes: tuple[str, ...]  # of the training part, sorted
    labelled: bool  # whether labels come from a table or a file of labels, not from the paths
    read: Read
    strays: tuple[str, ...] = ()  # files outside the class folders, which are not read
    notes: tuple[str, ...] = ()  # sentences for the audit, to read before training
    ignored: tuple[IgnoredFiles, ...] = ()  # besides the strays: files left by operating systems, and text files
    advice: str = ""  # on links that are not followed


@dataclass(frozen=True)
class Reading:
    """Options for reading a dataset."""

    layout: Layout = "auto"
    encoding: str = AUTO  # of tables and of names in archives that are not UTF-8
    follow_links: bool = False  # that lead out of the folder: on the command line, never in the server


AS_IT_IS = Reading()


@contextmanager
def advised(advice: Callable[[], str]) -> Iterator[None]:
    """Appends the advice to each DatasetError of the block, unless it is empty."""
    try:
        yield
    except DatasetError as error:
        if not (said := advice()):
            raise
        raise type(error)(f"{error}; {said}", error.param) from error


def tallied(found: Iterable[tuple[str, str]]) -> tuple[IgnoredFiles, ...]:
    """Groups pairs of a reason and a name by the reason."""
    by_reason: dict[str, list[str]] = {}
    for why, name in found:
        by_reason.setdefault(why, []).append(name)
    return tuple(
        IgnoredFiles(why, len(names), tuple(map(printable, sorted(names)[:MAX_EXAMPLES])))
        for why, names in sorted(by_reason.items())
    )


def by_path(items: Iterable[DatasetItem]) -> list[DatasetItem]:
    return sorted(items, key=attrgetter("path", "file", "part", "class_name"))


def make_source(
    layout: str,
    items: Sequence[DatasetItem],
    read: Read,
    *,
    labelled: bool,
    strays: Sequence[str] = (),
    notes: Sequence[str] = (),
    ignored: tuple[IgnoredFiles, ...] = (),
    hint: str = "",
    elsewhere: Callable[[], str] = str,
) -> DatasetSource:
    """Builds a DatasetSource from its items.

    An item whose path ends in `/` is an empty folder: it counts as a class, which the audit then finds too small. For the error on
    missing classes, `hint` says how `layout` settles it, and `elsewhere` where the labels may be.

    Raises TooFewClasses. Raises DatasetError if there are too many images, or if validation or test has a class without training images.
    """
    check_count(len(items))
    joined = _joined({item.class_name for item in items})
    items = [_normal(item) for item in items]
    classes = tuple(sorted({item.class_name for item in items if item.part == "train"}))
    if wrong := complaint(classes):
        raise DatasetError(wrong)
    files = tuple(item for item in items if not item.path.endswith("/"))
    lacking = _lacking(files, classes)
    if len(classes) < 2:
        said = f"{f'; {lacking}' if lacking else ''}{elsewhere()}{hint}"
        raise TooFewClasses(_too_few(classes, strays, labelled) + said, "layout" if hint else None)
    if lacking:
        raise DatasetError(f"{lacking}{elsewhere()}{hint}", "layout" if hint else None)
    return DatasetSource(layout, files, classes, labelled, read, tuple(strays), (*notes, *joined), ignored)


def counted(count: int, one: str, many: str) -> str:
    """Returns for example `1 file is` or `2 files are`."""
    return f"{count} {one if count == 1 else many}"


def listed(names: Iterable[str], most: int = 5) -> str:
    """Returns the first `most` names, and the number of the others."""
    shown = [escaped(name)[:100] for name in names]
    return ", ".join(shown[:most]) + (f" and {len(shown) - most} more" if len(shown) > most else "")


def refuse_alike(names: Iterable[str]) -> None:
    """Raises DatasetError if classes differ only in case, width or separators (`Ant`, `ant`): they are probably one class."""
    alike: dict[str, set[str]] = {}
    for name in map(_nfc, names):
        key = re.sub(r"[\s_-]+", " ", unicodedata.normalize("NFKC", name).casefold()).strip()
        alike.setdefault(key, set()).add(name)
    doubtful = [sorted(group) for group in alike.values() if len(group) > 1]
    if doubtful:
        pairs = "; ".join(", ".join(map(repr, map(escaped, group))) for group in sorted(doubtful)[:MAX_NAMED])
        raise DatasetError(
            f"classes differ in case, width or separators alone: {pairs}; rename those that are one class, or set layout to `classes`, "
            "`splits` or `csv` (--layout on the command line), which keeps them apart",
            "layout",
        )


def refuse_lists(names: Collection[str]) -> None:
    """Raises DatasetError if labels are lists of other labels (`cat`, `dog`, `cat,dog`), as in multi-label datasets."""
    known = set(names)
    lists = [name for name in sorted(known) if any(_is_list(name, mark, known) for mark in "|,; ")]
    if lists:
        raise DatasetError(
            f"labels are lists of other labels ({', '.join(repr(escaped(name)[:100]) for name in lists[:5])}): Imago gives an image one "
            "label; leave one, or set layout to `csv` (--layout csv), which takes each list as a class of its own",
            "layout",
        )


def _is_list(name: str, mark: str, known: set[str]) -> bool:
    pieces = {piece.strip() for piece in name.split(mark)}
    alone = pieces & known  # ImageNet has `missile` and `projectile, missile`; `|` stands in no name
    return len(pieces) > 1 and (bool(alone) if mark == "|" else alone == pieces)


def _joined(names: Iterable[str]) -> list[str]:
    """Returns a note if a class is spelled in several forms of Unicode."""
    forms: dict[str, int] = {}
    for name in names:
        forms[_nfc(name)] = forms.get(_nfc(name), 0) + 1
    several = sorted(name for name, count in forms.items() if count > 1)
    return (
        [f"written in two forms of Unicode (NFC and NFD), and taken as one class: {listed(several)}"] if several else []
    )


def _nfc(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _normal(item: DatasetItem) -> DatasetItem:
    """Returns the item with its class name in NFC: macOS writes `é` as two characters, other systems as one."""
    if unicodedata.is_normalized("NFC", item.class_name):
        return item
    return replace(item, class_name=_nfc(item.class_name))


def _lacking(items: Iterable[DatasetItem], classes: Sequence[str]) -> str:
    """Names the classes of validation and test that have no training images; empty if there are none."""
    known = set(classes)
    lacking = {part: sorted({i.class_name for i in items if i.part == part} - known) for part in PARTS}
    found = [f"{part} has classes that train lacks ({listed(names, 10)})" for part, names in lacking.items() if names]
    if not found:
        return ""
    has = f"train has {listed(classes, 10)}" if classes else "train has none"
    return f"{'; '.join(found)}, and {has}: a class needs training images, so move some of its images to train, or remove it"


def _too_few(classes: tuple[str, ...], strays: Sequence[str], labelled: bool) -> str:
    found = counted(len(classes), "class", "classes") + "".join(f" ({escaped(name)[:100]})" for name in classes)
    needed = "two labels" if labelled else "two folders, one per class, with images in them"
    outside = counted(len(strays), "file lies", "files lie")
    more = f" and {len(strays) - MAX_NAMED} more" if len(strays) > MAX_NAMED else ""
    beside = f"; {outside} outside class folders: {', '.join(strays[:MAX_NAMED])}{more}" if strays else ""
    return f"the dataset has {found}; it needs at least {needed}{beside}"
