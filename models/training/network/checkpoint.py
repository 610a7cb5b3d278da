"""A run's state on disk: the last whole one, and the one before it.

    state --torch.save--> .part + sha256 --fsync--> rename: checkpoint -> checkpoint.previous, .part -> checkpoint

A file that was cut short or damaged is known by its last 32 bytes, the sha256 of all before; then the previous one counts.
"""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch

from models.files.atomic_files import move

DIGEST_BYTES = 32
CHUNK_BYTES = 2**20

CheckpointState = dict[str, Any]


def previous(path: Path) -> Path:
    return path.with_name(f"{path.name}.previous")


def save(path: Path, state: CheckpointState) -> None:
    """Of tensors, numbers, strings, lists and dicts. Once one was saved, a whole file is there at any moment: a damaged one is written
    over, and never takes the place of the previous."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = _draft(path)
    try:
        with draft.open("wb+") as file:
            torch.save(state, file)
            size = file.tell()
            file.write(_sha256(file, size))
            file.flush()
            os.fsync(file.fileno())
        if path.is_file() and _is_whole(path):
            path.rename(previous(path))
        move(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def load(path: Path, device: torch.device) -> tuple[CheckpointState, Path] | None:
    """The state of the newest whole file, its tensors on `device`, and that file; None where there is none."""
    for candidate in (path, previous(path)):
        if candidate.is_file() and _is_whole(candidate):
            state: CheckpointState = torch.load(candidate, map_location=device, weights_only=True)
            return state, candidate
    return None


def remove(path: Path) -> None:
    """With what a killed `save` has left."""
    for file in (path, previous(path), _draft(path)):
        file.unlink(missing_ok=True)


def _draft(path: Path) -> Path:
    return path.with_name(f"{path.name}.part")


def _is_whole(path: Path) -> bool:
    size = path.stat().st_size - DIGEST_BYTES
    with path.open("rb") as file:
        return size > 0 and _sha256(file, size) == file.read(DIGEST_BYTES)


def _sha256(file: BinaryIO, size: int) -> bytes:
    """Of the file's first `size` bytes; the file is left behind them."""
    file.seek(0)
    digest = hashlib.sha256()
    for chunk in _chunks(file, size):
        digest.update(chunk)
    return digest.digest()


def _chunks(file: BinaryIO, size: int) -> Iterator[bytes]:
    while size > 0 and (chunk := file.read(min(CHUNK_BYTES, size))):
        size -= len(chunk)
        yield chunk
