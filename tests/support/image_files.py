"""Image files of every kind for the tests, made on the spot: sound ones by Pillow, odd and hostile ones by hand."""

import io
import struct
import zlib

import numpy as np
from PIL import Image
from torch import Tensor

from models.preprocessing import Preprocessing

IMAGENET = Preprocessing(resize=256, crop=224)
SMALL = Preprocessing(resize=32, crop=32)
GRAY = Preprocessing(resize=28, crop=28, channels=1, mean=(0.5,), std=(0.5,))
ORANGE = (200, 60, 20)


def save(image: Image.Image, file_format: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def solid(mode: str = "RGB", colour: object = ORANGE, size: tuple[int, int] = (40, 30)) -> Image.Image:
    return Image.new(mode, size, colour)  # type: ignore[arg-type]


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth shapes, an edge and fine texture: what the resizer's differences depend on."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / min(width, height)
    smooth = np.stack([np.sin(3 * x + c) * np.cos(4 * y - c) for c in range(3)], axis=2)
    pixels = 120 + 70 * smooth + 40 * (x + y > 1)[..., None] + rng.normal(0, 12, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def png(size: tuple[int, int], colour_type: int, bits: int, rows: bytes, interlaced: bool = False) -> bytes:
    """A PNG by hand, for what Pillow does not write."""
    header = struct.pack(">IIBBBBB", *size, bits, colour_type, 0, 0, interlaced)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks)


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def ycck() -> bytes:
    """A JPEG as Photoshop writes it: the YCbCr of CMY, and inverted K, with Adobe's transform flag at 2."""
    inverse = tuple(255 - value for value in ORANGE)
    y, cb, cr = solid(colour=inverse).convert("YCbCr").tobytes()[:3]
    data = save(solid("CMYK", (255 - y, 255 - cb, 255 - cr, 0)), "JPEG", quality=95)
    adobe = data.index(b"Adobe")
    return data[: adobe + 11] + b"\x02" + data[adobe + 12 :]


def gif(width: int, height: int) -> bytes:
    """A GIF of 43 bytes with such a first frame, to be disposed of to the background."""
    screen = b"GIF89a" + struct.pack("<HHBBB", 10, 10, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
    return screen + b"!\xf9\x04\x08\0\0\0\0," + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\x02\x02\x4c\x01\0;"


def webp(width: int, height: int) -> bytes:
    """An animated WebP whose canvas says this size."""
    data = bytearray(save(solid(), "WEBP", save_all=True, append_images=[solid(colour="blue")]))
    data[24:30] = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return bytes(data)


def avif(width: int, height: int) -> bytes:
    """An AVIF whose image says this size."""
    data = bytearray(save(solid(), "AVIF"))
    sides = data.index(b"ispe") + 8
    data[sides : sides + 8] = struct.pack(">II", width, height)
    return bytes(data)


def tiff(width: int, height: int) -> bytes:
    """A TIFF without pixels that says this size."""
    tags = [(256, width), (257, height), (258, 8), (259, 1), (262, 1), (273, 8), (278, height), (279, 1)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + entries + bytes(4)


def tiff_of(
    pixels: np.ndarray, photometric: int = 1, tags: dict[int, list[int]] | None = None, order: str = "<"
) -> bytes:
    """A TIFF of any layout, (height, width) or (height, width, bands); `tags` of 16 bits replace and add to what the array says.

    With 284: [2], in separate planes; with 259: [8], deflated.
    """
    layers = pixels[..., None] if pixels.ndim == 2 else pixels
    height, width, bands = layers.shape
    layers = layers.astype(f"{order}{pixels.dtype.str[1:]}")
    kind = {"u": 1, "i": 2, "f": 3, "c": 6}[pixels.dtype.kind]
    depth = pixels.dtype.itemsize * 8
    all_tags = {
        256: [width],
        257: [height],
        258: [depth] * bands,
        259: [1],
        262: [photometric],
        277: [bands],
        278: [height],
    }
    all_tags |= {339: [kind] * bands} | (tags or {})
    in_planes = all_tags.get(284) == [2]
    strips = [layers[..., band].tobytes() for band in range(bands)] if in_planes else [layers.tobytes()]
    strips = [zlib.compress(strip) if all_tags[259] == [8] else strip for strip in strips]
    all_tags |= {273: [0] * len(strips), 279: [len(strip) for strip in strips]}
    end = 8 + 2 + 12 * len(all_tags) + 4
    entries, values = b"", b""
    at = end + sum(4 * len(content) for content in all_tags.values())  # of the first strip, at least
    all_tags[273] = [at + sum(map(len, strips[:n])) for n in range(len(strips))]
    for tag, content in sorted(all_tags.items()):
        code, size = ("I", 4) if tag in (273, 279) else ("H", 3)
        packed = struct.pack(f"{order}{len(content)}{code}", *content)
        place = packed.ljust(4, b"\0") if len(packed) <= 4 else struct.pack(f"{order}I", end + len(values))
        entries += struct.pack(f"{order}HHI", tag, size, len(content)) + place
        values += packed if len(packed) > 4 else b""
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HIH", 42, 8, len(all_tags))
    return (head + entries + bytes(4) + values).ljust(at, b"\0") + b"".join(strips)


def transparent_palette() -> bytes:
    image = solid("P", 1)
    image.putpalette([0, 0, 0, 255, 0, 0])
    return save(image, transparency=1)


def jpeg_of_segments() -> bytes:
    data = save(solid(), "JPEG")
    return data[:2] + b"\xff\xfe\0\x02" * 200_000 + data[2:]


def png_of_chunks() -> bytes:
    data = save(solid())
    return data[:33] + png_chunk(b"teSt", b"") * 100_000 + data[33:]


def gif_of_blocks() -> bytes:
    data = gif(8, 8)
    return data[:19] + b"!\xfe" + b"\1x" * 200_000 + b"\0" + data[19:]


def jpeg_of_scans() -> bytes:
    data = save(solid("L", 9, (2000, 2000)), "JPEG", progressive=True)
    scan = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + scan * 400 + data[-2:]


def difference(one: Tensor, other: Tensor) -> tuple[float, int]:
    """Mean and maximum, of 255."""
    gap = (one.int() - other.int()).abs()
    return gap.float().mean().item(), int(gap.max())
