"""Reads from the header what decoding an image file will cost, before a pixel is allocated, and sets the limits.

Formats differ in what makes them expensive. A scan of a JPEG passes over all its pixels, even if it is 10 bytes long. The openers of WebP
and GIF allocate a canvas while they read the header. Every other format costs what its pixels cost: at 50 megapixels at most about 2 s of
CPU, for 16 bits per channel with transparency, and three times that if such colour uses fewer bits and is read twice.
"""

import math
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from io import BytesIO

from models.errors import ImageTooLarge, InvalidImage
from models.images import heif

PIXEL_CEILING = 2 * 89_478_485  # 716 MB, at 4 bytes a pixel
# Files of a dataset belong to the owner, so they may be larger than uploads: a camera's PNG of 24 megapixels has 40 MB.
TRAINING_BYTES = 64 * 2**20
FILE_BYTES = 256 * 2**20  # no more is read, whatever the setting
SMALLER = "send it smaller, or as a baseline JPEG, which is decoded at a reduced size"
IN_ONE_SCAN = "a progressive JPEG is kept whole in memory: send it smaller, or as a baseline JPEG"
MAX_READS = 100_000  # a photograph's header takes about 100; made of a million tiny segments, one would take 10 s
MAX_SEGMENTS = 20_000  # of a JPEG; a photograph has about 20
CHUNK = 4096  # bytes: a decoder asks for 64 KiB at a time, a header for less than this

# JPEG samples (pixels of one channel) that all scans of a file pass over: about 2 s of CPU. A photograph of 12 megapixels in ten scans
# has 100 million. With arithmetic coding a pass takes six times as long.
MAX_SCANNED = 700_000_000
ARITHMETIC = 6

# Pillow's openers of these allocate pixels while they read the header, so their sizes are read before: a GIF's first frame, two canvases
# of a WebP beside the image. The other openers, those of TIFF and AVIF included, allocate nothing so early.
# HEIF is not opened in this process at all.
EARLY = {"GIF": 1, "WEBP": 3, "HEIF": 0}


# Decoders that may read all their input in one call, which no deadline interrupts. From so many pixels on they run in a process that can
# be ended; below, a file takes at most 0.7 s.
UNINTERRUPTED = {"PNG": 16_000_000, "WEBP": 16_000_000}


Left = Callable[[], bool]  # true once nobody waits for the image


def waits() -> bool:
    return False


class NoRoom(Exception):
    """Raised by a `Hold` if so many pixels do not fit beside those that others hold; nothing was allocated."""

    def __init__(self, pixels: int) -> None:
        super().__init__(f"no room for {pixels:,} pixels now")
        self.pixels = pixels


class OutOfTime(Exception):
    """The deadline passed before the image was decoded."""


@dataclass(frozen=True)
class Limits:
    """Limits on images; others are refused before they cost anything. JPEG and GIF cannot have sides longer than 65,535.

    `max_pixels` counts decoded pixels: 1/64 of a large JPEG that is decoded at 1/8 of its size. `extra_formats`: a subset of
    `models.images.decoding.EXTRA_FORMATS`. All code that decodes shares one object, made from the settings.
    """

    max_bytes: int = 10 * 2**20
    max_pixels: int = 50_000_000
    max_side: int = 65_535
    extra_formats: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if self.max_pixels > PIXEL_CEILING:
            raise ValueError(f"max_pixels is {self.max_pixels:,}; the decoder's own ceiling is {PIXEL_CEILING:,}")

    def of_training(self) -> "Limits":
        """Returns the limits for files of a dataset, which may have more bytes."""
        return replace(self, max_bytes=min(max(self.max_bytes, TRAINING_BYTES), FILE_BYTES))

    def check_bytes(self, size: int) -> None:
        """Checks the size of a file. Raises ImageTooLarge."""
        if size > self.max_bytes:
            raise ImageTooLarge(f"the image has {size:,} bytes; the limit is {self.max_bytes:,} (IMAGO_MAX_IMAGE_MB)")

    def check(self, size: tuple[int, int], pixels: int | None = None, remedy: str = SMALLER) -> None:
        """Checks the size of an image. `pixels`: how many are decoded; None for all. Raises ImageTooLarge."""
        width, height = size
        pixels = width * height if pixels is None else pixels
        if pixels > self.max_pixels:
            raise ImageTooLarge(
                f"{width} x {height} is {pixels:,} pixels; the limit is {self.max_pixels:,} (IMAGO_MAX_IMAGE_MEGAPIXELS): {remedy}"
            )
        if max(size) > self.max_side:
            raise ImageTooLarge(
                f"the image is {width} x {height}; the limit is {self.max_side:,} pixels a side (IMAGO_MAX_IMAGE_SIDE)"
            )


DEFAULT_LIMITS = Limits()


class ImageBytes(BytesIO):
    """The bytes as a file that refuses too many small reads, and any read after a deadline (`time.monotonic()`).

    Decoders read at most 64 KiB at a time, so the deadline interrupts them.
    """

    reads = 0

    def __init__(self, data: bytes, deadline: float = math.inf, left: Left = waits) -> None:
        super().__init__(data)
        self.deadline, self.left = deadline, left

    def read(self, size: int | None = -1, /) -> bytes:
        self.reads += 1
        if self.reads > MAX_READS:
            raise InvalidImage(
                f"the image is cut into too many pieces: its first {self.tell():,} bytes take {MAX_READS:,} reads"
            )
        if size is None or not 0 <= size < CHUNK or self.reads % 256 == 0:
            self.check_time()
        return super().read(size)

    def check_time(self) -> None:
        """Raises OutOfTime after the deadline, or once the caller has left."""
        if time.monotonic() > self.deadline or self.left():
            raise OutOfTime


def size_before_opening(data: bytes, file_format: str) -> tuple[int, int] | None:
    """Returns the size that an opener of `EARLY` is about to allocate; None for other formats, which read the header first."""
    if file_format == "GIF":
        return _first_frame(ImageBytes(data))
    if file_format == "HEIF":
        return heif.size(data)
    return _webp_canvas(data) if file_format == "WEBP" else None


def _first_frame(file: BytesIO) -> tuple[int, int]:
    """Returns the right and bottom edge of a GIF's first frame, in pixels."""
    file.seek(10)
    flags = file.read(1)[0]
    file.seek(13 + (3 << (flags & 7) + 1 if flags & 128 else 0))
    while (block := file.read(1)) not in (b",", b";", b""):
        if block == b"!":
            file.read(1)
            while length := file.read(1)[0]:
                file.seek(length, 1)
    edges = file.read(8)
    left, top, width, height = (int.from_bytes(edges[i : i + 2], "little") for i in (0, 2, 4, 6))
    return left + width, top + height


def _webp_canvas(data: bytes) -> tuple[int, int]:
    """Returns width and height from the first chunk of a WebP."""

    def number(first: int, end: int) -> int:
        return int.from_bytes(data[first:end], "little")

    if data[12:16] == b"VP8X":
        return number(24, 27) + 1, number(27, 30) + 1
    if data[12:16] == b"VP8L":
        sides = number(21, 25)  # 14 bits each
        return (sides & 0x3FFF) + 1, (sides >> 14 & 0x3FFF) + 1
    return number(26, 28) & 0x3FFF, number(28, 30) & 0x3FFF  # the top two bits are a scale that nobody uses


# JPEG

# A marker: not a stuffed zero, a fill byte or a restart. libjpeg, too, looks for the next one wherever the segment before it ends.
_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]", re.DOTALL)
_WINDOW = 2**18  # bytes that are searched at a time, so that other threads get their turn

_LOSSLESS, _PROGRESSIVE, _ARITHMETIC, _FRAMES = {0xC3}, {0xC2, 0xCA}, {0xC9, 0xCA}, range(0xC0, 0xD0)
_NO_FRAMES = {0xC4, 0xC8, 0xCC}  # within that range, but tables
_SOS, _TEM, _ENDS = 0xDA, 0x01, {0xD8, 0xD9}


@dataclass(frozen=True)
class JpegCost:
    """The cost of a JPEG. `samples`: of all channels, 2 bytes each, that are in memory at full size whatever the scale; 0 if it is
    decoded row by row. `scanned`: samples that its scans pass over."""

    samples: int = 0
    scanned: int = 0
    lossless: bool = False


def jpeg_cost(data: bytes) -> JpegCost:
    """Returns the cost of a JPEG by its markers. Raises InvalidImage for more scans than its size may have, or too many segments.

    libjpeg decodes row by row if the first scan has all channels and is not progressive; it then refuses further scans. It reads every
    other file, baseline or not, whole into coefficients, in as many passes as it has scans.
    """
    pixels, scanned, kind = 0, 0.0, 0
    shares: dict[int, float] = {}  # of the pixels, by channel: 1/4 for chroma at half the resolution
    limit = math.inf
    for marker, content in _segments(data):
        if marker != _SOS:
            if shares:  # a second frame, which libjpeg refuses
                break
            kind, pixels, shares = marker, *_frame(content)
            limit = MAX_SCANNED / (ARITHMETIC if kind in _ARITHMETIC else 1)
        elif content:
            channels = content[1 : 1 + 2 * content[0] : 2]
            if not scanned and kind not in _PROGRESSIVE and content[0] == len(shares):
                return JpegCost(lossless=kind in _LOSSLESS)
            scanned += pixels * sum(shares.get(channel, 1.0) for channel in channels)
            if scanned > limit:
                raise InvalidImage(
                    f"a JPEG of {pixels:,} pixels in too many scans: they pass over more than {limit:,.0f} samples; "
                    "save it as baseline JPEG in one scan"
                )
    return JpegCost(math.ceil(pixels * sum(shares.values())), math.ceil(scanned), kind in _LOSSLESS)


def jpeg_frame(data: bytes) -> tuple[int, int] | None:
    """Returns the bits per sample and the number of channels, by the first frame header; None if there is none, or it is broken."""
    frame = next((content for marker, content in _segments(data) if marker != _SOS), b"")
    return (frame[0], frame[5]) if len(frame) > 5 else None


def _frame(content: bytes) -> tuple[int, dict[int, float]]:
    """Returns the pixels of a frame, and the share of them that each channel has."""
    pixels = int.from_bytes(content[1:3], "big") * int.from_bytes(content[3:5], "big")
    sampling: dict[int, tuple[int, int]] = {}
    for channel, factors in zip(content[6::3], content[7::3], strict=False):
        across, down = sampling.get(channel, (0, 0))  # two channels of one name count as the larger
        sampling[channel] = max(across, factors >> 4), max(down, factors & 15)
    most = max((a for a, _ in sampling.values()), default=1) * max((d for _, d in sampling.values()), default=1)
    return pixels, {channel: across * down / max(most, 1) for channel, (across, down) in sampling.items()}


def _segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yields marker and content of each frame and scan up to the end of the image. Skips tables, comments and entropy-coded data."""
    at = 2
    for _ in range(MAX_SEGMENTS):
        found = _MARKER.match(data, at)  # where the segment before it ends, in most files
        marker, at = (data[at + 1], at + 2) if found else _next_marker(data, at)
        if marker in _ENDS:  # libjpeg refuses a second beginning
            return
        if marker == _TEM:
            continue
        end = at + max(2, int.from_bytes(data[at : at + 2], "big"))
        if marker == _SOS or (marker in _FRAMES and marker not in _NO_FRAMES):
            yield marker, data[at + 2 : end]
        at = end
    raise InvalidImage(f"the image is cut into too many pieces: more than {MAX_SEGMENTS:,} segments")


def _next_marker(data: bytes, at: int) -> tuple[int, int]:
    """Returns the next marker from `at` on, and where its content begins; an end of the image if there is none."""
    while at < len(data):
        if found := _MARKER.search(data, at, at + _WINDOW):
            return data[found.end() - 1], found.end()
        at += _WINDOW - 1  # a marker may lie across
    return 0xD9, at
