"""Reads the text of tables, in any usual dialect, as rows of cells.

bytes --byte order mark, `encoding`--> lines --`sep=;`, the first row's delimiter--> cells, without blanks around them
                                             --a JSON object per line--------------> cells, by its keys
"""

import csv
import io
import json
import posixpath
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, islice
from typing import Any, NamedTuple, TypeVar

from models.data.files import Files, opened, undecodable
from models.errors import DatasetError
from models.files.text_encodings import AUTO, marked_encoding
from models.files.zip_file import check_count, printable

MAX_ROW = 2**20  # characters, in as many lines as it may take
MAX_COLUMNS = 10_000
PEEKED = 2**16  # bytes that the encoding is judged by
JSON_LINES = (".jsonl", ".ndjson")
DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "vertical bars"}
KEYED = 100  # rows of JSON Lines that the columns are taken from

T = TypeVar("T")
Row = tuple[str, ...]  # as many cells as there are columns


class Table(NamedTuple):
    columns: Row  # of the first row; a column without a name is ""
    rows: Iterator[tuple[str, Row]]  # each with its place, for messages; read from the file as they are asked for
    dialect: str  # for people; empty for commas and UTF-8


@contextmanager
def open_table(files: Files, name: str, errors: str = "strict") -> Iterator[Table]:
    """Opens a table. `errors`: as in Python's codecs; "replace" to look at the columns only.

    Raises DatasetError, also while the rows are read, for another encoding, a file that is no table, or a row that is too long.
    """
    with opened(files, name) as content:
        start = content.read(PEEKED)
    if start.startswith((b"PK\3\4", b"\xd0\xcf\x11\xe0")):
        raise DatasetError(f"{printable(name)} is an Excel workbook or a zip, and no text; save it as CSV UTF-8")
    marked = marked_encoding(start)
    encoding = marked[0] if marked else "utf-8" if files.encoding == AUTO else files.encoding
    if marked is None and b"\0" in start and "16" not in encoding and "32" not in encoding:
        raise DatasetError(
            f"{printable(name)} holds zero bytes, as UTF-16 without a byte order mark does; give --encoding utf-16-le "
            "(field `encoding`), or save the file as UTF-8",
            "encoding",
        )
    with opened(files, name) as content:
        text = io.TextIOWrapper(content, encoding=encoding, errors=errors, newline="")
        try:
            yield _read(text, name, encoding)
        except UnicodeDecodeError as error:
            known = AUTO if encoding == "utf-8" else encoding
            raise DatasetError(undecodable(name, error, known), "encoding") from error
        except csv.Error as error:
            raise DatasetError(
                f"{printable(name)} cannot be read as a table: a quotation mark is not closed, or has text after it; put cells "
                "that hold quotation marks in quotation marks, and double those inside"
            ) from error
        finally:
            text.detach()


def _read(text: io.TextIOWrapper, name: str, encoding: str) -> Table:
    lines = _Lines(text, name)
    if posixpath.splitext(name)[1].lower() in JSON_LINES:
        return _json_lines(lines, name)
    first = next((line for line in lines if line.strip()), "").removeprefix("\ufeff")
    delimiter = _declared(first)
    if delimiter:
        first = next((line for line in lines if line.strip()), "")
    else:
        delimiter = _delimiter(first)
    rows = _cells(lines, first, delimiter, name)
    columns = next(rows, ("", ()))[1]
    while columns and not columns[-1]:
        columns = columns[:-1]
    if len(columns) > MAX_COLUMNS:
        raise DatasetError(f"{printable(name)} has more than {MAX_COLUMNS:,} columns; this is no table of images")
    said = [f"separated by {DELIMITERS.get(delimiter, repr(delimiter))}"] if delimiter != "," else []
    said += [f"in {encoding}"] if encoding != "utf-8" else []
    return Table(columns, _aligned(rows, len(columns)), ", ".join(said))


def _declared(line: str) -> str:
    """Returns the delimiter that Excel's first line `sep=;` declares; empty for any other line."""
    match = re.fullmatch(r'"?sep=(.)"?', line.strip("\r\n"), re.IGNORECASE)
    return match[1] if match else ""


def _delimiter(line: str) -> str:
    """Returns the delimiter that cuts the first row into the most cells; a comma if none does."""
    plain = re.sub(r'"[^"]*"', "", line)
    return max(DELIMITERS, key=plain.count)


def _cells(lines: "_Lines", first: str, delimiter: str, name: str) -> Iterator[tuple[str, Row]]:
    """Yields all rows that are not blank."""
    reader = csv.reader(chain([first], lines), delimiter=delimiter, strict=True, skipinitialspace=delimiter != "\t")
    begun = lines.count - 1
    for row in lines.bounded(reader):
        cells = tuple(cell.strip() for cell in row)
        if any(cells):
            yield f"{printable(name)}, line {begun + reader.line_num}", cells


def _aligned(rows: Iterable[tuple[str, Row]], width: int) -> Iterator[tuple[str, Row]]:
    """Yields rows of `width` cells. Raises DatasetError for a row with more cells, unless these are empty."""
    for place, row in rows:
        if any(row[width:]):
            raise DatasetError(
                f"{place}: the row has {len(row)} cells, and the first row {width}; put a cell that holds the delimiter in "
                "quotation marks, and remove titles and comments above the names of the columns"
            )
        yield place, row[:width] + ("",) * (width - len(row))


# JSON Lines


def _json_lines(lines: "_Lines", name: str) -> Table:
    records = _records(lines, name)
    known = list(islice(records, KEYED))
    columns = tuple(dict.fromkeys(key for _, record in known for key in record))[:MAX_COLUMNS]
    rows = ((place, tuple(_text(record.get(key)) for key in columns)) for place, record in chain(known, records))
    return Table(columns, rows, "JSON Lines")


def _records(lines: "_Lines", name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for line in lines.bounded(lines):
        if not line.strip():
            continue
        place = f"{printable(name)}, line {lines.count}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict):
            raise DatasetError(f"{place}: this is no JSON object; JSON Lines have one on each line")
        yield place, record


def _text(value: Any) -> str:
    """Returns a cell as text; lists and objects, which are neither labels nor paths, are empty."""
    if isinstance(value, str):
        return value.strip()
    return str(value) if isinstance(value, bool | int | float) else ""


class _Lines:
    """Limits the lines that csv reads into memory for one row."""

    def __init__(self, text: io.TextIOWrapper, name: str) -> None:
        self._text, self._name, self._left = text, name, MAX_ROW
        self.count = 0

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
        self.count += 1
        return line

    def bounded(self, rows: Iterable[T]) -> Iterator[T]:
        """Yields rows, with a limit on the characters of each and on their number."""
        self._left = MAX_ROW
        for count, row in enumerate(rows, 1):
            check_count(count)
            self._left = MAX_ROW
            yield row
