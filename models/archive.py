"""Zip files from anybody: what their table of contents says is checked before any of it is read, and nothing is ever extracted."""

import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from models.errors import DatasetError

MAX_FILES = 2_000_000  # of a dataset
MAX_RATIO = 100  # of a zip's content to its size, past a gigabyte; photographs are 1, flat bitmaps some 20
MAX_MEMBER_RATIO = 500  # of one member, past 16 MiB; deflate ends at 1,032


@contextmanager
def open_archive(path: Path) -> Iterator[zipfile.ZipFile]:
    """Raises DatasetError where it is no zip file."""
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError, NotImplementedError) as error:
        raise DatasetError(f"{path.name} cannot be read as a zip file: {error}; pack or copy it again") from error
    with archive:
        yield archive


def members_of(archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    """All members, folders included. Raises DatasetError: too many, a name that leads outside, or a zip bomb."""
    path, members = Path(archive.filename or ""), archive.infolist()
    check_count(len(members))
    for member in members:
        _check_member(member, path)
    size, total = path.stat().st_size, sum(member.file_size for member in members)
    if total > 2**30 and total > MAX_RATIO * size:
        raise DatasetError(
            f"{path.name} is refused: its {size:,} bytes would grow to {total:,}, more than {MAX_RATIO} times as many"
        )
    return members


def check_growth(name: str, packed: int, size: int) -> None:
    """Raises DatasetError where so many packed bytes should not become `size`."""
    if (size > 16 * 2**20 and size > MAX_MEMBER_RATIO * max(1, packed)) or (size > 2**30 and size > MAX_RATIO * packed):
        raise DatasetError(f"{printable(name)[:200]} is refused: its {packed:,} bytes would grow to {size:,}")


def check_count(files: int) -> None:
    """Raises DatasetError for more files than a dataset may have."""
    if files > MAX_FILES:
        raise DatasetError(f"the dataset has more than {MAX_FILES:,} files; split it, or name a folder further down")


def check_name(filename: str, path: Path) -> None:
    """Raises DatasetError for the name of a member that leads outside of the archive."""
    name = filename.replace("\\", "/")
    if name.startswith("/") or ".." in name.split("/") or re.match(r"[A-Za-z]:", name):
        raise DatasetError(f"{path.name} is refused: its member {printable(filename)[:200]!r} would lie outside of it")


def _check_member(member: zipfile.ZipInfo, path: Path) -> None:
    check_name(member.filename, path)
    name = member.filename.replace("\\", "/")
    if member.file_size > 16 * 2**20 and member.file_size > MAX_MEMBER_RATIO * max(1, member.compress_size):
        raise DatasetError(
            f"{path.name} is refused: {printable(name)[:200]!r} would grow from {member.compress_size:,} to {member.file_size:,} bytes"
        )


def printable(name: str) -> str:
    """A file name need not be UTF-8; what is not becomes an escape, so that it can be hashed and written as JSON."""
    return name.encode("utf-8", "backslashreplace").decode()
