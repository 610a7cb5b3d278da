"""Opens a dataset by its path: the one place that recognises layouts.

a folder, zip or tar --LAYOUTS, the first that recognises it--> Source
a table (.csv, .tsv, .jsonl), a .json --its columns-----------> Source, of images beside it
"""

import re
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from zipfile import is_zipfile

from models.data.class_folders import read_class_folders
from models.data.files import Files, FolderFiles, ZipFiles
from models.data.formats.cifar import read_cifar
from models.data.formats.idx import read_idx
from models.data.formats.parquet import read_parquet
from models.data.other_formats import SPREADSHEET, SPREADSHEETS, container
from models.data.samples import AS_IT_IS, DatasetSource, Reading, advised, counted, refuse_alike, refuse_lists
from models.data.tables import label_studio
from models.data.tables.table import TABLES, read_label_studio, read_one_hot, read_table, read_tables
from models.data.tar import is_tar, open_tar
from models.errors import DatasetError
from models.files.class_names import complaint
from models.files.text_encodings import AUTO, described
from models.files.zip_directory import CODE_PAGE
from models.files.zip_file import open_archive
from models.images import formats

ESCAPED = re.compile(r"\\udc[89a-f][0-9a-f]")  # a byte that is not UTF-8, as `printable` shows it
MAX_SHOWN = 5  # classes in a message

# Each reader returns None for another format, and raises DatasetError if its own format is malformed. The last one takes the rest.
OF_TABLES: tuple[Callable[[Files], DatasetSource | None], ...] = (read_one_hot, read_label_studio, read_tables)
LAYOUTS: tuple[Callable[[Files], DatasetSource | None], ...] = (
    read_idx,
    read_cifar,
    read_parquet,
    *OF_TABLES,
    read_class_folders,
)

A_DATASET = (
    "a dataset is a folder of class folders, a zip or tar of one, a CSV of path,label, or one of the formats "
    "that docs/guide/training.md lists"
)


@contextmanager
def open_source(path: Path, reading: Reading = AS_IT_IS) -> Iterator[DatasetSource]:
    """Lists a dataset. Several threads may use `read` at once, until the end of the block.

    Raises TooFewClasses. Raises DatasetError if the path is no dataset, has too many files or a name that points outside, if its layout
    is in doubt, or if a file of many images is malformed.
    """
    suffix = path.suffix.lower()
    if path.is_dir():
        with _recognised(FolderFiles(path, follow_links=reading.follow_links), reading) as source:
            yield source
    elif path.is_file() and suffix in (*TABLES, ".json", ".parquet"):
        if reading.layout in ("classes", "splits"):
            raise DatasetError(
                f"{path.name} is one file: layout {reading.layout} is for folders, zips and tars; leave layout out",
                "layout",
            )
        with _one_file(path, suffix, reading) as source:
            yield source
    elif path.is_file() and suffix in SPREADSHEETS:
        raise DatasetError(f"{path.name} is {SPREADSHEET}")
    elif path.is_file() and is_zipfile(path):
        with open_archive(path, reading.encoding) as archive, _recognised(ZipFiles(archive), reading) as source:
            yield source
    elif path.is_file() and is_tar(path):
        with open_tar(path) as files, _recognised(files, reading) as source:
            yield source
    else:
        raise DatasetError(f"{path.name} {container(_start(path))}; {A_DATASET}")


def _start(path: Path) -> bytes:
    if not path.is_file():
        return b"?"
    with path.open("rb") as file:
        return file.read(formats.HEAD)


@contextmanager
def _one_file(path: Path, suffix: str, reading: Reading) -> Iterator[DatasetSource]:
    only = path.name if suffix == ".parquet" else None
    files = FolderFiles(path.parent, only, follow_links=reading.follow_links)
    files.encoding = reading.encoding
    if suffix == ".parquet":
        with _recognised(files, reading) as source:
            yield source
        return
    if suffix == ".json":
        yield label_studio.read_json(files, path.name)
        return
    source = read_table(files, path.name)
    if reading.layout != "csv":
        refuse_alike(source.classes)
        refuse_lists(source.classes)
    yield replace(source, advice=files.advice)


@contextmanager
def _recognised(files: Files, reading: Reading) -> Iterator[DatasetSource]:
    files.encoding = reading.encoding
    with files.closing:
        with advised(lambda: files.advice):
            source = _read(files, reading)
        _check_classes(source, files)
        source = _decoded(source, files)
        ignored = (*files.ignored, *source.ignored)
        yield replace(source, notes=(*source.notes, *files.notes), ignored=ignored, advice=files.advice)


def _read(files: Files, reading: Reading) -> DatasetSource:
    """Raises TooFewClasses, DatasetError."""
    if reading.layout in ("classes", "splits"):
        return read_class_folders(files, reading.layout)
    if reading.layout == "csv":
        source = next((source for read in OF_TABLES if (source := read(files)) is not None), None)
        if source is None:
            raise DatasetError(
                f"layout csv needs a table of images and labels, and {files.label} has none with both; add one with the columns path and "
                "label, or leave layout out",
                "layout",
            )
        return source
    source = next(source for read in LAYOUTS if (source := read(files)) is not None)
    if source.labelled:
        refuse_alike(source.classes)
        refuse_lists(source.classes)
    return source


def _check_classes(source: DatasetSource, files: Files) -> None:
    """Raises DatasetError if class folders of a zip have names in an unknown code page: answers would have the wrong names."""
    classes = {name for name in source.classes if not name.isascii()}
    if source.labelled or not classes:
        return
    unread: dict[bytes, None] = {}
    for raw in files.unread.values():
        *folders, _ = raw.split(b"/" if b"/" in raw else b"\\")
        unread |= {folder: None for folder in folders if not classes.isdisjoint(_shown(folder))}
    if unread:
        raise _unknown(list(unread), files)


def _shown(raw: bytes) -> set[str]:
    """Returns the ways in which a folder name of an unknown code page may be shown."""
    texts = (raw.decode(CODE_PAGE), raw.decode("utf-8", "replace"))
    return {unicodedata.normalize("NFC", text) for text in texts}


def _decoded(source: DatasetSource, files: Files) -> DatasetSource:
    """Decodes class names of a folder or tar by `encoding` if any is not UTF-8 (such names are shown as `\\udcc3\\udca8`)."""
    odd = [name for name in source.classes if ESCAPED.search(name)]
    if source.labelled or not odd:
        return source
    if files.encoding == AUTO:
        raise _unknown([_raw(name) for name in odd], files)
    try:
        names = {name: _raw(name).decode(files.encoding) for name in source.classes}
    except UnicodeError:
        read = described([_raw(name) for name in odd[:MAX_SHOWN]])
        raise DatasetError(
            f"the names of classes in {files.label} cannot be read as {files.encoding}; they read {read}: correct the encoding",
            "encoding",
        ) from None
    if wrong := complaint(names.values()):
        raise DatasetError(f"{wrong}; or correct the encoding", "encoding")
    items = tuple(replace(item, class_name=names[item.class_name]) for item in source.items)
    return replace(source, items=items, classes=tuple(sorted({*names.values()})))


def _raw(name: str) -> bytes:
    return ESCAPED.sub(lambda found: chr(int(found[0][2:], 16)), name).encode("utf-8", "surrogateescape")


def _unknown(names: list[bytes], files: Files) -> DatasetError:
    return DatasetError(
        f"{counted(len(names), 'class name', 'class names')} of {files.label} cannot be read as UTF-8, and the code page is not known; in "
        f"likely ones: {described(names[:MAX_SHOWN])}; give it with --encoding (field `encoding`), or change the names to UTF-8",
        "encoding",
    )
