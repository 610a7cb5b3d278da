"""The files of a dataset in a tar archive, gzipped or not.

.tar.gz --unpacked once, bounded--> a temporary file, deleted at the end --TarFiles--> members, read in place
"""

import gzip
import io
import os
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, NamedTuple

from models.data.files import DAMAGED, LINKED, Files, relative_names
from models.errors import DatasetError
from models.files.zip_file import Window, check_count, check_growth, check_name

BLOCK = 2**20  # bytes unpacked at once
MAX_HEADER_BYTES = 2**14  # of one member, all its headers together; a long name takes 4 KiB
MAX_GLOBALS = 100  # keys of global headers, which tarfile copies for each member


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
    """Opens an archive. Raises DatasetError if it is damaged, a bomb, or has too many files or a name that leads outside; OSError if the
    disk is full."""
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


class _Entry(NamedTuple):
    """Position of a member's content in the unpacked archive, in bytes."""

    start: int
    size: int
    is_plain: bool  # a regular file that is not sparse
    is_link: bool  # a symbolic link; hard links are rare, and cannot be read either


class TarFiles(Files):
    """A tar archive. Links, pipes and devices are listed, but cannot be read."""

    def __init__(self, path: Path, content: IO[bytes]) -> None:
        self.label, self.closing = path.name, ExitStack()
        self._handle, total = content.fileno(), os.fstat(content.fileno()).st_size
        self._share = path.stat().st_size / max(1, total)  # of the bytes that are left when packed
        content.seek(0)
        self._members: dict[str, _Entry] = {}
        names: list[str] = []
        try:
            for member in _members_of(content):
                check_name(member.name, path)
                if member.size < 0 or (member.isreg() and member.size > total - member.offset_data):
                    raise tarfile.ReadError("a member ends behind the archive, or before it begins")
                names.append(f"{member.name}/" if member.isdir() else member.name)
                is_plain = member.isreg() and not member.issparse()
                self._members[names[-1]] = _Entry(member.offset_data, member.size, is_plain, member.issym())
                check_count(len(names))
        except (tarfile.TarError, ValueError, LookupError, OverflowError, EOFError) as error:
            raise DatasetError(f"{path.name} is damaged or cut off: copy or download it again") from error
        self._names, self.notes, self.ignored = relative_names(names)
        self.links = tuple(name for name in self._names if self._members[self._names[name]].is_link)

    @property
    def names(self) -> dict[str, str]:
        return self._names

    def open(self, file: str) -> IO[bytes]:
        entry = self._members.get(file)
        if entry is None:
            raise FileNotFoundError("there is no such file in the archive")
        if entry.is_link:
            raise OSError(LINKED)
        if not entry.is_plain:
            raise OSError("a hard link, a pipe or a device, and no regular file")
        return io.BufferedReader(Window(self._handle, entry.start, entry.size))

    def size(self, file: str) -> tuple[int, int]:
        size = self._members[file].size
        return size, int(size * self._share)


def _members_of(content: IO[bytes]) -> Iterator[tarfile.TarInfo]:
    """Yields every member, and keeps none. Raises ReadError if the headers of one are too large (long names, sparse maps)."""
    headers = _Headers(content)
    with tarfile.open(fileobj=headers, mode="r:") as archive:  # type: ignore[call-overload]
        while (member := archive.next()) is not None:
            yield member
            archive.members.clear()  # tarfile keeps every member, 1 KB each
            if len(archive.pax_headers) > MAX_GLOBALS:
                raise tarfile.ReadError("too many global headers")
            headers.left = MAX_HEADER_BYTES
        content.seek(archive.offset)  # tarfile ends silently at an invalid header
        if content.read(tarfile.BLOCKSIZE).strip(b"\0"):
            raise tarfile.ReadError("no header")


class _Headers:
    """The file that tarfile reads, with a limit on the bytes of one member's headers."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.seek, self.tell = file, file.seek, file.tell
        self.left = MAX_HEADER_BYTES

    def read(self, size: int) -> bytes:
        self.left -= size
        if self.left < 0:
            raise tarfile.ReadError(f"headers of more than {MAX_HEADER_BYTES} bytes")
        return self._file.read(size)
