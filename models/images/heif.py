"""The size of a HEIF image (HEIC, as iPhones send it), read from its boxes before its library sees it.

libheif takes a whole file at once, so it runs in its own process (decoder_process.py); the limits are checked before, here.
"""

from importlib.util import find_spec

from models.errors import InvalidImage

MAX_BOXES = 64  # of the file itself; a photograph has three
EXTENTS = b"\0\0\0\x14ispe"  # a box of the width and height of one item: the image, a tile of it, a thumbnail


def is_installed() -> bool:
    return find_spec("pillow_heif") is not None


def size(data: bytes) -> tuple[int, int]:
    """Width and height, at most; of a grid those of the whole. Raises InvalidImage where the file names none."""
    meta = _meta(data)
    found: list[tuple[int, int]] = []
    at = meta.find(EXTENTS)
    while at != -1 and len(meta) >= at + 20:
        found.append((int.from_bytes(meta[at + 12 : at + 16], "big"), int.from_bytes(meta[at + 16 : at + 20], "big")))
        at = meta.find(EXTENTS, at + 20)
    if not found:
        raise InvalidImage("damaged HEIC: its header names no size")
    return max(width for width, _ in found), max(height for _, height in found)


def _meta(data: bytes) -> bytes:
    """The content of the box `meta`; empty where there is none."""
    at = 0
    for _ in range(MAX_BOXES):
        length, name, head = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8], 8
        if length == 1:
            length, head = int.from_bytes(data[at + 8 : at + 16], "big"), 16
        if length == 0:
            length = len(data) - at
        if name == b"meta":
            return data[at + head : at + length]
        at += max(length, head)
    return b""
