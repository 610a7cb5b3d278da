"""Datasets of the Hugging Face Hub: parquet files of images and labels, in row groups.

    [data/]train-00000-of-00002.parquet ...   image: struct{bytes, path} or binary   label: integer, named in the schema, or string

Labels are read first, images row group by row group; the last two row groups stay in memory. pyarrow is the extra `parquet`, imported
when such a file is found.
"""

import json
import posixpath
import re
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import IO, TYPE_CHECKING, Any

from models.data.files import Files
from models.data.formats.parquet_pages import unpacked_bytes
from models.data.samples import UNREADABLE, DatasetItem, DatasetSource, Part, make_source, part_of
from models.errors import DatasetError
from models.files.zip_file import check_count, check_growth, printable
from models.images.cost import FILE_BYTES

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

IMAGES = ("image", "img")
LABELS = ("label", "labels", "fine_label", "class")
SHARD = re.compile(r"(?P<split>.+?)-\d+-of-\d+(-[0-9a-f]+)?\.parquet", re.IGNORECASE)
MAX_ROW_GROUP_BYTES = 2**30
KEPT = 2  # row groups in memory: threads read the end of one and the beginning of the next


def read_parquet(files: Files) -> DatasetSource | None:
    """Reads a parquet dataset; returns None if there is no parquet file. Raises TooFewClasses; raises DatasetError if pyarrow is missing
    or a file is malformed."""
    names = sorted(name for name in files.names if name.lower().endswith(".parquet"))
    if not names:
        return None
    _check_installed()
    parts = {name: _part(name) for name in names}
    if any(parts.values()):
        strays = [printable(name) for name, part in parts.items() if part is None]
    else:
        parts, strays = dict.fromkeys(names, "train"), []
    folder = posixpath.commonpath(map(posixpath.dirname, names))
    shards: dict[str, Shard] = {}
    items: list[DatasetItem] = []
    for name, part in parts.items():
        if part is None:
            continue
        shard = Shard(files, name)
        path = printable(posixpath.relpath(name, folder or "."))
        shards[path] = shard
        items += [
            DatasetItem(f"{path}[{row}]", f"{path}[{row}]", part, label) for row, label in enumerate(shard.labels())
        ]
        check_count(len(items))

    def read(file: str) -> bytes:
        path, _, row = file.removesuffix("]").rpartition("[")
        return shards[path].image(int(row))

    notes = [f"{len(strays)} parquet files of another split are ignored, the first {strays[0]}"] if strays else []
    listed = ", ".join(f"{path} ({shard.rows:,} images)" for path, shard in [*shards.items()][:10])
    more = f" and {len(shards) - 10} more" if len(shards) > 10 else ""
    return make_source(f"Hugging Face parquet: {listed}{more}", items, read, labelled=True, notes=notes)


def _check_installed() -> None:
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        raise DatasetError("parquet files need pyarrow, which is not installed: pip install 'imago[parquet]'") from None


def _part(name: str) -> Part | None:
    """Returns the part of `test-00000-of-00001.parquet`, `test.parquet` or `test/0000.parquet`; None if the name has none, or another
    split."""
    folder, file = posixpath.split(name)
    shard = SHARD.fullmatch(file)
    split = shard["split"] if shard else posixpath.splitext(file)[0]
    return part_of(split) or (None if shard else part_of(posixpath.basename(folder)))


class Shard:
    """One parquet file. Raises DatasetError if it is damaged, or has no column of images or of labels."""

    def __init__(self, files: Files, name: str) -> None:
        self._name, self._lock = printable(name), threading.Lock()
        self._groups: OrderedDict[int, Any] = OrderedDict()  # number of a row group -> its images
        with _readable(self._name):
            content = files.closing.enter_context(files.seekable(files.names[name]))
            self._file = _open(content)
            self._image, self._label = self._columns()
            # As dictionaries, in which a value lies once: 1 KB of a file may name a value of 1 MB in a million rows.
            self._file = _open(content, [self._image, self._label])
            self._check_sizes(files.size(files.names[name])[0], content)
        metadata = self._file.metadata
        self.rows: int = metadata.num_rows
        self._ends = list(accumulate(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)))

    def _columns(self) -> tuple[str, str]:
        """Returns the dotted name of the bytes of images, and the name of the labels."""
        import pyarrow as pa

        schema, types = self._file.schema_arrow, {"image": "Image", "label": "ClassLabel"}
        features = _features(schema)
        image = _choose(
            self._name, "image", IMAGES, schema.names, [n for n, f in features.items() if f == types["image"]]
        )
        label = _choose(
            self._name, "label", LABELS, schema.names, [n for n, f in features.items() if f == types["label"]]
        )
        kind = _plain(schema.field(image).type)
        if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            return f"{image}.bytes", label
        if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
            return image, label
        raise DatasetError(
            f"{self._name}: the column {image} holds {str(kind)[:80]}; it should hold the bytes of image files, or a struct with `bytes`"
        )

    def _check_sizes(self, size: int, content: IO[bytes]) -> None:
        """Checks what row groups claim to hold, or the headers of their pages if that is more, before any column is read."""
        metadata = self._file.metadata
        check_count(metadata.num_rows)
        columns = (self._image, self._label)
        claimed = [_uncompressed(metadata.row_group(i), columns, content) for i in range(metadata.num_row_groups)]
        check_growth(self._name, size, sum(claimed))
        if max(claimed, default=0) > MAX_ROW_GROUP_BYTES:
            raise DatasetError(
                f"{self._name} has a row group with {max(claimed):,} bytes of images; the limit is {MAX_ROW_GROUP_BYTES:,}: write it again "
                "with row_group_size=1000"
            )

    def labels(self) -> list[str]:
        """Returns the class name of each row."""
        names = _class_names(self._file.schema_arrow, self._label)
        found: list[str] = []
        with _readable(self._name):
            for batch in self._file.iter_batches(columns=[self._label], use_threads=False):
                found += [self._named(value, len(found) + i, names) for i, value in enumerate(_values(batch.column(0)))]
        if len(found) != self.rows:
            raise DatasetError(f"{self._name} has {len(found):,} labels for {self.rows:,} rows: download it again")
        return found

    def _named(self, value: Any, row: int, names: Sequence[str] | None) -> str:
        if isinstance(value, str) and value.strip():
            return value.strip()
        if type(value) is not int or value < 0:
            raise DatasetError(
                f"{self._name}: row {row} has no label ({str(value)[:50]}); leave out the file if its part has no labels, or the row"
            )
        if names is None:
            return str(value)
        if value >= len(names):
            raise DatasetError(
                f"{self._name}: label {value} of row {row} has no name; the schema names {len(names)} classes: correct one of them"
            )
        return names[value]

    def image(self, row: int) -> bytes:
        """Returns at most one byte more than a decoder accepts. Raises OSError."""
        group = bisect_right(self._ends, row)
        images = self._images(group)
        with _readable_row(self._name):
            value = images[row - (self._ends[group - 1] if group else 0)]
            data: bytes | None = value.value.as_buffer()[: FILE_BYTES + 1].to_pybytes() if value.is_valid else None
        if data is None:
            raise OSError("the row holds no bytes of an image")
        return data

    def _images(self, group: int) -> Any:
        with self._lock:
            if group not in self._groups:
                while len(self._groups) >= KEPT:
                    self._groups.popitem(last=False)
                with _readable_row(self._name):
                    table = self._file.read_row_group(group, columns=[self._image], use_threads=False)
                self._groups[group] = table.flatten().column(self._image)
            self._groups.move_to_end(group)
            return self._groups[group]


def _open(content: IO[bytes], dictionaries: Sequence[str] = ()) -> "ParquetFile":
    """Opens a file. `dictionaries`: columns of bytes or text to read as dictionaries, whatever their encoding."""
    from pyarrow.parquet import ParquetFile

    return ParquetFile(content, pre_buffer=False, read_dictionary=[*dictionaries])


def _plain(kind: Any) -> Any:
    """Returns the type of the values of a dictionary; pyarrow stores that a column was one."""
    import pyarrow as pa

    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _values(column: Any) -> list[Any]:
    """Returns the values of an array; equal ones are one object."""
    import pyarrow as pa

    if not pa.types.is_dictionary(column.type):
        return list(column.to_pylist())
    values = column.dictionary.to_pylist()
    return [None if index is None else values[index] for index in column.indices.to_pylist()]


@contextmanager
def _readable(name: str) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except DatasetError:
        raise
    except (pa.ArrowException, ValueError, LookupError, OverflowError, *UNREADABLE) as error:
        raise DatasetError(f"{name} is damaged, or no parquet file: download it again") from error


@contextmanager
def _readable_row(name: str) -> Iterator[None]:
    """Like `_readable`, for errors that concern single images: raises OSError."""
    try:
        with _readable(name):
            yield
    except DatasetError as error:
        raise OSError(str(error)) from error


def _uncompressed(group: Any, names: Sequence[str], content: IO[bytes]) -> int:
    columns = (group.column(i) for i in range(group.num_columns))
    return sum(
        max(column.total_uncompressed_size, unpacked_bytes(content, column))
        for column in columns
        if column.path_in_schema in names
    )


def _choose(name: str, what: str, usual: Sequence[str], columns: Sequence[str], declared: Sequence[str]) -> str:
    """Returns the column with a usual name, or the only one that the schema declares to be such."""
    found = next((column for column in usual if column in columns), None)
    if found is None and len(declared) == 1:
        found = declared[0]
    if found is None:
        raise DatasetError(
            f"{name} has no column {' or '.join(usual)}: rename that of the {what}s; it has {', '.join(columns[:20]) or 'none'}"
        )
    return found


def _metadata(schema: Any) -> dict[str, Any]:
    """Returns what the Hugging Face library wrote into the schema for each column."""
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return {}
    return features if isinstance(features, dict) else {}


def _features(schema: Any) -> dict[str, str]:
    found = _metadata(schema).items()
    return {name: str(each.get("_type")) for name, each in found if isinstance(each, dict) and name in schema.names}


def _class_names(schema: Any, label: str) -> Sequence[str] | None:
    feature = _metadata(schema).get(label)
    names = feature.get("names") if isinstance(feature, dict) else None
    return names if isinstance(names, list) and all(isinstance(name, str) and name for name in names) else None
