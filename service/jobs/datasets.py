"""From the path in a request to a dataset under the datasets folder, and to nothing else."""

import os
import re
import shutil
import stat
from pathlib import Path

from models.errors import DatasetError
from service.errors import InsufficientStorage

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
_NEEDED_BYTES = 2**28  # a backbone, its checkpoint with an optimizer's state, features and a report


def resolve(root: Path, relative: Path) -> Path:
    """The absolute path of a dataset. DatasetError, the same for all that is not there and all that is not allowed:

    absolute paths, `..`, `~`, URLs, symlinks at any depth, and what is neither a folder nor a regular file.
    """
    parts = relative.parts
    try:
        if not parts or relative.is_absolute() or _SCHEME.match(parts[0]) or any(map(_is_special, parts)):
            raise ValueError
        if not _is_plain(root, parts):
            raise ValueError
    except (OSError, ValueError):  # ValueError: a NUL
        raise DatasetError(
            "there is no dataset at that path: give the relative path of a folder, a .zip or a .csv under the datasets folder"
        ) from None
    return root.resolve().joinpath(*parts)


def _is_special(part: str) -> bool:
    return part == ".." or part.startswith("~")


def _is_plain(root: Path, parts: tuple[str, ...]) -> bool:
    """Whether the path is of folders down to a folder or a regular file. It is walked by descriptors: nothing on the way is followed."""
    handle = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for part in parts:  # O_PATH opens a symlink itself, and no FIFO blocks it
            below = os.open(part, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=handle)
            os.close(handle)
            handle = below
        mode = os.fstat(handle).st_mode
        return stat.S_ISDIR(mode) or stat.S_ISREG(mode)
    finally:
        os.close(handle)


def check_space(dataset: Path, *folders: Path) -> None:
    """Raises InsufficientStorage where a folder's disk has less than twice what a job may write."""
    packed = dataset.stat().st_size if dataset.is_file() else 0
    needed = 2 * (_NEEDED_BYTES + packed)
    for folder in folders:
        there = next(path for path in (folder.resolve(), *folder.resolve().parents) if path.exists())
        if shutil.disk_usage(there).free < needed:
            raise InsufficientStorage(
                f"less than {needed >> 20} MB are free on the server's disk; free some, or delete jobs and models"
            )
