"""A tar archive, gzipped or not, as the files of a dataset.

.tar.gz --unpack, once, bounded--> a temporary file that vanishes --TarFiles--> members, read in place
"""

import gzip
import io
import os
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

from models.archive import check_count, check_growth, check_name
from models.data.files import DAMAGED, Files, relative_names
from models.errors import DatasetError

BLOCK = 2**20  # bytes unpacked at once
MAX_HEADER_BYTES = 2**14  # of one member; a long name takes 4 KiB


def is_tar(path: Path) -> bool:
    """Whether the content is a tar archive, or a gzipped one."""
    with path.open("rb") as file:
        gzipped = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        try:
            with gzip.GzipFile(fileobj=file) if gzipped else file as content:
                start = content.read(512)
        except DAMAGED:
            return False
    return start[257:262] == b"ustar"


@contextmanager
def open_tar(path: Path) -> Iterator["TarFiles"]:
    """Raises DatasetError: damaged, too many files, a name that leads outside, or a bomb. Raises OSError where the disk is full."""
    with path.open("rb") as packed, ExitStack() as closing:
        content: IO[bytes] = packed
        if packed.read(2) == b"\x1f\x8b":
            packed.seek(0)
            content = closing.enter_context(tempfile.TemporaryFile())
            _unpack(path, packed, content)
        yield TarFiles(path, content)


def _unpack(path: Path, packed: IO[bytes], target: IO[bytes]) -> None:
    size, unpacked = path.stat().st_size, 0
    try:
        with gzip.GzipFile(fileobj=packed) as source:
            while block := source.read(BLOCK):
                unpacked += len(block)
                check_growth(path.name, size, unpacked)
                target.write(block)
    except DAMAGED as error:
        raise DatasetError(f"{path.name} is damaged or cut off: copy or download it again") from error
    target.flush()


class TarFiles(Files):
    """Links, pipes and devices are there by their names, and cannot be read."""

    def __init__(self, path: Path, content: IO[bytes]) -> None:
        self.label, self.closing = path.name, ExitStack()
        self._handle, total = content.fileno(), os.fstat(content.fileno()).st_size
        self._share = path.stat().st_size / max(1, total)  # of the bytes that are left when packed
        content.seek(0)
        self._members: dict[str, tarfile.TarInfo] = {}
        try:
            with tarfile.open(fileobj=_Headers(content), mode="r:") as archive:  # type: ignore[call-overload]
                for count, member in enumerate(archive, 1):
                    check_count(count)
                    self._add(member, path, total)
                content.seek(archive.offset)  # tarfile ends without a word at a header that is none
                if content.read(tarfile.BLOCKSIZE).strip(b"\0"):
                    raise tarfile.ReadError("no header")
        except (tarfile.TarError, ValueError, LookupError, OverflowError, EOFError) as error:
            raise DatasetError(f"{path.name} is damaged or cut off: copy or download it again") from error
        self._names = relative_names(self._members)

    def _add(self, member: tarfile.TarInfo, path: Path, total: int) -> None:
        check_name(member.name, path)
        if member.size < 0 or (member.isreg() and member.size > total - member.offset_data):
            raise tarfile.ReadError("a member ends behind the archive, or before it begins")
        self._members[f"{member.name}/" if member.isdir() else member.name] = member

    @property
    def names(self) -> dict[str, str]:
        return self._names

    def open(self, file: str) -> IO[bytes]:
        member = self._members.get(file)
        if member is None:
            raise FileNotFoundError("there is no such file in the archive")
        if not member.isreg() or member.issparse():
            raise OSError("a link, a pipe or a device, and no regular file")
        return io.BufferedReader(_Window(self._handle, member.offset_data, member.size))

    def size(self, file: str) -> tuple[int, int]:
        size = self._members[file].size
        return size, int(size * self._share)


class _Headers:
    """The file as tarfile reads it: no header may be so long that it costs memory or time."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.seek, self.tell = file, file.seek, file.tell

    def read(self, size: int) -> bytes:
        if size > MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self._file.read(size)


class _Window(io.RawIOBase):
    """A part of a file, read by its descriptor: several threads may have one each."""

    def __init__(self, handle: int, start: int, size: int) -> None:
        self._handle, self._at, self._end = handle, start, start + size

    def readable(self) -> bool:
        return True

    def readinto(self, target: "bytearray | memoryview") -> int:  # type: ignore[override]
        data = os.pread(self._handle, min(len(target), self._end - self._at), self._at)
        target[: len(data)] = data
        self._at += len(data)
        return len(data)
