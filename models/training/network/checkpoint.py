"""Keeps a run's state on disk: the last complete one, and the one before it.

    state --torch.save--> .part + sha256 --fsync--> rename: checkpoint -> checkpoint.previous, .part -> checkpoint

The last 32 bytes of a file are the sha256 of all before. If they do not match, the file is damaged and the previous one is used.
"""

import hashlib
import os
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
    """Write a state of tensors, numbers, strings, lists and dicts.

    After the first save a complete file exists at any moment: a damaged one is overwritten and never replaces the previous one.
    """
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
    """Return the state of the newest complete file, with its tensors on `device`, and its path; None if there is none."""
    for candidate in (path, previous(path)):
        if candidate.is_file() and _is_whole(candidate):
            state: CheckpointState = torch.load(candidate, map_location=device, weights_only=True)
            return state, candidate
    return None


def remove(path: Path) -> None:
    """Remove the checkpoint, the previous one, and what a killed `save` left."""
    for file in (path, previous(path), _draft(path)):
        file.unlink(missing_ok=True)


def _draft(path: Path) -> Path:
    return path.with_name(f"{path.name}.part")


def _is_whole(path: Path) -> bool:
    size = path.stat().st_size - DIGEST_BYTES
    with path.open("rb") as file:
        return size > 0 and _sha256(file, size) == file.read(DIGEST_BYTES)


def _sha256(file: BinaryIO, size: int) -> bytes:
    """Return the hash of the file's first `size` bytes, and leave the file at their end."""
    file.seek(0)
    digest = hashlib.sha256()
    while size > 0 and (chunk := file.read(min(CHUNK_BYTES, size))):
        size -= len(chunk)
        digest.update(chunk)
    return digest.digest()
