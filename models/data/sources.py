"""From the path of a dataset to its labelled images: the one place that recognises layouts.

a folder, zip or tar --LAYOUTS, the first that recognises it--> Source
a .csv or .json      --its columns----------------------------> Source, of images beside it
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from zipfile import is_zipfile

from models.archive import open_archive
from models.data import label_studio
from models.data.cifar import read_cifar
from models.data.class_folders import read_class_folders
from models.data.files import Files, FolderFiles, ZipFiles, opened
from models.data.idx import read_idx
from models.data.parquet import read_parquet
from models.data.samples import AS_IT_IS, Reading, Source, advised, listed, refuse_alike
from models.data.tables import read_csv, read_label_studio, read_one_hot
from models.data.tar import is_tar, open_tar
from models.errors import DatasetError

# Each returns None for what is not its own, and raises DatasetError for its own that is malformed. The last takes whatever is left.
LAYOUTS: tuple[Callable[[Files], Source | None], ...] = (
    read_idx,
    read_cifar,
    read_parquet,
    read_one_hot,
    read_label_studio,
    read_class_folders,
)


NO_LAYOUT = "neither a folder nor a zip file nor a CSV; a dataset is a folder of class folders, a zip or tar of one, "


@contextmanager
def open_source(path: Path, reading: Reading = AS_IT_IS) -> Iterator[Source]:
    """List a dataset. `read` may be used by several threads at once, until the end of the block.

    Raises TooFewClasses; DatasetError: not a dataset, too many files, a name that points outside, a layout in doubt, or a malformed
    file of many images.
    """
    suffix = path.suffix.lower()
    if path.is_dir():
        with _recognised(FolderFiles(path, follow_links=reading.follow_links), reading) as source:
            yield source
    elif path.is_file() and suffix in (".csv", ".json", ".parquet"):
        if reading.layout in ("classes", "splits"):
            raise DatasetError(f"{path.name} is one file: layout {reading.layout} is for folders, zips and tars")
        with _one_file(path, suffix, reading) as source:
            yield source
    elif path.is_file() and is_zipfile(path):
        with open_archive(path) as archive, _recognised(ZipFiles(archive), reading) as source:
            yield source
    elif path.is_file() and is_tar(path):
        with open_tar(path) as files, _recognised(files, reading) as source:
            yield source
    else:
        raise DatasetError(
            f"{path.name} is {NO_LAYOUT}a CSV of path,label, or one of the formats that docs/training.md lists"
        )


@contextmanager
def _one_file(path: Path, suffix: str, reading: Reading) -> Iterator[Source]:
    files = FolderFiles(
        path.parent, only=path.name if suffix == ".parquet" else None, follow_links=reading.follow_links
    )
    if suffix == ".parquet":
        with _recognised(files, reading) as source:
            yield source
        return
    if suffix == ".json":
        yield label_studio.read_json(files, path.name)
        return
    with path.open("rb") as content:
        source = read_csv(files, path.name, content)
    if reading.layout != "csv":
        refuse_alike(source.classes)
    yield replace(source, advice=files.advice)


@contextmanager
def _recognised(files: Files, reading: Reading) -> Iterator[Source]:
    with files.closing:
        with advised(lambda: files.advice):
            source = _read(files, reading)
        ignored = (*files.ignored, *source.ignored)
        yield replace(source, notes=(*source.notes, *files.notes), ignored=ignored, advice=files.advice)


def _read(files: Files, reading: Reading) -> Source:
    """Raises TooFewClasses, DatasetError."""
    if reading.layout in ("classes", "splits"):
        return read_class_folders(files, reading.layout)
    if reading.layout == "csv":
        return _read_its_table(files)
    return next(source for read in LAYOUTS if (source := read(files)) is not None)


def _read_its_table(files: Files) -> Source:
    tables = sorted(name for name in files.names if name.lower().endswith(".csv") and "/" not in name)
    if len(tables) != 1:
        there = f"it has {len(tables)}: {listed(tables)}" if tables else "it has none"
        raise DatasetError(
            f"layout csv needs one CSV at the top of {files.label}, and {there}; give the path of the CSV instead"
        )
    with opened(files, tables[0]) as content:
        return read_csv(files, tables[0], content)
