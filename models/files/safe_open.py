"""Opens files by path without following links."""

import os
from collections.abc import Sequence
from pathlib import Path

_FOLDER = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_CLOEXEC


def open_beneath(root: str | Path, parts: Sequence[str], flags: int) -> int:
    """Opens a file or folder below `root` and returns its descriptor; with O_PATH in `flags`, a link itself.

    The path is walked by descriptors. Raises OSError for a link on the way, even one that was created during the walk.
    """
    handle = os.open(root, _FOLDER)
    try:
        for folder in parts[:-1]:
            below = os.open(folder, _FOLDER | os.O_NOFOLLOW, dir_fd=handle)
            os.close(handle)
            handle = below
        return os.open(parts[-1], flags | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=handle)
    finally:
        os.close(handle)
