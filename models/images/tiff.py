"""Reads the tags of a TIFF's first page: whether it is a camera's raw file, a layout that is not read, and what Pillow must be told.

Pillow drops bands that it does not use, and says of most other layouts only that it cannot identify the file.
"""

import sys
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from PIL.TiffImagePlugin import COMPRESSION_INFO, OPEN_INFO

from models.errors import InvalidImage
from models.images.modes import Samples

STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
BIG_STARTS = STARTS[2:]
MAX_ENTRIES, MAX_VALUES = 4096, 64  # that are read; a photograph has 20 tags of at most 6 values
# Bytes of a value by its type, without the types of fractions.
VALUE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 6: 1, 8: 2, 9: 4, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
FLOATS = (11, 12)

SUBFILE, BITS, COMPRESSION, PHOTOMETRIC, FILL_ORDER, MAKE, BANDS, PLANAR = 254, 258, 259, 262, 266, 271, 277, 284
MAX_VALUE, SUB_PAGES, EXTRA_SAMPLES, SAMPLE_FORMAT, MAX_SAMPLE, DNG_VERSION = 281, 330, 338, 339, 341, 50706
WANTED = {SUBFILE, BITS, COMPRESSION, PHOTOMETRIC, FILL_ORDER, MAKE, BANDS, PLANAR}
WANTED |= {MAX_VALUE, SUB_PAGES, EXTRA_SAMPLES, SAMPLE_FORMAT, MAX_SAMPLE, DNG_VERSION}

WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, YCBCR = 0, 1, 2, 6
COLOURS = {RGB: 3, 5: 4, YCBCR: 3, 8: 3}  # bands, by photometric interpretation; 5 is CMYK, 8 CIELAB
ALPHA = (1, 2, 999)  # in EXTRA_SAMPLES: multiplied into the colours, plain, and as CorelDRAW 10 writes it
UNSIGNED, SIGNED, FLOAT = 1, 2, 3
OLD_JPEG = 6
LAYOUTS: dict[Any, tuple[str, str]] = OPEN_INFO  # that Pillow knows: its mode and raw mode
# What libtiff has decompressed is in this machine's order, which Pillow knows of unsigned integers only.
NATIVE = {"F;32BF": "F;32NF", "I;16BS": "I;16NS", "I;32BS": "I;32NS"}
COMPRESSIONS = {
    33003: "JPEG 2000",
    33005: "JPEG 2000",
    34661: "JBIG",
    34712: "JPEG 2000",
    34887: "LERC",
    34934: "JPEG XR",
    50001: "WebP",  # Pillow knows of it, its libtiff does not
    50002: "JPEG XL",
}

# What only a camera's sensor writes: the pattern of its colour filters, unprocessed colours, and the makers' own compressions.
RAW_PHOTOMETRIC = {32803, 34892}
RAW_COMPRESSION = {32767, 32769, 32770, 34713, 65000, 65535}
MAKERS = (
    (b"NIKON", "Nikon NEF"),
    (b"SONY", "Sony ARW"),
    (b"CANON", "Canon"),
    (b"PENTAX", "Pentax PEF"),
    (b"RICOH", "Pentax PEF"),
    (b"SAMSUNG", "Samsung SRW"),
    (b"OLYMPUS", "Olympus ORF"),
    (b"PANASONIC", "Panasonic"),
    (b"LEICA", "Leica"),
    (b"HASSELBLAD", "Hasselblad 3FR"),
    (b"PHASE ONE", "Phase One IIQ"),
    (b"KODAK", "Kodak"),
    (b"EASTMAN KODAK", "Kodak"),
    (b"SEIKO EPSON", "Epson ERF"),
    (b"MAMIYA", "Mamiya MEF"),
)  # fmt: skip
CR2 = b"\x10\0\0\0CR\x02\0"  # behind the first 4 bytes

AS_RGB = "save it as 8-bit RGB or gray"


@dataclass(frozen=True)
class Page:
    """The tags of a first page. `at`: the position of the lowest byte of each first value. `more`: whether another page follows."""

    big_endian: bool
    tags: dict[int, tuple[int, ...]] = field(default_factory=dict)
    at: dict[int, int] = field(default_factory=dict)
    more: bool = False

    def one(self, tag: int, default: int) -> int:
        values = self.tags.get(tag, ())
        return values[0] if values else default

    @property
    def photometric(self) -> int:
        return YCBCR if self.one(COMPRESSION, 1) == OLD_JPEG else self.one(PHOTOMETRIC, WHITE_IS_ZERO)

    @property
    def bits(self) -> tuple[int, ...]:
        """Returns the bits of each band."""
        jpeg = self.one(COMPRESSION, 1) == OLD_JPEG and self.photometric in (RGB, YCBCR)
        bands = max(1, min(self.one(BANDS, 3 if jpeg else 1), MAX_VALUES))
        bits = self.tags.get(BITS) or (1,)
        return (bits * bands if len(bits) == 1 else bits)[:bands]

    @property
    def sample_format(self) -> tuple[int, ...]:
        formats = self.tags.get(SAMPLE_FORMAT) or (UNSIGNED,)
        return formats[:1] if len(set(formats)) == 1 else formats

    @property
    def has_alpha(self) -> bool:
        return self.one(EXTRA_SAMPLES, 0) in ALPHA

    @property
    def is_thumbnail(self) -> bool:
        """Whether the first page is a smaller copy of another, as cameras write it."""
        return bool(self.one(SUBFILE, 0) & 1) and (self.more or SUB_PAGES in self.tags)


def first_page(data: bytes) -> Page | None:
    """Reads the first page; returns None if its tags are not in `data`, which may be only the beginning of a file."""
    if not data.startswith(STARTS):
        return None
    order: Literal["little", "big"] = "little" if data[:1] == b"I" else "big"

    def number(at: int, size: int) -> int:
        return int.from_bytes(data[at : at + size], order)

    wide = data.startswith(BIG_STARTS)
    word, head, step = (8, 8, 20) if wide else (4, 2, 12)  # bytes of an offset, of the number of tags, and of a tag
    start = number(8 if wide else 4, word)
    entries = number(start, head)
    end = start + head + entries * step
    if not 0 < entries <= MAX_ENTRIES or end > len(data):
        return None
    page = Page(order == "big", more=number(end, word) != 0)
    for at in range(start + head, end, step):
        tag, kind = number(at, 2), number(at + 2, 2)
        size = VALUE_BYTES.get(kind, 0)
        if tag in WANTED and size:
            count, value_at = number(at + 4, word), at + 4 + word
            first = value_at if count * size <= word else number(value_at, word)
            places = range(first, first + size * min(count, MAX_VALUES), size)
            page.tags[tag] = tuple(
                _float(data[i : i + size], order) if kind in FLOATS else number(i, size) for i in places
            )
            page.at[tag] = first + (size - 1 if order == "big" else 0)
    return page


def _float(data: bytes, order: str) -> int:
    """Rounds a float of 4 or 8 bytes, 0 if it is not a number: such tags state a largest value."""
    value = (
        np.frombuffer(data, f"{'<' if order == 'little' else '>'}f{len(data)}") if len(data) in (4, 8) else np.zeros(1)
    )
    return int(np.nan_to_num(value, posinf=0, neginf=0)[0])


def camera(data: bytes) -> str | None:
    """Returns the kind of a camera's raw file that is built like a TIFF, empty if its maker is not known; None for other files.

    Its first page is often a thumbnail, which a reader of TIFFs would take for the picture.
    """
    if data.startswith(CR2, 4):
        return "Canon CR2"
    if not (page := first_page(data)):
        return None
    if DNG_VERSION in page.tags:
        return "DNG"
    is_raw = page.photometric in RAW_PHOTOMETRIC or page.one(COMPRESSION, 1) in RAW_COMPRESSION
    make = bytes(byte & 255 for byte in page.tags.get(MAKE, ())).upper().strip(b" \0")
    maker = next((name for start, name in MAKERS if make.startswith(start)), "")
    return maker if is_raw or (maker and page.is_thumbnail) else None


def reading(data: bytes) -> tuple[bytes, Samples]:
    """Returns the bytes for Pillow, and what its samples mean. Raises InvalidImage for what would be read wrongly, or not at all."""
    if data.startswith(b"MM\0+"):
        raise InvalidImage("big-endian BigTIFF is not read: save it as PNG or as an ordinary TIFF")
    page = first_page(data)
    if page is None:  # Pillow finds it damaged
        return data, Samples()
    _check(page)
    photometric, depth = page.photometric, page.bits[0]
    inverted = photometric == WHITE_IS_ZERO and depth > 8
    if inverted:  # Pillow inverts up to 8 bits only, and has no such layout for all others
        at = page.at[PHOTOMETRIC]
        data = data[:at] + bytes([BLACK_IS_ZERO]) + data[at + 1 :]
    return data, Samples(
        declared=_declared_bits(page),
        white_is_zero=inverted,
        unsigned=page.sample_format[0] == UNSIGNED,
        raw_mode=NATIVE.get(LAYOUTS[_pillow_key(page)][1]) if page.one(COMPRESSION, 1) != 1 else None,
        low_bytes=_low_bytes(page) if photometric == RGB and depth == 16 else None,
        multiplied=page.one(EXTRA_SAMPLES, 0) == 1,
    )


def _declared_bits(page: Page) -> int:
    """Returns the used bits by SMaxSampleValue, MaxSampleValue, or BitsPerSample below 16; 0 if none says."""
    depth, declared = page.bits[0], page.one(MAX_SAMPLE, page.one(MAX_VALUE, 0)).bit_length()
    return declared if 0 < declared <= depth else depth if depth < 16 else 0


def _low_bytes(page: Page) -> str:
    """Returns the raw mode that reads the other byte of each sample. Uncompressed samples are in the file's byte order, others in this
    machine's."""
    big_endian = page.big_endian if page.one(COMPRESSION, 1) == 1 else sys.byteorder == "big"
    return ("RGB" if len(page.bits) == 3 else "RGBA") + (";16L" if big_endian else ";16B")


def _check(page: Page) -> None:
    if page.is_thumbnail:
        raise InvalidImage("TIFF whose first page is a thumbnail of another: save that page alone, as PNG or TIFF")
    compression = page.one(COMPRESSION, 1)
    if compression in COMPRESSIONS or compression not in COMPRESSION_INFO:
        name = COMPRESSIONS.get(compression, f"compression {compression}")
        raise InvalidImage(f"TIFF with {name} inside is not read: save it uncompressed or with LZW")
    if not page.tags.get(PHOTOMETRIC) and compression != OLD_JPEG:
        raise InvalidImage("TIFF without the tag PhotometricInterpretation, which says what 0 means: save it again")
    if not _is_read(page):
        raise InvalidImage(f"TIFF of {_layout(page)} is not read: {AS_RGB}")


def _pillow_key(page: Page) -> tuple[object, ...]:
    photometric = BLACK_IS_ZERO if page.photometric == WHITE_IS_ZERO and page.bits[0] > 8 else page.photometric
    extra = page.tags.get(EXTRA_SAMPLES, ())
    order = b"MM" if page.big_endian else b"II"
    return order, photometric, page.sample_format, page.one(FILL_ORDER, 1), page.bits, extra


def _is_read(page: Page) -> bool:
    """Whether Pillow knows the layout and uses all its bands."""
    bits, kinds, extra = page.bits, page.sample_format, page.tags.get(EXTRA_SAMPLES, ())
    photometric = page.photometric
    if _pillow_key(page) not in LAYOUTS:
        return False
    if len(bits) > COLOURS.get(photometric, 1) and (len(extra) != 1 or extra[0] not in ALPHA):
        return False
    in_planes = page.one(PLANAR, 1) == 2 and len(bits) > 1
    if in_planes and (bits[0] > 8 or photometric == YCBCR):  # Pillow takes their bytes for samples
        return False
    return kinds != (SIGNED,) or bits[0] > 8  # of 8 bits, Pillow takes -1 for 255


def _layout(page: Page) -> str:
    """Describes the layout: `5 bands of 16 bits`."""
    bits, kind, photometric = page.bits, page.sample_format[0], page.photometric
    depth = str(bits[0]) if len(set(bits)) == 1 else ", ".join(map(str, bits[:8]))
    numbers = {SIGNED: "signed integers of {} bits", FLOAT: "floats of {} bits"}.get(kind, "{} bits").format(depth)
    if kind > FLOAT:
        numbers = f"numbers that are no integers or floats (sample format {kind})"
    text = f"{len(bits)} {'band' if len(bits) == 1 else 'bands'} of {numbers}"
    if len(bits) == 4 and photometric == RGB and not page.has_alpha:
        text += ", the fourth not declared as transparency,"
    if page.one(PLANAR, 1) == 2 and len(bits) > 1:
        text += " in separate planes"
    if photometric not in (WHITE_IS_ZERO, BLACK_IS_ZERO, 3, *COLOURS):
        text += f" with photometric interpretation {photometric}"
    if page.one(FILL_ORDER, 1) == 2:
        text += " in reversed order (FillOrder 2)"
    return f"{text} in big-endian order" if page.big_endian and bits[0] > 8 and len(bits) == 1 else text
