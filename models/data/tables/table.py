"""Tables of labelled images, by their columns: the one place that reads them.

    path,label[,split]               one's own, Kaggle's, fastai's, or Hugging Face's metadata.csv, see `columns`
    image,choice                     Label Studio's CSV, see `label_studio`
    filename,<class>,<class>,...     Roboflow's `_classes.csv`, a 1 under the image's class, one table per part

table --text--> rows of cells --columns--> path, label, part --paths--> files beside it

A table is read once to understand its columns by their names and values. One of more than KEPT rows is read again for its rows.
"""

import posixpath
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from typing import NamedTuple

from models.data.files import Files, is_image
from models.data.samples import UNREADABLE, DatasetItem, DatasetSource, Part, by_path, counted, make_source, part_of
from models.data.tables import label_studio
from models.data.tables.columns import (
    MAX_VALUES,
    TRUE,
    Columns,
    Survey,
    has_boxes,
    has_names,
    may_be_labelled,
    part_of_value,
    understand,
)
from models.data.tables.paths import Finder, leads_outside, parts_of_folders
from models.data.tables.text import JSON_LINES, Row, Table, open_table
from models.errors import DatasetError, NoSuchColumn
from models.files.zip_file import check_count, printable

IN_FOLDERS = (".csv", ".tsv", *JSON_LINES)
TABLES = (*IN_FOLDERS, ".tab", ".psv", ".txt")
ONE_HOT = "_classes.csv"
MAX_TABLES = 100  # of a folder that are read
KEPT = 300_000  # rows of a table in memory, some 150 MB
SAMPLE = 50  # rows by which the column of images is found
WHOLE = re.compile(r"-?\d+\.0+")  # an integer, as pandas writes it where a cell of the column is empty


TableRows = list[tuple[str, Row]]  # each with its place, for messages


class Understood(NamedTuple):
    """A table with its columns."""

    name: str
    names: Row  # of the columns
    headless: bool
    columns: Columns
    dialect: str
    is_beside: bool  # whether any of its first images exists
    rows: "TableRows | None"  # all of them; None: more than KEPT


class Listed(NamedTuple):
    items: list[DatasetItem]
    notes: list[str]
    unlabelled: str  # the sentence of the notes on rows without a label; empty if there are none


def read_table(files: Files, name: str) -> DatasetSource:
    """Reads the dataset that the table `name` lists. Raises TooFewClasses, DatasetError."""
    with open_table(files, name) as table:
        if posixpath.basename(name) == ONE_HOT:
            return _one_hot_source(files, _one_hot_items(files, name, table))
        if is_label_studio(table.columns):
            return _label_studio_source(files, name, table)
    return _source(files, [_understood(files, name)], {})


def read_one_hot(files: Files) -> DatasetSource | None:
    """Reads Roboflow's multi-label export if each image has one label; returns None if there is no `_classes.csv`."""
    items: list[DatasetItem] = []
    for name in sorted(name for name in files.names if posixpath.basename(name) == ONE_HOT):
        with open_table(files, name) as table:
            items += _one_hot_items(files, name, table)
            check_count(len(items))
    return _one_hot_source(files, items) if items else None


def read_label_studio(files: Files) -> DatasetSource | None:
    """Reads Label Studio's export with its images in one folder or archive; None if there is none at the top or one folder below."""
    names = [name for name in files.names if name.count("/") < 2]
    exports = [name for name in names if label_studio.is_export(files, name)]
    exports += [name for name in names if name.lower().endswith(".csv") and is_label_studio(_peeked(files, name)[0])]
    if len(exports) > 1:
        listed = ", ".join(map(printable, sorted(exports)))
        raise DatasetError(f"{files.label} holds {len(exports)} exports of Label Studio: {listed}; name one of them")
    if not exports:
        return None
    name = exports[0]
    if name.lower().endswith(".json"):
        return label_studio.read_json(files, name)
    with open_table(files, name) as table:
        return _label_studio_source(files, name, table)


def read_tables(files: Files) -> DatasetSource | None:
    """Reads tables of labels with images in one folder or archive, at the top or up to two folders below: one table, or one per part
    (`train.csv`, `train/metadata.csv`). Returns None if no table has images and labels.

    Raises TooFewClasses; raises DatasetError for several tables with labels, or one that is not understood.
    """
    usable: list[Understood] = []
    others: list[str] = []
    names = [name for name in files.names if name.lower().endswith(IN_FOLDERS) and name.count("/") <= 2]
    for name in sorted(names, key=lambda name: (name.count("/"), name))[:MAX_TABLES]:
        found = _usable(files, name)
        if found is None:
            others.append(name)
        else:
            usable.append(found)
    if named := [
        table for table in usable if table.columns.is_label_named
    ]:  # Kaggle's test.csv may have a size beside the id
        others += [table.name for table in usable if table not in named]
        usable = named
    if not usable:
        return None
    parts = {table.name: _part_of_table(table.name) for table in usable}
    if len(usable) == 1:
        parts = {name: part if part == "train" else None for name, part in parts.items()}
    elif None in parts.values() or len(set(parts.values())) < len(parts):
        listed = ", ".join(printable(name) for name in sorted(parts)[:10])
        raise DatasetError(
            f"{files.label} holds {len(usable)} tables with labels: {listed}; name one of them as the dataset, remove the others, "
            "name them train.csv, val.csv and test.csv, or, where folders name the classes, set layout to `classes` (--layout classes)",
            "layout",
        )
    return _source(files, usable, parts, others)


def _usable(files: Files, name: str) -> Understood | None:
    """Returns a table among other files; None if its images are not there, or it has no labels. Kaggle's sample submission has labels,
    but they are not true."""
    if "submission" in posixpath.basename(name).lower() or not may_be_labelled(*_peeked(files, name)):
        return None
    try:
        found = _understood(files, name)
    except NoSuchColumn:
        return None
    except DatasetError as error:
        raise DatasetError(
            f"{error}; or, where folders name the classes, set layout to `classes` (--layout classes)",
            error.param or "layout",
        ) from error
    return found if found.is_beside else None


def _peeked(files: Files, name: str) -> tuple[Row, Row]:
    """Returns the first two rows of a table; empty if it cannot be read."""
    try:
        with open_table(files, name, errors="replace") as table:
            return table.columns, next(table.rows, ("", ()))[1]
    except (DatasetError, *UNREADABLE):
        return (), ()


def _part_of_table(name: str) -> Part | None:
    """Returns the part of a table by its name: train for `train_labels.csv`, test for `test/metadata.csv`."""
    folder, file = posixpath.split(name)
    words = [part_of_value(word) for word in re.split(r"[\s_.-]+", posixpath.splitext(file)[0])]
    parts = {part for part in words if part}
    return parts.pop() if len(parts) == 1 else part_of(posixpath.basename(folder))


# Columns


def _understood(files: Files, name: str) -> Understood:
    finder = Finder(files, posixpath.dirname(name), _part_of_table(name))
    with open_table(files, name) as table:
        headless = not has_names(table.columns) and (
            any(map(is_image, table.columns)) or any(cell and finder.locate(cell) for cell in table.columns)
        )
        names = tuple(f"column {at}" for at in range(1, len(table.columns) + 1)) if headless else table.columns
        kept: TableRows = []
        first = [(f"{printable(name)}, line 1", table.columns)] if headless else []
        survey = _survey(name, names, chain(first, table.rows), kept)
        columns = understand(survey, finder.locate, headless)
        beside = any(finder.locate(row[columns.path]) for row in survey.sample if row[columns.path])
        return Understood(name, names, headless, columns, table.dialect, beside, kept if survey.rows <= KEPT else None)


def _survey(name: str, names: Row, rows: Iterable[tuple[str, Row]], kept: TableRows) -> Survey:
    """Reads a table once, and adds its first rows to `kept`."""
    sample: list[Row] = []
    values: list[set[str] | None] = [set() for _ in names]
    count = 0
    for place, row in rows:
        count += 1
        if count <= KEPT:
            kept.append((place, row))
        if len(sample) < SAMPLE:
            sample.append(row)
        for at, known in enumerate(values):
            if known is not None:
                known.add(row[at])
                if len(known) > MAX_VALUES:
                    values[at] = None
    return Survey(name, names, tuple(sample), tuple(frozenset(v) if v is not None else None for v in values), count)


# Rows


def _source(
    files: Files, tables: Sequence[Understood], parts: Mapping[str, Part | None], others: Sequence[str] = ()
) -> DatasetSource:
    """Builds the dataset. `parts`: of rows that do not say, by the name of the table. `others`: tables that are not used."""
    items: set[DatasetItem] = set()
    notes: list[str] = []
    unlabelled = ""
    for table in tables:
        listed = _list(files, table, parts.get(table.name))
        items |= set(listed.items)
        notes += listed.notes
        unlabelled = unlabelled or listed.unlabelled
        check_count(len(items))
    if others:
        more = f" and {len(others) - 10} more" if len(others) > 10 else ""
        notes.append(
            f"ignored tables, without labels or without images: {', '.join(map(printable, others[:10]))}{more}"
        )
    if parts:
        used = {item.file for item in items}
        unlisted = sorted(name for name, file in files.names.items() if is_image(name) and file not in used)
        if unlisted:
            without = counted(len(unlisted), "image is in no row and is", "images are in no row and are")
            notes.append(f"{without} ignored, the first {printable(unlisted[0])}")
    said = [f"{printable(table.name)} ({_described(table)})" for table in tables]
    layout = f"the table{'s' if len(tables) > 1 else ''} {', '.join(said)}"
    hint = f"; {unlabelled}" if unlabelled else ""
    return make_source(
        layout, by_path(_without_points(items)), files.read, labelled=True, notes=notes, elsewhere=lambda: hint
    )


def _described(table: Understood) -> str:
    return ", ".join(
        filter(None, (table.columns.described(table.names), table.dialect, "no first row of names" * table.headless))
    )


def _list(files: Files, table: Understood, default: Part | None) -> Listed:
    """Returns the images of a table. Rows without a label are left out and counted."""
    columns, by_name = table.columns, _part_of_table(table.name)
    finder = Finder(files, posixpath.dirname(table.name), by_name)
    classes = {at: table.names[at] for at in columns.classes}
    items: list[DatasetItem] = []
    unlabelled: list[str] = []
    with _rows_of(files, table) as rows:
        for place, row in rows:
            label = marked_class(row, classes, place) if columns.label is None else row[columns.label]
            if not label:
                unlabelled.append(place)
                continue
            part = columns.part(row) or default
            file = finder.find(row[columns.path], place, part)
            items.append(DatasetItem(printable(file), files.file_of(file), part or "train", label))
    if has_boxes(table.names) and (
        twice := [file for file, count in Counter(item.file for item in items).items() if count > 1]
    ):
        raise DatasetError(
            f"{printable(table.name)} has boxes, and several rows for one image, such as {printable(twice[0])}: Imago gives an image one "
            "label; leave one row per image, or list crops of the boxes"
        )
    notes = [*columns.notes, *finder.notes()]
    without = ""
    if unlabelled:
        without = counted(len(unlabelled), "row has no label and is", "rows have no label and are")
        without += f" ignored, the first {unlabelled[0]}"
        notes.append(without)
    if (
        default is None
        and columns.split is None
        and not columns.flags
        and (parts := parts_of_folders(i.path for i in items))
    ):
        items = [replace(item, part=parts[item.path]) for item in items]
        notes.append(f"{printable(table.name)} has no column of parts; they follow from the folders of the images")
    return Listed(items, notes, without)


@contextmanager
def _rows_of(files: Files, table: Understood) -> Iterator[Iterable[tuple[str, Row]]]:
    if table.rows is not None:
        yield table.rows
        return
    with open_table(files, table.name) as opened:
        first = [(f"{printable(table.name)}, line 1", opened.columns)] if table.headless else []
        yield chain(first, opened.rows)


def _without_points(items: Iterable[DatasetItem]) -> Iterable[DatasetItem]:
    """Turns `3.0` into `3` if all labels are whole numbers."""
    labels = {item.class_name for item in items}
    if not all(re.fullmatch(r"-?\d+(\.0+)?", label) for label in labels) or not any(map(WHOLE.fullmatch, labels)):
        return items
    return {replace(item, class_name=item.class_name.partition(".")[0]) for item in items}


# Label Studio


def is_label_studio(columns: Row) -> bool:
    return set(label_studio.KEYS) <= set(columns)


def _label_studio_source(files: Files, name: str, table: Table) -> DatasetSource:
    image, choice = map(table.columns.index, label_studio.KEYS)
    tasks = (label_studio.Task(place, row[image], row[choice]) for place, row in table.rows)
    return label_studio.source(files, name, tasks)


# filename,<class>,<class>,...


def _one_hot_items(files: Files, name: str, table: Table) -> list[DatasetItem]:
    """Returns the images of `_classes.csv`. Their part is that of the table's folder, `train/_classes.csv`, or train."""
    folder = posixpath.dirname(name)
    part: Part = part_of(posixpath.basename(folder)) or "train"
    if table.columns[:1] != ("filename",) or len(table.columns) < 3:
        raise DatasetError(
            f"{printable(name)} needs a first line of filename and two classes or more; it has {', '.join(table.columns) or 'none'}"
        )
    items = []
    for place, row in table.rows:
        file, label = row[0], marked_class(row, dict(enumerate(table.columns[1:], 1)), place)
        if not file or leads_outside(file) or "\0" in file:
            raise DatasetError(f"{place}: {file[:200]!r} is no name of a file in the table's folder")
        path = posixpath.normpath(posixpath.join(folder, file))
        items.append(DatasetItem(printable(path), files.names.get(path, path), part, label))
    return items


def marked_class(row: Row, classes: Mapping[int, str], place: str) -> str:
    """Returns the class that a row marks. `classes`: the name of each column of marks."""
    marked = [name for at, name in classes.items() if row[at].lower() in TRUE]
    if len(marked) != 1:
        listed = ", ".join(marked[:5]) or "none"
        raise DatasetError(
            f"{place}: the image needs one label and has {listed}; mark one class with 1, or remove the line"
        )
    return marked[0]


def _one_hot_source(files: Files, items: list[DatasetItem]) -> DatasetSource:
    return make_source("Roboflow's _classes.csv", by_path(set(items)), files.read, labelled=True)
