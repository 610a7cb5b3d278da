"""Zip files of users: the table of contents is checked before any member is read, and nothing is extracted to disk.

Members are stored or deflated; a member never yields more bytes than the table claims. `python -m models.files.zip_file FILE` checks a
file in a separate process: exit code 0, or 1 with the reason on stdout.
"""

import io
import os
import re
import resource
import sys
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import IO, BinaryIO

from models.errors import DatasetError
from models.files.text_encodings import AUTO, described
from models.files.zip_directory import Directory, Member, find_directory, read_directory

MAX_FILES = 2_000_000  # of a dataset
MAX_DIRECTORY_BYTES = 2**29  # of a zip's table of contents: 268 bytes for each of so many files
MAX_RATIO = 100  # of a zip's content to its size, past a gigabyte; photographs are 1, flat bitmaps some 20
MAX_MEMBER_RATIO = 500  # of one member, past 16 MiB; deflate ends at 1,032
BLOCK = 2**16  # bytes of deflated data read at once
LOCAL_HEADER = 30  # bytes, before the name
ENCRYPTED, STORED, DEFLATED = 1, 0, 8
METHODS = {9: "Deflate64", 12: "bzip2", 14: "LZMA", 93: "Zstandard", 95: "xz", 98: "PPMd", 99: "encryption"}
CHECK_BYTES = 2**30  # address space of a process that checks a table of contents


class Archive:
    """An open zip. Several threads may read it at the same time."""

    def __init__(self, file: BinaryIO, path: Path, encoding: str = AUTO) -> None:
        """Reads the table of contents. `encoding`: of names without a stated encoding that are not all UTF-8.

        Raises BadZipFile, and DatasetError as `check_members`, or where a name cannot be decoded.
        """
        self.path, self._file = path, file
        directory = _bounded_directory(file, path)
        self.members = tuple(check_members(read_directory(file, directory), directory, path))
        self.unread: dict[str, bytes] = {}  # names of unknown encoding, with their bytes
        if any(not _is_utf8(member.raw) for member in self.members):
            if encoding == AUTO:
                self.unread = {member.filename: member.raw for member in self.members if member.raw}
            else:
                self.members = tuple(_renamed(member, encoding, path) for member in self.members)
        self._by_name = {member.filename: member for member in self.members}

    @property
    def names(self) -> list[str]:
        return [member.filename for member in self.members]

    def member(self, name: str) -> Member:
        """Returns a member by its name. Raises KeyError."""
        return self._by_name[name]

    def open(self, member: Member) -> IO[bytes]:
        """Opens the content of a member as a stream.

        Raises BadZipFile, also while it is read, and RuntimeError for an encrypted member or another compression method.
        """
        if member.flags & ENCRYPTED:
            raise RuntimeError("encrypted; pack the zip again without a password")
        if member.method not in (STORED, DEFLATED):
            method = METHODS.get(member.method, f"method {member.method}")
            raise RuntimeError(
                f"packed with {method}; pack the zip again with Deflate, as `zip -r` and file managers do"
            )
        header = os.pread(self._file.fileno(), LOCAL_HEADER, member.offset)
        if len(header) < LOCAL_HEADER or not header.startswith(b"PK\3\4"):
            raise zipfile.BadZipFile("there is no such file where the table of contents says")
        start = member.offset + LOCAL_HEADER + sum(int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
        return io.BufferedReader(_Content(Window(self._file.fileno(), start, member.packed), member), BLOCK)


class Window(io.RawIOBase):
    """A part of a file, read by its descriptor, so that several threads can share the file."""

    def __init__(self, handle: int, start: int, size: int) -> None:
        self._handle, self._at, self._end = handle, start, start + size

    def readable(self) -> bool:
        return True

    def readinto(self, target: "bytearray | memoryview") -> int:  # type: ignore[override]
        data = os.pread(self._handle, min(len(target), self._end - self._at), self._at)
        target[: len(data)] = data
        self._at += len(data)
        return len(data)


class _Content(io.RawIOBase):
    """The content of a member. Raises BadZipFile at the first byte beyond the claimed size, and for a wrong size or CRC."""

    def __init__(self, packed: Window, member: Member) -> None:
        self._packed, self._member = packed, member
        self._inflater = zlib.decompressobj(-zlib.MAX_WBITS) if member.method == DEFLATED else None
        self._size = self._crc = 0

    def readable(self) -> bool:
        return True

    def readinto(self, target: "bytearray | memoryview") -> int:  # type: ignore[override]
        data = self._next(min(len(target), BLOCK)) if len(target) else b""
        self._size += len(data)
        self._crc = zlib.crc32(data, self._crc)
        if self._size > self._member.size or (not data and len(target) and self._size < self._member.size):
            raise zipfile.BadZipFile(
                "it is not of the size that the table of contents says; pack or copy the zip again"
            )
        if self._size == self._member.size and self._crc != self._member.crc:
            raise zipfile.BadZipFile("its checksum is wrong; pack or copy the zip again")
        target[: len(data)] = data
        return len(data)

    def _next(self, size: int) -> bytes:
        """Returns at most `size` bytes of the content, none at its end."""
        if self._inflater is None:
            return self._packed.read(size) or b""
        while not self._inflater.eof:
            packed = self._inflater.unconsumed_tail or self._packed.read(BLOCK)
            data = self._inflater.decompress(packed or b"", size)
            if data or not packed:
                return data
        return b""


@contextmanager
def open_archive(path: Path, encoding: str = AUTO) -> Iterator[Archive]:
    """Opens a zip. `encoding`: as in `Archive`.

    Raises DatasetError for another file, too many members, a path outside of the archive, a name that cannot be decoded, and a zip bomb.
    """
    with ExitStack() as closing:
        with _readable(path):
            archive = Archive(closing.enter_context(path.open("rb")), path, encoding)
        yield archive


def check(path: Path) -> None:
    """Checks the table of contents of a zip. Raises DatasetError as `open_archive`."""
    with _readable(path), path.open("rb") as file:
        directory = _bounded_directory(file, path)
        for _ in check_members(read_directory(file, directory), directory, path):
            pass


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (zipfile.BadZipFile, OSError) as error:
        raise DatasetError(f"{path.name} cannot be read as a zip file: {error}; pack or copy it again") from error


def _bounded_directory(file: BinaryIO, path: Path) -> Directory:
    """Checks the claims of the end record before the table is read. Raises DatasetError."""
    directory = find_directory(file)
    check_count(directory.entries)
    if directory.size > MAX_DIRECTORY_BYTES:
        raise DatasetError(
            f"{path.name} is refused: its table of contents has {directory.size:,} bytes, the limit is {MAX_DIRECTORY_BYTES:,}; "
            "split the dataset"
        )
    return directory


def check_members(members: Iterable[Member], directory: Directory, path: Path) -> Iterator[Member]:
    """Yields every member, folders included. Raises DatasetError: too many, a path outside of the archive, or a zip bomb."""
    size, total = path.stat().st_size, 0
    spans: list[tuple[int, int]] = []
    for count, member in enumerate(members, 1):
        check_count(count)
        _check_member(member, path)
        total += member.size
        if total > 2**30 and total > MAX_RATIO * size:
            raise DatasetError(
                f"{path.name} is refused: its {size:,} bytes would grow to {total:,} or more, over {MAX_RATIO} times as many"
            )
        spans.append((member.offset, member.offset + LOCAL_HEADER + member.packed))
        yield member
    spans.append((directory.start, directory.start))
    spans.sort()
    for (_, end), (start, _) in pairwise(spans):
        if end > start:
            raise DatasetError(f"{path.name} is refused: its members overlap, as those of a zip bomb do; pack it again")


def _is_utf8(raw: bytes) -> bool:
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True


def _renamed(member: Member, encoding: str, path: Path) -> Member:
    """Decodes the name; all names of a zip have one encoding, even if the bytes of some are valid UTF-8. Raises DatasetError."""
    if not member.raw:
        return member
    try:
        named = member._replace(filename=member.raw.decode(encoding))
    except UnicodeError:
        raise DatasetError(
            f"{path.name}: a name in it cannot be read as {encoding}; it reads {described([member.raw[:100]])}: correct the encoding",
            "encoding",
        ) from None
    check_name(named.filename, path)
    return named


def check_growth(name: str, packed: int, size: int) -> None:
    """Raises DatasetError where `packed` bytes expand to suspiciously many."""
    if (size > 16 * 2**20 and size > MAX_MEMBER_RATIO * max(1, packed)) or (size > 2**30 and size > MAX_RATIO * packed):
        raise DatasetError(f"{printable(name)[:200]} is refused: its {packed:,} bytes would grow to {size:,}")


def check_count(files: int) -> None:
    """Raises DatasetError for more files than a dataset may have."""
    if files > MAX_FILES:
        raise DatasetError(f"the dataset has more than {MAX_FILES:,} files; split it, or name a folder further down")


def check_name(filename: str, path: Path) -> None:
    """Raises DatasetError for a member whose path is outside of the archive."""
    name = filename.replace("\\", "/")
    if name.startswith("/") or ".." in name.split("/") or re.match(r"[A-Za-z]:", name):
        raise DatasetError(f"{path.name} is refused: its member {printable(filename)[:200]!r} would lie outside of it")


def _check_member(member: Member, path: Path) -> None:
    check_name(member.filename, path)
    if member.size > 16 * 2**20 and member.size > MAX_MEMBER_RATIO * max(1, member.packed):
        name = printable(member.filename.replace("\\", "/"))[:200]
        raise DatasetError(
            f"{path.name} is refused: {name!r} would grow from {member.packed:,} to {member.size:,} bytes"
        )


def printable(name: str) -> str:
    """Returns a file name with bytes that are not UTF-8 as escapes, so that it can be hashed and written as JSON."""
    return name.encode("utf-8", "backslashreplace").decode()


def main(path: Path) -> int:
    """Checks a file with limited memory, and returns the exit code."""
    os.nice(10)  # serving has priority
    resource.setrlimit(resource.RLIMIT_AS, (CHECK_BYTES, CHECK_BYTES))
    try:
        check(path)
    except DatasetError as error:
        sys.stdout.write(f"{error}\n")
        return 1
    except MemoryError:
        limit = f"{CHECK_BYTES >> 20} MB of memory"
        sys.stdout.write(f"{path.name} is refused: its table of contents takes more than {limit}; split the dataset\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
