"""Where the images of a dataset lie, and how each is read: a folder, a zip, or a CSV of paths and labels.

    <class>/*   or   train/<class>/* [+ val/<class>/*] [+ test/<class>/*]   in a folder or a zip
    path,label[,part]                                                       in a CSV; paths are relative to its folder

Nothing outside the dataset is ever read: a zip is read member by member in place and never extracted, and a link that leads out
of the folder is a bad file. Scans and reads are bounded.
"""

import csv
import lzma
import os
import posixpath
import re
import stat
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Literal

from models.archive import check_count, members_of, open_archive, printable
from models.errors import DatasetError, TooFewClasses
from models.images import Limits
from models.paths import open_beneath

Part = Literal["train", "val", "test"]
Read = Callable[[str], bytes]

PARTS: tuple[Part, ...] = ("train", "val", "test")
PART_NAMES: dict[str, Part] = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}

# Training files are the owner's own, so they may be larger than what strangers send: a camera's PNG of 24 megapixels has 40 MB.
LIMITS = Limits(max_bytes=64 * 2**20)
MAX_DEPTH = 32  # folders in folders
MAX_NAMED = 20  # files, folders or classes in an error
# RuntimeError: encrypted, an unknown zip method, or a loop of links
UNREADABLE = (OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error, lzma.LZMAError)


@dataclass(frozen=True)
class Item:
    """One file that claims to be an image; `path` is relative to the dataset, `/` between its parts, wrapping folders left out."""

    path: str
    file: str  # its name for `Read`
    part: Part
    class_name: str


@dataclass(frozen=True, eq=False)
class Source:
    """All files of a dataset, none opened yet. `strays` lie outside the class folders and are left alone."""

    items: tuple[Item, ...]  # sorted by path
    classes: tuple[str, ...]  # sorted: those of the training part
    strays: tuple[str, ...]
    labelled: bool  # whether the labels are told beside the paths (CSV), and not by them
    read: Read


@contextmanager
def open_source(path: Path) -> Iterator[Source]:
    """List a dataset. `read` may be used by several threads at once, until the end of the block.

    Raises TooFewClasses; DatasetError: neither folder, zip nor CSV, too many files, or a name that points outside.
    """
    if path.is_dir():
        yield _by_folders({name: name for name in _scan(path)}, _reader(path))
    elif path.is_file() and path.suffix.lower() == ".csv":
        yield _by_table(path)
    elif path.is_file() and zipfile.is_zipfile(path):
        with open_archive(path) as archive:
            yield _by_folders(_member_names(archive), lambda name: _read_member(archive, name))
    else:
        raise DatasetError(
            f"{path.name} is neither a folder nor a zip file nor a CSV; a dataset is a folder of class folders, a zip of one, "
            "or a CSV of path,label"
        )


# Folders


def _scan(root: Path) -> list[str]:
    """Every file below `root` by its relative name, and every empty folder by its name with a `/` at the end."""
    names: list[str] = []
    folders = [""]
    while folders:
        folder = folders.pop()
        if folder.count("/") > MAX_DEPTH:
            raise DatasetError(f"{printable(folder)} lies more than {MAX_DEPTH} folders deep; this is no dataset")
        try:
            entries = [entry for entry in os.scandir(root / folder) if not _hidden(entry.name)]
        except OSError as error:
            raise DatasetError(
                f"the folder {printable(folder) or root.name} cannot be read: {error.strerror}"
            ) from error
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                folders.append(f"{folder}{entry.name}/")
            else:
                names.append(folder + entry.name)
        if folder and not entries:
            names.append(folder)
        check_count(len(names))
    return names


def _hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _reader(root: Path) -> Read:
    """Reads files below `root` alone, whatever is put in the place of a folder meanwhile. Each is at most one byte longer than decode
    allows, so that a huge one costs no memory."""
    inside = os.path.realpath(root)

    def read(name: str) -> bytes:
        real = os.path.realpath(os.path.join(inside, name), strict=True)
        if not real.startswith(inside.rstrip("/") + "/"):
            raise OSError("a link that leads out of the dataset")
        handle = open_beneath("/", real.strip("/").split("/"), os.O_RDONLY | os.O_NONBLOCK)  # a FIFO would block
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise OSError("a link to a folder, a pipe or a device, and no regular file")
        with open(handle, "rb") as file:
            return file.read(LIMITS.max_bytes + 1)

    return read


def _by_folders(names: dict[str, str], read: Read) -> Source:
    """From each name, `/` between its parts, to the name that `read` knows. Hidden files, `__MACOSX` and wrapping folders are left out."""
    found = {tuple(name.split("/")): file for name, file in names.items()}
    found = {parts: file for parts, file in found.items() if not any(map(_hidden, parts))}
    found, beside = _unwrap(found)
    split = any(_part(parts[0]) == "train" and len(parts) > 2 for parts in found)
    items, strays = [], [printable("/".join(parts)) for parts in beside]
    for parts, file in found.items():
        item = _item(parts, file, split)
        if item:
            items.append(item)
        elif parts[-1]:
            strays.append(printable("/".join(parts)))
    return _source(items, sorted(strays), read)


def _unwrap(found: dict[tuple[str, ...], str]) -> tuple[dict[tuple[str, ...], str], list[tuple[str, ...]]]:
    """Without the folders that wrap all others, and the files that lie in or beside those; such a file makes no class."""
    top: tuple[str, ...] = ()
    beside: list[tuple[str, ...]] = []
    while len(folders := {parts[0] for parts in found if len(parts) > 1}) == 1 and max(map(len, found)) > 2:
        beside += [top + parts for parts in found if len(parts) == 1]
        top += tuple(folders)
        found = {parts[1:]: file for parts, file in found.items() if len(parts) > 1}
    return found, beside


def _item(parts: tuple[str, ...], file: str, split: bool) -> Item | None:
    path = printable("/".join(parts))
    if not split:
        return Item(path, file, "train", printable(parts[0])) if len(parts) > 1 else None
    part = _part(parts[0])
    return Item(path, file, part, printable(parts[1])) if part and len(parts) > 2 else None


def _part(name: str) -> Part | None:
    return PART_NAMES.get(name.lower())


def _source(items: list[Item], strays: list[str], read: Read, labelled: bool = False) -> Source:
    """An item whose path ends in `/` is an empty folder: it makes a class, which the audit finds to be too small."""
    classes = tuple(sorted({item.class_name for item in items if item.part == "train"}))
    files = sorted((item for item in items if not item.path.endswith("/")), key=astuple)
    if len(classes) < 2:
        raise _too_few(classes, strays, labelled)
    strange = sorted({f"{item.part}/{item.class_name}" for item in files if item.class_name not in classes})
    if strange:
        raise DatasetError(
            f"{', '.join(strange[:MAX_NAMED])}: no such class in train/, which has {', '.join(classes[:10])}"
            + (" ..." if len(classes) > 10 else "")
        )
    return Source(tuple(files), classes, tuple(strays), labelled, read)


def _too_few(classes: tuple[str, ...], strays: list[str], labelled: bool) -> TooFewClasses:
    found = f"the dataset has {len(classes)} classes" + "".join(f" ({name})" for name in classes)
    needed = "two labels" if labelled else "two folders, one per class, with images in them"
    beside = f"; {len(strays)} files lie outside class folders: {', '.join(strays[:MAX_NAMED])}" if strays else ""
    return TooFewClasses(f"{found}; it needs at least {needed}{beside}")


# Zip files


def _member_names(archive: zipfile.ZipFile) -> dict[str, str]:
    """As `_scan`, and what the archive calls each; a folder is empty where no other member lies in it."""
    names = {_without_dots(member.filename): member.filename for member in members_of(archive)}
    filled = _parents(names) | {""}  # "" is the archive itself, packed as "./"
    return {name: file for name, file in names.items() if name not in filled}


def _without_dots(name: str) -> str:
    """`./ant/1.jpg`, as `tar` and `zip` write it when told to pack `.`, -> `ant/1.jpg`."""
    return "/".join(part for part in name.replace("\\", "/").split("/") if part != ".")


def _parents(names: Iterable[str]) -> set[str]:
    """Every folder that something lies in, `/` at its end."""
    parents: set[str] = set()
    folders = {name.rstrip("/").rpartition("/")[0] for name in names}
    while folders:
        parents |= {f"{folder}/" for folder in folders}
        folders = {folder.rpartition("/")[0] for folder in folders} - {""}
    return parents


def _read_member(archive: zipfile.ZipFile, name: str) -> bytes:
    with archive.open(name) as member:
        return member.read(LIMITS.max_bytes + 1)


# CSV


def _by_table(path: Path) -> Source:
    items: set[Item] = set()
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            table = csv.DictReader(file, strict=True)
            if not {"path", "label"} <= set(table.fieldnames or ()):
                raise DatasetError(
                    f"{path.name} needs a first line with the columns path and label (and part, where the split is given); "
                    f"it has {', '.join(table.fieldnames or ()) or 'none'}"
                )
            for row in table:
                items.add(_table_item(row, f"{path.name}, line {table.line_num}"))
                check_count(len(items))
    except (UnicodeDecodeError, csv.Error) as error:
        raise DatasetError(f"{path.name} cannot be read as a CSV in UTF-8: {error}") from error
    return _source(list(items), [], _reader(path.parent), labelled=True)


def _table_item(row: dict[str, str | None], place: str) -> Item:
    name, label = (row["path"] or "").strip().replace("\\", "/"), (row["label"] or "").strip()
    if not name or not label or "\0" in name:
        raise DatasetError(f"{place}: needs a path and a label")
    if name.startswith("/") or ".." in name.split("/") or re.match(r"[A-Za-z][A-Za-z+.-]*:", name):
        raise DatasetError(
            f"{place}: {name[:200]!r} is refused; a path is relative to the CSV's folder and stays in it"
        )
    part = _part((row.get("part") or "train").strip())
    if part is None:
        raise DatasetError(f"{place}: part is {', '.join(PARTS)} or empty, not {str(row['part'])[:50]!r}")
    return Item(posixpath.normpath(name), name, part, label)
