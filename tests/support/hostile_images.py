"""Small image files that cost a decoder much, by hand: what Pillow does not write."""

import struct
import zlib
from collections.abc import Iterator

from PIL import Image

from support.image_files import png, png_chunk, save, solid

BASELINE, EXTENDED, PROGRESSIVE, ARITHMETIC, PROGRESSIVE_ARITHMETIC = 0xC0, 0xC1, 0xC2, 0xC9, 0xCA


def jpeg(
    size: tuple[int, int],
    scans: int,
    *,
    frame: int = BASELINE,
    channels: int = 3,
    sampling: int = 0x11,
    restart: int = 0,
    per_scan: int = 1,
    filler: bytes = b"",
    between: bytes = b"",
) -> bytes:
    """A JPEG in many empty scans of `per_scan` channels each; `filler` before each marker of a scan, `between` before each scan."""
    width, height = size
    tables = save(solid("L", 9, (16, 16)), "JPEG")
    kept = [s for s in _segments(tables) if s[1] in (0xDB, 0xC4)]
    parts = b"".join(struct.pack("BBB", n + 1, sampling if n == 0 else 0x11, 0) for n in range(channels))
    sof = struct.pack(">BHHB", 8, height, width, channels) + parts
    out = [b"\xff\xd8", *kept, segment(frame, sof)]
    if restart:
        out.append(segment(0xDD, struct.pack(">H", restart)))
    for n in range(scans):
        first = n % (channels - per_scan + 1)
        named = b"".join(bytes([first + k + 1, 0]) for k in range(per_scan))
        spectrum = _spectrum(frame, n)
        out += [between, filler, segment(0xDA, bytes([per_scan]) + named + spectrum)]
    return b"".join([*out, b"\xff\xd9"])


def _spectrum(frame: int, n: int) -> bytes:
    """The first scans of a progressive JPEG are of the DC coefficients, as they must be; those behind of all AC."""
    if frame not in (PROGRESSIVE, PROGRESSIVE_ARITHMETIC):
        return b"\x00\x3f\x00"
    return b"\x00\x00\x00" if n < 3 else b"\x01\x3f\x00"


def segment(marker: int, content: bytes) -> bytes:
    return b"\xff" + bytes([marker]) + struct.pack(">H", len(content) + 2) + content


def _segments(data: bytes) -> Iterator[bytes]:
    at = 2
    while data[at + 1] != 0xDA:
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        yield data[at:end]
        at = end


SIZE = (7000, 7000)  # 49 megapixels


def many_scans() -> dict[str, bytes]:
    """Every way to write a JPEG of 49 megapixels in thousands of scans: half a minute of CPU each, or more."""
    return {
        "baseline": jpeg(SIZE, 6000),
        "extended sequential": jpeg(SIZE, 6000, frame=EXTENDED),
        "progressive": jpeg(SIZE, 6000, frame=PROGRESSIVE),
        "arithmetic": jpeg(SIZE, 900, frame=ARITHMETIC),
        "progressive arithmetic": jpeg(SIZE, 900, frame=PROGRESSIVE_ARITHMETIC),
        "four channels": jpeg(SIZE, 6000, channels=4),
        "two channels a scan": jpeg(SIZE, 3000, per_scan=2),
        "subsampled": jpeg(SIZE, 6000, sampling=0x22),
        "restarts": jpeg(SIZE, 6000, restart=1),
        "fill bytes": jpeg(SIZE, 3000, filler=b"\xff" * 20),
        "junk between scans": jpeg(SIZE, 3000, filler=b"\x00\xff\x00\xff\xd3x"),
        "comments between scans": jpeg(SIZE, 3000, between=segment(0xFE, b"\xff\xd9")),
        "lines declared late": jpeg(SIZE, 3000, between=segment(0xDC, struct.pack(">H", 7000))),
        "a thumbnail before": jpeg(SIZE, 3000).replace(b"\xff\xd8", b"\xff\xd8" + segment(0xE1, jpeg((8, 8), 1)), 1),
    }


def at_the_limit() -> dict[str, bytes]:
    """What is still decoded of each format, at 49 megapixels and its dearest."""
    rows = {bits: b"\4" + bytes(7000 * bits // 2) for bits in (8, 16)}
    palette = Image.new("P", SIZE)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    return {
        "JPEG in 14 scans": jpeg(SIZE, 14),
        "arithmetic JPEG in two scans": jpeg(SIZE, 2, frame=ARITHMETIC),
        "progressive JPEG in 14 scans": jpeg(SIZE, 14, frame=PROGRESSIVE),
        "PNG of 16 bits": png(SIZE, 6, 16, rows[16] * 7000),
        "PNG of one bit": png(SIZE, 0, 1, bytes(876 * 7000)),
        "interlaced PNG": png(SIZE, 0, 1, bytes(900 * 7000), interlaced=True),
        "PNG with a transparent palette": save(palette, transparency=bytes(256)),
        "GIF": save(palette, "GIF", transparency=0),
        "BMP": _bmp_of_runs(),
        "WebP of 34 bytes": save(Image.new("RGBA", SIZE), "WEBP", lossless=True, method=0),
        "WebP": save(Image.new("RGBA", SIZE), "WEBP", method=0),
    }


def _bmp_of_runs() -> bytes:
    """RLE8 that jumps down 255 lines at a time."""
    body, head = b"\0\2\0\xff" * 40 + b"\0\1", 54 + 1024
    header = struct.pack("<IiiHHIIiiII", 40, *SIZE, 1, 8, 1, len(body), 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", head + len(body), 0, 0, head) + header + bytes(1024) + body


def png_of_zeros(megabytes: int) -> bytes:
    """IDAT that inflates to more than the image has."""
    packed = zlib.compress(bytes(megabytes * 2**20), 9)
    return save(solid())[:33] + png_chunk(b"IDAT", packed) + png_chunk(b"IEND", b"")


def tiff_of_one_strip(blocks: int, strips: int) -> bytes:
    """A TIFF of 16 x `strips` pixels whose strips are all the same bytes: `blocks` empty Deflate blocks before one row."""
    row = b"\x78\x01" + b"\0\0\0\xff\xff" * blocks + zlib.compress(bytes(16))[2:]
    places = 8 + len(row) + len(row) % 2
    tags = [(256, 16), (257, strips), (258, 8), (259, 8), (262, 1), (278, 1)]
    entries = [struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags]
    entries.insert(5, struct.pack("<HHII", 273, 4, strips, places))
    entries.append(struct.pack("<HHII", 279, 4, strips, places + 4 * strips))
    directory = struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)
    head = struct.pack("<2sHI", b"II", 42, places + 8 * strips)
    arrays = struct.pack("<I", 8) * strips + struct.pack("<I", len(row)) * strips
    return head + row + bytes(len(row) % 2) + arrays + directory
