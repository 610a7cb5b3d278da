"""Pixels of datasets that are not image files: read whole, and passed on as PNG files, the form that later stages expect.

packed file --read_exactly--> uint8 array in memory, or in a temporary file --png, one image at a time--> bytes
"""

import gzip
import itertools
import math
import os
import posixpath
import struct
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import IO, cast

import numpy as np
import numpy.typing as npt

from models.data.files import Files, opened
from models.data.samples import Read
from models.errors import DatasetError
from models.files.zip_file import check_count, check_growth, printable
from models.images.cost import DEFAULT_LIMITS

MAX_BYTES_IN_MEMORY = 2 * 2**30  # past this the pixels lie in a temporary file
MAX_NAMES = 256
BLOCK = 2**20  # bytes read at once
STORED = 65_535  # bytes of a block that deflate stores as they are

PixelArray = npt.NDArray[np.uint8]


def allocate(shape: tuple[int, ...]) -> PixelArray:
    """Returns zeros, in memory or, if large, in a temporary file that is deleted with the array. Raises OSError if the disk is full."""
    size = math.prod(shape)
    if size <= MAX_BYTES_IN_MEMORY:
        return np.zeros(shape, dtype=np.uint8)
    with tempfile.TemporaryFile() as file:
        try:
            _reserve(file.fileno(), size)  # writing through a map to a full disk would kill the process
        except OSError as error:
            folder = tempfile.gettempdir()
            raise OSError(error.errno, f"{error.strerror}: {size:,} bytes of pixels do not fit in {folder}") from error
        return np.memmap(file, dtype=np.uint8, mode="r+", shape=shape)


def _reserve(handle: int, size: int) -> None:
    if hasattr(os, "posix_fallocate"):  # macOS has none
        os.posix_fallocate(handle, 0, size)


@contextmanager
def unpacked(files: Files, name: str) -> Iterator[IO[bytes]]:
    """Opens the content of a file, gzipped or not: its first bytes decide. Raises DatasetError for a damaged one, also while it is read."""
    with opened(files, name) as packed:
        gzipped = packed.read(2) == b"\x1f\x8b"
    with opened(files, name) as packed:
        if not gzipped:
            yield packed
            return
        with gzip.GzipFile(fileobj=packed) as content:
            yield cast(IO[bytes], content)


def read_exactly(content: IO[bytes], shape: tuple[int, ...], files: Files, name: str) -> PixelArray:
    """Reads uint8 of the shape that a header promised, up to the end of the file. Allocates nothing that the file cannot hold.

    Raises DatasetError if the file is shorter or longer, or has too many images.
    """
    check_count(shape[0])
    size, packed = math.prod(shape), files.size(files.names[name])[1]
    check_growth(name, packed, size)
    array = allocate(shape)
    target, filled = array.reshape(-1), 0
    while filled < size and (block := content.read(min(BLOCK, size - filled))):
        target[filled : filled + len(block)] = np.frombuffer(block, dtype=np.uint8)
        filled += len(block)
    if filled < size or content.read(1):
        found = f"it ends after {filled:,}" if filled < size else "it is longer"
        raise DatasetError(
            f"{printable(name)} should have {size:,} bytes for {' x '.join(map(str, shape))}, and {found}: copy or download it again"
        )
    return array


def check_image(height: int, width: int, name: str) -> None:
    """Raises DatasetError for an image that a decoder would refuse."""
    if (
        height < 1
        or width < 1
        or height * width > DEFAULT_LIMITS.max_pixels
        or max(height, width) > DEFAULT_LIMITS.max_side
    ):
        raise DatasetError(
            f"{printable(name)} claims images of {height} x {width} pixels; the limits are 1 and {DEFAULT_LIMITS.max_pixels:,} pixels: "
            "download it again"
        )


def reader(arrays: Mapping[str, PixelArray]) -> Read:
    """Returns a function that reads `name[row]` of arrays (N, H, W) or (N, H, W, 3) as a PNG."""

    def read(file: str) -> bytes:
        name, _, row = file.removesuffix("]").rpartition("[")
        return png(arrays[name][int(row)])

    return read


def png(pixels: PixelArray) -> bytes:
    """Encodes uint8 (H, W) or (H, W, 3) as a PNG without compression, so that its bytes, and the hashes of them, depend on the pixels
    alone and not on the version of a library."""
    height, width = pixels.shape[:2]
    rows = np.zeros((height, 1 + pixels[0].size), dtype=np.uint8)  # each begins with its filter: none
    rows[:, 1:] = pixels.reshape(height, -1)
    colour_type = 0 if pixels.ndim == 2 else 2
    header = struct.pack(">IIBBBBB", width, height, 8, colour_type, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", _stored(rows.tobytes())) + _chunk(b"IEND", b"")
    )


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(content, zlib.crc32(kind)))


def _stored(data: bytes) -> bytes:
    """Returns a zlib stream of uncompressed blocks."""
    blocks = [data[start : start + STORED] for start in range(0, len(data), STORED)]
    last = [*itertools.repeat(0, len(blocks) - 1), 1]
    body = b"".join(
        struct.pack("<BHH", end, len(block), len(block) ^ 0xFFFF) + block
        for end, block in zip(last, blocks, strict=True)
    )
    return b"\x78\x01" + body + struct.pack(">I", zlib.adler32(data))


def names_beside(files: Files, folder: str, candidates: tuple[str, ...]) -> tuple[str, tuple[str, ...]] | None:
    """Finds the file of class names, one per line in the order of the labels, in the folder or the one above it; returns it with its
    content.

    Raises DatasetError for two equal names, or two candidates in one folder.
    """
    while True:
        there = [name for name in candidates if posixpath.join(folder, name) in files.names]
        if len(there) > 1:
            raise DatasetError(f"{' and '.join(there)} lie beside each other; keep the one that has the class names")
        if there:
            path = posixpath.join(folder, there[0])
            lines = tuple(line.strip() for line in files.text(path).splitlines() if line.strip())
            if len(lines) > MAX_NAMES:
                raise DatasetError(
                    f"{printable(path)} has {len(lines):,} lines; labels are bytes and have at most {MAX_NAMES} names"
                )
            if len(set(lines)) < len(lines):
                twice = next(line for line in lines if lines.count(line) > 1)
                raise DatasetError(f"{printable(path)} names {twice[:100]!r} twice; give each label a name of its own")
            return path, lines
        if not folder:
            return None
        folder = posixpath.dirname(folder)


def class_names(labels: PixelArray, names: tuple[str, ...] | None, file: str, names_file: str) -> list[str]:
    """Returns the name of each label (N,), or the label's number if there are no names. Raises DatasetError for a label without a name."""
    if names is None:
        return [str(label) for label in labels.tolist()]
    if len(labels) and int(labels.max()) >= len(names):
        row = int((labels >= len(names)).argmax())
        raise DatasetError(
            f"{printable(file)}: label {labels[row]} of image {row} has no name; {printable(names_file)} names {len(names)} classes, "
            f"0 to {len(names) - 1}: correct one of them"
        )
    return [names[label] for label in labels.tolist()]
