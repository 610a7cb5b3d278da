"""Tables of labelled images, by their columns:

    path,label[,part]                a CSV of one's own
    image,choice                     Label Studio's CSV, see `label_studio`
    filename,<class>,<class>,...     Roboflow's `_classes.csv`, a 1 under the image's class, one table per part

Paths are relative to the table's folder. The images lie beside the table.
"""

import csv
import io
import posixpath
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import IO, NamedTuple

from models.archive import check_count, printable
from models.data import label_studio
from models.data.files import Files, opened
from models.data.samples import PARTS, Item, Part, Source, by_path, make_source, part_of
from models.errors import DatasetError

ONE_HOT = "_classes.csv"
MAX_PATH = 4096  # characters, as Linux has it
MAX_ROW = 2**20  # characters, in as many lines as it may take

Row = Mapping[str, str]


class Table(NamedTuple):
    columns: tuple[str, ...]
    rows: Iterator[tuple[str, Row]]  # each with its place, for messages; read from the file as they are asked for


def read_csv(files: Files, name: str, content: IO[bytes]) -> Source:
    """The dataset that the table `name` lists. Raises TooFewClasses, DatasetError."""
    with _table(name, content) as table:
        if {"path", "label"} <= set(table.columns):
            items = {_path_item(row, place) for place, row in _counted(table.rows)}
            return make_source(f"the table {printable(name)}", by_path(items), files.read, labelled=True)
        if set(label_studio.KEYS) <= set(table.columns):
            tasks = (label_studio.Task(place, row["image"], row["choice"]) for place, row in _counted(table.rows))
            return label_studio.source(files, name, tasks)
        if posixpath.basename(name) == ONE_HOT:
            return _one_hot_source(files, _one_hot_items(files, name, table))
    raise DatasetError(
        f"{printable(name)} needs a first line with the columns path and label (and part, where the split is given), or image and "
        f"choice as Label Studio exports them; it has {', '.join(table.columns) or 'none'}"
    )


def read_one_hot(files: Files) -> Source | None:
    """Roboflow's multi-label export, where each image has one label; None where there is no `_classes.csv`."""
    items: list[Item] = []
    for name in sorted(name for name in files.names if posixpath.basename(name) == ONE_HOT):
        with opened(files, name) as content, _table(name, content) as table:
            items += _one_hot_items(files, name, table)
            check_count(len(items))
    return _one_hot_source(files, items) if items else None


def read_label_studio(files: Files) -> Source | None:
    """Label Studio's export and its images in one folder or archive; None where there is none at the top, or one folder below."""
    exports = [name for name in files.names if name.count("/") < 2 and label_studio.is_export(files, name)]
    if len(exports) > 1:
        listed = ", ".join(map(printable, sorted(exports)))
        raise DatasetError(f"{files.label} holds {len(exports)} exports of Label Studio: {listed}; name one of them")
    if not exports:
        return None
    name = exports[0]
    if name.lower().endswith(".json"):
        return label_studio.read_json(files, name)
    with opened(files, name) as content:
        return read_csv(files, name, content)


@contextmanager
def _table(name: str, content: IO[bytes]) -> Iterator[Table]:
    """Raises DatasetError where it is no CSV of UTF-8, also while its rows are read."""
    text = io.TextIOWrapper(content, encoding="utf-8-sig", newline="")
    try:
        lines = _Lines(text, name)
        reader = csv.DictReader(lines, strict=True, restval="", skipinitialspace=True)
        columns = tuple(column.strip() for column in reader.fieldnames or ())
        reader.fieldnames = columns
        yield Table(columns, ((f"{printable(name)}, line {reader.line_num}", row) for row in lines.bounded(reader)))
    except (UnicodeDecodeError, csv.Error) as error:
        raise DatasetError(f"{printable(name)} cannot be read as a CSV in UTF-8: {error}") from error
    finally:
        text.detach()


class _Lines:
    """The lines of a text for csv, which would put a row of any number of fields and lines into memory."""

    def __init__(self, text: io.TextIOWrapper, name: str) -> None:
        self._text, self._name, self._left = text, name, MAX_ROW

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = self._text.readline(self._left + 1)
        self._left -= len(line)
        if self._left < 0:
            raise DatasetError(
                f"{printable(self._name)} has a row of more than {MAX_ROW:,} characters; this is no table of images"
            )
        if not line:
            raise StopIteration
        return line

    def bounded(self, rows: Iterable[Row]) -> Iterator[Row]:
        """The rows, each of which may have so many characters."""
        self._left = MAX_ROW
        for row in rows:
            self._left = MAX_ROW
            yield row


def _counted(rows: Iterator[tuple[str, Row]]) -> Iterator[tuple[str, Row]]:
    for count, row in enumerate(rows, 1):
        check_count(count)
        yield row


# path,label[,part]


def _path_item(row: Row, place: str) -> Item:
    name, label = row["path"].strip().replace("\\", "/"), row["label"].strip()
    if not name or not label or "\0" in name:
        raise DatasetError(f"{place}: needs a path and a label")
    if len(name) > MAX_PATH:
        raise DatasetError(f"{place}: the path has {len(name):,} characters, and at most {MAX_PATH:,} are read")
    if leads_outside(name):
        raise DatasetError(
            f"{place}: {name[:200]!r} is refused; a path is relative to the CSV's folder and stays in it"
        )
    part = part_of((row.get("part") or "train").strip())
    if part is None:
        raise DatasetError(f"{place}: part is {', '.join(PARTS)} or empty, not {row['part'][:50]!r}")
    path = posixpath.normpath(name)
    return Item(path, path, part, label)


def leads_outside(name: str) -> bool:
    return name.startswith("/") or ".." in name.split("/") or bool(re.match(r"[A-Za-z][A-Za-z+.-]*:", name))


# filename,<class>,<class>,...


def _one_hot_items(files: Files, name: str, table: Table) -> list[Item]:
    """The part is that of the table's folder, `train/_classes.csv`; without one it is train."""
    folder = posixpath.dirname(name)
    part: Part = part_of(posixpath.basename(folder)) or "train"
    if table.columns[:1] != ("filename",) or len(table.columns) < 3:
        raise DatasetError(
            f"{printable(name)} needs a first line of filename and two classes or more; it has {', '.join(table.columns) or 'none'}"
        )
    items = []
    for place, row in _counted(table.rows):
        file, label = row["filename"].strip(), _label(row, table.columns[1:], place)
        if not file or leads_outside(file) or "\0" in file:
            raise DatasetError(f"{place}: {file[:200]!r} is no name of a file in the table's folder")
        path = posixpath.normpath(posixpath.join(folder, file))
        items.append(Item(printable(path), files.names.get(path, path), part, label))
    return items


def _label(row: Row, classes: tuple[str, ...], place: str) -> str:
    marked = [name for name in classes if row[name].strip() == "1"]
    if len(marked) != 1:
        found = ", ".join(marked[:5]) or "none"
        raise DatasetError(
            f"{place}: the image needs one label and has {found}; mark one class with 1, or remove the line"
        )
    return marked[0]


def _one_hot_source(files: Files, items: list[Item]) -> Source:
    return make_source("Roboflow's _classes.csv", by_path(set(items)), files.read, labelled=True)
