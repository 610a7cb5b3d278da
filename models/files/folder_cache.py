"""A folder of folders as a cache on disk: the least recently used ones are deleted to make room."""

import logging
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

log = logging.getLogger(__name__)


def mark_used(folder: Path) -> None:
    """Records that the folder was used just now; a read-only disk forgets it."""
    with suppress(OSError):
        os.utime(folder)


def make_room(current: Path, is_enough: Callable[[Sequence[Path]], bool]) -> bool:
    """Deletes folders beside `current`, the least recently used first, until `is_enough` accepts those that are left, `current` included.

    Returns False where it does not even accept `current` alone.
    """
    folders = [path for path in current.parent.iterdir() if path.is_dir() and not path.name.startswith(".")]
    others = sorted((path for path in folders if path != current), key=lambda path: path.stat().st_mtime)
    while others and not is_enough([current, *others]):
        log.info("removing %s, the least recently used in %s", others[0].name, current.parent)
        shutil.rmtree(others.pop(0), ignore_errors=True)
    return is_enough([current, *others])
