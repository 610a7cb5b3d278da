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
from models.data.files import Files, FolderFiles, ZipFiles
from models.data.idx import read_idx
from models.data.parquet import read_parquet
from models.data.samples import Source
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


@contextmanager
def open_source(path: Path) -> Iterator[Source]:
    """List a dataset. `read` may be used by several threads at once, until the end of the block.

    Raises TooFewClasses; DatasetError: not a dataset, too many files, a name that points outside, or a malformed file of many images.
    """
    suffix = path.suffix.lower()
    if path.is_dir():
        with _recognised(FolderFiles(path)) as source:
            yield source
    elif path.is_file() and suffix == ".csv":
        with path.open("rb") as content:
            source = read_csv(FolderFiles(path.parent), path.name, content)
        yield source
    elif path.is_file() and suffix == ".json":
        yield label_studio.read_json(FolderFiles(path.parent), path.name)
    elif path.is_file() and suffix == ".parquet":
        with _recognised(FolderFiles(path.parent, only=path.name)) as source:
            yield source
    elif path.is_file() and is_zipfile(path):
        with open_archive(path) as archive, _recognised(ZipFiles(archive)) as source:
            yield source
    elif path.is_file() and is_tar(path):
        with open_tar(path) as files, _recognised(files) as source:
            yield source
    else:
        raise DatasetError(
            f"{path.name} is neither a folder nor a zip file nor a CSV; a dataset is a folder of class folders, a zip or tar of one, "
            "a CSV of path,label, or one of the formats that docs/training.md lists"
        )


@contextmanager
def _recognised(files: Files) -> Iterator[Source]:
    with files.closing:
        source = next(source for read in LAYOUTS if (source := read(files)) is not None)
        yield replace(source, notes=(*source.notes, *files.notes))
