"""Opening what somebody names, and nothing that a link leads to instead."""

import os
from collections.abc import Sequence
from pathlib import Path

_FOLDER = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_CLOEXEC


def open_beneath(root: str | Path, parts: Sequence[str], flags: int) -> int:
    """The descriptor of a file or folder below `root`, opened with `flags`, of which O_PATH opens a link itself.

    It is walked by descriptors: a link on the way, be it one that came a moment ago, is an OSError.
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
