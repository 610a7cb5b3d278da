"""Reads the size of a HEIF image (HEIC, as iPhones send it) from its boxes, before libheif sees it.

libheif reads a whole file in one call, so it runs in a separate process (decoder_process.py); the limits are checked before, here.
"""

from collections.abc import Iterator
from importlib.util import find_spec

from models.errors import InvalidImage

MAX_BOXES = 64  # of the file itself; a photograph has three
EXTENTS = b"\0\0\0\x14ispe"  # a box of the width and height of one item: the image, a tile of it, a thumbnail


def is_installed() -> bool:
    return find_spec("pillow_heif") is not None


def size(data: bytes) -> tuple[int, int]:
    """Returns an upper bound of width and height; for a grid those of the whole. Raises InvalidImage if the file has none."""
    meta = _meta(data)
    found: list[tuple[int, int]] = []
    at = meta.find(EXTENTS)
    while at != -1 and len(meta) >= at + 20:
        found.append((int.from_bytes(meta[at + 12 : at + 16], "big"), int.from_bytes(meta[at + 16 : at + 20], "big")))
        at = meta.find(EXTENTS, at + 20)
    if len(data) < (end := end_of_boxes(data)):
        raise InvalidImage(f"truncated HEIC: {len(data)} of at least {end} bytes")
    if not found:
        raise InvalidImage("damaged HEIC: its header names no size")
    return max(width for width, _ in found), max(height for _, height in found)


def end_of_boxes(data: bytes) -> int:
    """Returns the length of an ISO box file (HEIC, AVIF) by its boxes. It exceeds the length of `data` if the file is cut off."""
    return max((end for _, _, end in _boxes(data)), default=0)


def _meta(data: bytes) -> bytes:
    """Returns the content of the box `meta`; empty if there is none."""
    return next((data[begin:end] for name, begin, end in _boxes(data) if name == b"meta"), b"")


def _boxes(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yields the name of each top-level box, and where its content begins and ends."""
    at = 0
    for _ in range(MAX_BOXES):
        if at + 8 > len(data):
            return
        length, name, head = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8], 8
        if length == 1:
            length, head = int.from_bytes(data[at + 8 : at + 16], "big"), 16
        if length == 0:
            length = len(data) - at
        end = at + max(length, head)
        yield name, at + head, end
        at = end
