"""Atomic writes: a reader, a second writer, or a process after a crash sees a whole file or none.

    under the store's lock   .tmp-<random> is created and locked by a shared flock
    outside the lock         its files are written and flushed
    under the lock again     one rename moves it to its name, then the parent folder is flushed

A writer that is killed leaves an unlocked `.tmp-` entry; the next writer deletes it.
"""

import errno
import fcntl
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from models.errors import ReadOnlyStore

TEMPORARY = ".tmp-"
REFUSED = (errno.EROFS, errno.EACCES, errno.EPERM)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Locks the file `path` exclusively, among threads and processes; the kernel releases it when the holder exits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@contextmanager
def writing(root: Path) -> Iterator[None]:
    """Raises ReadOnlyStore where the operating system refuses the writes of the body to the store at `root`."""
    try:
        yield
    except OSError as error:
        if error.errno not in REFUSED:
            raise
        raise ReadOnlyStore(
            f"the model store {root} cannot be written to ({error.strerror}); mount it read-write, or change its permissions"
        ) from error


def try_write(folder: Path) -> None:
    """Writes and removes an empty file. Raises OSError."""
    probe = temporary(folder)
    probe.touch()
    probe.unlink()


@contextmanager
def staging(parent: Path, lock: Path) -> Iterator[Path]:
    """Creates a temporary folder in `parent`, to be filled and renamed; deletes it at the end if it is still there."""
    with locked(lock):
        parent.mkdir(parents=True, exist_ok=True)
        sweep(parent)
        folder = temporary(parent)
        folder.mkdir()
        handle = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        fcntl.flock(handle, fcntl.LOCK_SH)  # the lock survives the rename
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


def temporary(parent: Path) -> Path:
    """Returns a name in `parent` that listings ignore and `sweep` deletes."""
    return parent / f"{TEMPORARY}{uuid.uuid4().hex}"


def write(path: Path, data: bytes) -> None:
    """Writes a new file and flushes it to the disk."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def replace(path: Path, data: bytes) -> None:
    """Replaces the content of `path` by `data` in one step. The caller holds the lock."""
    draft = temporary(path.parent)
    try:
        write(draft, data)
        move(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def move(source: Path, target: Path) -> None:
    """Renames a flushed file, or a folder of such files, durably."""
    if source.is_dir():
        flush_folder(source)
    source.rename(target)
    flush_folder(target.parent)


def flush_folder(folder: Path) -> None:
    """Flushes the names in `folder` to the disk."""
    handle = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def discard(path: Path) -> None:
    """Hides a folder from listings in one step, then deletes it. The caller holds the lock."""
    grave = temporary(path.parent)
    path.rename(grave)
    shutil.rmtree(grave, ignore_errors=True)


def sweep(parent: Path) -> None:
    """Deletes the temporary entries of writers that were killed. The caller holds the lock."""
    for entry in parent.iterdir() if parent.is_dir() else ():
        if entry.name.startswith(TEMPORARY) and not _held(entry):
            shutil.rmtree(entry, ignore_errors=True)
            with suppress(OSError):
                entry.unlink(missing_ok=True)


def _held(path: Path) -> bool:
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(handle)
    return False
