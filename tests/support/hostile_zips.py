"""Zips whose table of contents does not say what they hold."""

import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path


def claim(path: Path, prefix: str, **claims: int) -> Path:
    """Changes what the central directory says of the members whose names begin so: `size`, `packed`, `method`, `flags`, `offset`."""
    places = {"flags": (8, "<H"), "method": (10, "<H"), "packed": (20, "<L"), "size": (24, "<L"), "offset": (42, "<L")}
    content, at = bytearray(path.read_bytes()), 0
    while (at := content.find(b"PK\1\2", at)) >= 0:
        length = int.from_bytes(content[at + 28 : at + 30], "little")
        if content[at + 46 : at + 46 + length].startswith(prefix.encode()):
            for name, value in claims.items():
                struct.pack_into(places[name][1], content, at + places[name][0], value)
        at += 46
    path.write_bytes(content)
    return path


def packed(path: Path, files: Mapping[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def zeros(size: int, make: Callable[[], "zlib._Compress"] = lambda: zlib.compressobj(9, wbits=-15)) -> bytes:
    """So many zero bytes, compressed, without their ever being in memory."""
    compressor, block = make(), bytes(2**20)
    return b"".join(compressor.compress(block) for _ in range(size // len(block))) + compressor.flush()


def many_entries(path: Path, entries: int, claimed: int | None = None) -> Path:
    """A zip of nothing but a table of contents: so many times the same name; `claimed` is what its end record says."""
    entry = struct.pack("<4s6H3L5H2L", b"PK\1\2", 20, 20, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0) + b"a"
    with path.open("wb") as file:
        for _ in range(0, entries, 10_000):
            file.write(entry * min(10_000, entries))
        file.write(end_record(entries if claimed is None else claimed, len(entry) * entries))
    return path


def end_record(entries: int, size: int = 0) -> bytes:
    """The last bytes of a zip whose table of contents has so many entries, in so many bytes that precede."""
    end64 = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, entries, entries, size, 0)
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, size, 1)
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    return end64 + locator + end


def overlapping(path: Path, names: int) -> Path:
    """Every entry of the table is the same member."""
    content = zeros(2**20)
    local = struct.pack("<4s5H3L2H", b"PK\3\4", 20, 0, 8, 0, 0, 0, len(content), 2**20, 0, 0) + content
    table = b"".join(
        struct.pack("<4s6H3L5H2L", b"PK\1\2", 20, 20, 0, 8, 0, 0, 0, len(content), 2**20, len(name), 0, 0, 0, 0, 0, 0)
        + name
        for name in (f"ant/{i:04}.png".encode() for i in range(names))
    )
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, names, names, len(table), len(local), 0)
    path.write_bytes(local + table + end)
    return path
