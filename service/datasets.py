"""The datasets folder: resolves paths of requests, lists datasets, and receives uploads.

upload -> .tmp-<random>/, written as it arrives -> its table of contents checked -> <name>.zip, by one rename
          removed at its end; leftovers of a killed server are removed at the next start, or with the next upload
"""

import asyncio
import logging
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, Field

from models.errors import DatasetError, NameConflict
from models.files.atomic_files import TEMPORARY, locked, move, staging, sweep
from models.files.safe_open import open_beneath
from models.training.job.job_files import NO_DATASET
from service.errors import InsufficientStorage

log = logging.getLogger(__name__)

T = TypeVar("T")

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
_NEEDED_BYTES = 2**28  # a backbone, its checkpoint with an optimizer's state, features and a report
_LOCK = ".lock"
CHECK_S = 600.0  # for a zip's table of contents; one of 2,000,000 files takes 9 s of CPU time, beside whatever the server does
DatasetKind = Literal["folder", "zip", "tar", "csv", "json", "parquet"]
_KINDS: dict[str, DatasetKind] = {
    ".zip": "zip",
    ".tar": "tar",
    ".tar.gz": "tar",
    ".tgz": "tar",
    ".csv": "csv",
    ".json": "json",
    ".parquet": "parquet",
}


def resolve(root: Path, relative: Path) -> Path:
    """Returns the absolute path of a dataset. Raises one and the same DatasetError for what is missing and what is not allowed:

    absolute paths, `..`, `~`, URLs, symlinks at any depth, and anything but folders and regular files.
    """
    parts = relative.parts
    try:
        if not parts or relative.is_absolute() or _SCHEME.match(parts[0]) or any(map(_is_special, parts)):
            raise ValueError
        if not _is_plain(root, parts):
            raise ValueError
    except (OSError, ValueError):  # ValueError: a NUL
        raise DatasetError(NO_DATASET) from None
    return root.resolve().joinpath(*parts)


def _is_special(part: str) -> bool:
    return part == ".." or part.startswith("~")


def _is_plain(root: Path, parts: tuple[str, ...]) -> bool:
    """Whether the path leads through folders to a folder or a regular file."""
    handle = open_beneath(root, parts, os.O_PATH)  # no FIFO blocks it
    try:
        mode = os.fstat(handle).st_mode
        return stat.S_ISDIR(mode) or stat.S_ISREG(mode)
    finally:
        os.close(handle)


def check_space(dataset: Path, *folders: Path) -> None:
    """Raises InsufficientStorage if a folder's disk has less than twice the space that a job may need."""
    packed = dataset.stat().st_size if dataset.is_file() else 0
    needed = 2 * (_NEEDED_BYTES + packed)
    for folder in folders:
        _check_free(folder, needed)


def _check_free(folder: Path, needed: int) -> None:
    there = next(path for path in (folder.resolve(), *folder.resolve().parents) if path.exists())
    if shutil.disk_usage(there).free < needed:
        raise InsufficientStorage(
            f"less than {needed >> 20} MB are free on the server's disk; free some, or delete jobs and models"
        )


class DatasetEntry(BaseModel):
    """An entry of the datasets folder that a job can use."""

    object: Literal["dataset"] = "dataset"
    name: str = Field(description="The `dataset` of a request")
    kind: DatasetKind
    bytes: int | None = Field(None, description="Size of the file; null for a folder")
    modified: datetime


class Datasets:
    """The datasets folder. Links are not shown, as no request can use them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._pool = ThreadPoolExecutor(4, "datasets")

    async def start(self) -> None:
        """Removes leftovers of killed uploads."""
        await self.in_pool(self._sweep)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _sweep(self) -> None:
        try:
            if self.root.is_dir() and any(self.root.glob(f"{TEMPORARY}*")):
                with locked(self.root / _LOCK):
                    sweep(self.root)
        except OSError as error:  # a folder that is mounted read-only
            log.warning("uploads that were killed could not be removed: %s", error)

    async def page(self, after: str, limit: int) -> tuple[list[DatasetEntry], bool]:
        """Returns at most `limit` entries after this name, sorted by name, and whether there are more."""
        found = [dataset for dataset in await self.in_pool(self._listing) if dataset.name > after]
        return found[:limit], len(found) > limit

    def _listing(self) -> list[DatasetEntry]:
        if not self.root.is_dir():
            return []
        with os.scandir(self.root) as entries:
            return sorted(filter(None, map(_dataset_of, entries)), key=lambda dataset: dataset.name)

    def check_name(self, name: str) -> None:
        """Raises NameConflict if there is an entry of this name."""
        if os.path.lexists(self.root / name):
            raise NameConflict(f"there is a dataset {name!r}; take another name, or replace it with `replace=true`")

    async def receive(self, size: int) -> "Arrival":
        """Begins an upload of `size` bytes, 0 if unknown; the caller must close it. Raises InsufficientStorage."""
        return await self.in_pool(Arrival, self, size)

    async def in_pool(self, work: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work, *args)


def _dataset_of(entry: "os.DirEntry[str]") -> DatasetEntry | None:
    """Returns the entry; None for what is hidden, a link, not a dataset by its name, or has a name that cannot be typed."""
    kind = next((kind for suffix, kind in _KINDS.items() if entry.name.lower().endswith(suffix)), None)
    if entry.name.startswith((".", "~")) or not entry.name.isprintable() or entry.is_symlink():
        return None
    try:
        found = entry.stat(follow_symlinks=False)
    except FileNotFoundError:  # it has just gone
        return None
    modified = datetime.fromtimestamp(found.st_mtime, UTC)
    if stat.S_ISDIR(found.st_mode):
        return DatasetEntry(name=entry.name, kind="folder", bytes=None, modified=modified)
    if kind is None or not stat.S_ISREG(found.st_mode):
        return None
    return DatasetEntry(name=entry.name, kind=kind, bytes=found.st_size, modified=modified)


class Arrival:
    """One zip on its way into the datasets folder. Blocking. Its methods raise InsufficientStorage if the disk is full."""

    def __init__(self, datasets: Datasets, size: int) -> None:
        self._datasets = datasets
        self._closing = ExitStack()
        root = datasets.root
        with _storing():
            _check_free(root, size + _NEEDED_BYTES)
            self._folder = self._closing.enter_context(staging(root, root / _LOCK))
            self._file = self._closing.enter_context((self._folder / "upload").open("xb"))

    def write(self, data: bytes) -> None:
        with _storing():
            _check_free(self._folder, len(data) + _NEEDED_BYTES)
            self._file.write(data)

    def keep(self, name: str, replace: bool) -> DatasetEntry:
        """Checks the file and moves it into the datasets folder. Raises DatasetError, NameConflict."""
        root, draft = self._datasets.root, self._folder / name
        with _storing():
            self._file.flush()
            os.fsync(self._file.fileno())
            (self._folder / "upload").rename(draft)  # by its name in messages
        _check_table(draft)
        with _storing(), locked(root / _LOCK):
            if not replace or (root / name).is_dir():
                self._datasets.check_name(name)
            move(draft, root / name)
            found = (root / name).stat()
        return DatasetEntry(
            name=name, kind="zip", bytes=found.st_size, modified=datetime.fromtimestamp(found.st_mtime, UTC)
        )

    def close(self) -> None:
        """Removes an upload that was not kept."""
        self._closing.close()


def _check_table(path: Path) -> None:
    """Checks a zip's table of contents in a process with limited memory, so that a hostile zip costs the server neither memory nor the
    GIL: 4,000,000 entries take 2 GB as Python objects. Raises DatasetError."""
    command = (sys.executable, "-P", "-m", "models.files.zip_file", str(path))
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=CHECK_S)  # noqa: S603  (our own module)
    except subprocess.TimeoutExpired:
        raise DatasetError(
            f"{path.name} is refused: its table of contents takes more than {CHECK_S:.0f} s; split the dataset"
        ) from None
    if done.returncode == 0:
        return
    message = done.stdout.decode("utf-8", "replace").strip()
    if not message:
        log.error("the check of %s ended with %d: %s", path.name, done.returncode, done.stderr.decode()[-2000:])
    raise DatasetError(message or f"{path.name} is refused: its table of contents cannot be checked")


@contextmanager
def _storing() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InsufficientStorage(f"the datasets folder cannot be written to: {error.strerror}") from error
