"""The central directory of a zip, read member by member; its claims are bounded before they are used.

file --find_directory--> number and size that the end record claims --read_directory--> Member, one at a time

`zipfile` parses the whole directory before its entries can be counted. https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT
"""

import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

END = struct.Struct("<4s4H2LH")
END_64 = struct.Struct("<4sQ2H2L4Q")
LOCATOR = struct.Struct("<4sLQL")
ENTRY = struct.Struct("<4s6H3L5H2L")
MAX_COMMENT = 2**16
UTF8_FLAG = 0x800
UNICODE_PATH = 0x7075
CODE_PAGE = "cp437"  # of names without the flag, by the specification


class Directory(NamedTuple):
    """The place of the central directory, as the end record claims."""

    start: int
    size: int
    entries: int
    shift: int  # bytes before the archive, as in a self-extracting program


class Member(NamedTuple):
    """One entry. Its sizes are claims."""

    filename: str
    raw: (
        bytes  # the bytes of the name where its encoding is unknown: not ASCII, without flag or extra field; else empty
    )
    flags: int
    method: int
    crc: int
    packed: int  # bytes in the archive
    size: int  # bytes of the content
    offset: int  # of its local header in the file
    is_link: bool = False  # a symbolic link, as `zip -y` packs it; its content is its target


def find_directory(file: BinaryIO) -> Directory:
    """Reads the end record, of zip64 too. Raises BadZipFile where there is none, or where it points outside the file."""
    length = file.seek(0, 2)
    tail_start = max(0, length - MAX_COMMENT - END.size)
    file.seek(tail_start)
    tail = file.read()
    at = tail.rfind(b"PK\5\6", 0, max(0, len(tail) - END.size + 4))
    if at < 0:
        raise zipfile.BadZipFile("it is not a zip file, or cut off")
    _, _, _, _, entries, size, offset, _ = END.unpack_from(tail, at)
    end = tail_start + at
    file.seek(max(0, end - LOCATOR.size - END_64.size))
    before = file.read(LOCATOR.size + END_64.size)
    if len(before) == LOCATOR.size + END_64.size and before[END_64.size :].startswith(b"PK\6\7"):
        magic, _, _, _, _, _, _, entries, size, offset = END_64.unpack_from(before)
        if magic != b"PK\6\6":
            raise zipfile.BadZipFile("its zip64 record is damaged")
        end -= LOCATOR.size + END_64.size
    if size > end or offset > end - size:
        raise zipfile.BadZipFile("its table of contents would lie outside the file")
    return Directory(end - size, size, entries, end - size - offset)


def read_directory(file: BinaryIO, directory: Directory) -> Iterator[Member]:
    """Yields every entry in the order of the table. Raises BadZipFile."""
    file.seek(directory.start)
    left = directory.size
    while left:
        head = file.read(min(ENTRY.size, left))
        if len(head) < ENTRY.size or not head.startswith(b"PK\1\2"):
            raise zipfile.BadZipFile("its table of contents is damaged")
        fields = ENTRY.unpack(head)
        flags, method, crc, packed, size = fields[3], fields[4], *fields[7:10]
        lengths, offset = fields[10:13], fields[16]
        rest = file.read(min(sum(lengths), left - ENTRY.size))
        if len(rest) < sum(lengths):
            raise zipfile.BadZipFile("its table of contents is cut off")
        left -= ENTRY.size + len(rest)
        name, extra = rest[: lengths[0]], rest[lengths[0] : lengths[0] + lengths[1]]
        size, packed, offset = _zip64(extra, size, packed, offset)
        if offset + directory.shift + packed > directory.start:
            raise zipfile.BadZipFile("a member would lie outside the file")
        filename, raw = _decoded(name, flags, extra)
        yield Member(
            filename, raw, flags, method, crc, packed, size, offset + directory.shift, _is_link(fields[1], fields[15])
        )


def _is_link(made_by: int, attributes: int) -> bool:
    """Returns whether the file mode that Unix and macOS write is that of a link."""
    return made_by >> 8 in (3, 19) and stat.S_ISLNK(attributes >> 16)


def _zip64(extra: bytes, *sizes: int) -> list[int]:
    """Returns the sizes, with 0xFFFFFFFF replaced by the values of the extra field 1. Raises BadZipFile."""
    found = list(sizes)
    for kind, data in _extra_fields(extra):
        if kind == 1:
            wide = [i for i, size in enumerate(found) if size == 0xFFFFFFFF]
            if len(data) < 8 * len(wide):
                raise zipfile.BadZipFile("its zip64 sizes are damaged")
            for i, (size,) in zip(wide, struct.iter_unpack("<Q", data[: 8 * len(wide)]), strict=True):
                found[i] = size
            break
    return found


def _extra_fields(extra: bytes) -> Iterator[tuple[int, bytes]]:
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<HH", extra)
        yield kind, extra[4 : 4 + length]
        extra = extra[4 + length :]


def _decoded(name: bytes, flags: int, extra: bytes) -> tuple[str, bytes]:
    """Returns a name, decoded as UTF-8 or else by CODE_PAGE, and its bytes where the encoding is not stated."""
    short = name.partition(b"\0")[0]
    if (spelled := _unicode_path(extra, name)) is not None:
        return spelled, b""
    try:
        return short.decode(), b"" if flags & UTF8_FLAG or short.isascii() else short
    except UnicodeDecodeError:
        return short.decode(CODE_PAGE), short


def _unicode_path(extra: bytes, name: bytes) -> str | None:
    """Returns the UTF-8 name in the extra field 0x7075 of Info-ZIP, if its CRC is that of the name in the table."""
    for kind, data in _extra_fields(extra):
        if kind == UNICODE_PATH and data[:1] == b"\1" and data[1:5] == zlib.crc32(name).to_bytes(4, "little"):
            try:
                return data[5:].partition(b"\0")[0].decode() or None
            except UnicodeDecodeError:
                return None
    return None
