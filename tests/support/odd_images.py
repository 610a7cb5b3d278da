"""Odd, broken and hostile image files, more than a hundred kinds, the same at every run; each with the statuses that it may get.

What can be judged has one status. What depends on how forgiving a decoder is has several, never a 5xx.
"""

import gzip
import io
import random
import struct
import zipfile
import zlib
from dataclasses import dataclass

from PIL import Image

from support.image_files import (
    ORANGE,
    gif,
    gif_of_blocks,
    jpeg_of_scans,
    jpeg_of_segments,
    photo,
    png,
    png_chunk,
    png_of_chunks,
    save,
    solid,
    transparent_palette,
    webp,
    ycck,
)

OK, TOO_LARGE, NO_IMAGE, BROKEN = {200}, {413}, {415}, {422}
REFUSED = NO_IMAGE | BROKEN
ANY = OK | REFUSED
NOISE = random.Random(0).randbytes(4096)
ORIENTATION = 0x0112


@dataclass(frozen=True)
class Odd:
    """A file, and what the server may say of it."""

    name: str
    data: bytes
    statuses: set[int]


def odd_images() -> list[Odd]:
    kinds = [
        (sound(), OK),
        (strips(), OK),
        (oriented(), OK),
        (two_in_one(), OK),
        (bombs(), TOO_LARGE),
        (other_files(), NO_IMAGE),
        (nothing_in_it(), REFUSED),
        (cut_off(), BROKEN),
        (broken(), BROKEN),
        (costly(), BROKEN),
        (doubtful(), ANY),
    ]
    return [Odd(name, data, statuses) for files, statuses in kinds for name, data in files.items()]


def sound() -> dict[str, bytes]:
    deep = png((2, 1), 2, 16, b"\0" + 2 * bytes.fromhex("c8003c001400"))
    interlaced = png((2, 2), 2, 8, 2 * (b"\0" + bytes(ORANGE)) + b"\0" + 2 * bytes(ORANGE), True)
    frames = [solid(colour=(0, 0, shade % 256)) for shade in range(500)]
    return {
        "jpeg": save(photo(60, 40), "JPEG"),
        "progressive": save(photo(60, 40), "JPEG", progressive=True),
        "gray jpeg": save(photo(60, 40).convert("L"), "JPEG"),
        "cmyk": save(solid("CMYK", (55, 195, 235, 0)), "JPEG"),
        "ycck": ycck(),
        "mpo": save(solid(), "MPO", save_all=True, append_images=frames[:2]),
        "webp": save(photo(60, 40), "WEBP"),
        "lossless webp": save(photo(60, 40), "WEBP", lossless=True),
        "transparent webp": save(solid("RGBA", (*ORANGE, 0)), "WEBP"),
        "500 frames of gif": save(solid(), "GIF", save_all=True, append_images=frames),
        "20 frames of webp": save(solid(), "WEBP", save_all=True, append_images=frames[:20]),
        "20 frames of png": save(solid(), "PNG", save_all=True, append_images=frames[:20]),
        "bmp": save(solid(), "BMP"),
        "bmp upside down": upside_down(save(solid(), "BMP")),
        "1-bit bmp": save(solid("1", 1), "BMP"),
        "palette bmp": save(solid().convert("P"), "BMP"),
        "1-bit png": save(solid("1", 1)),
        "gray png": save(solid("L", 90)),
        "gray and alpha": save(solid("LA", (90, 128))),
        "palette": save(solid().convert("P", palette=Image.Palette.ADAPTIVE)),
        "transparent palette": transparent_palette(),
        "transparent colour": save(solid(), transparency=ORANGE),
        "rgba": save(solid("RGBA", (*ORANGE, 128))),
        "16-bit gray": save(solid("I;16", 32768)),
        "16-bit rgb": deep,
        "adam7": interlaced,
        "swapped profile": save(solid(), "JPEG", icc_profile=NOISE),
        "profile without end": save(solid(), icc_profile=b"\xff" * 128),
    }


def strips() -> dict[str, bytes]:
    sizes = [(1, 1), (1, 3), (2, 1), (3, 1), (65500, 1), (1, 65500), (32, 64031)]
    return {f"{w} x {h} {kind}": save(solid(size=(w, h)), kind) for w, h in sizes for kind in ("PNG", "GIF", "JPEG")}


def oriented() -> dict[str, bytes]:
    def turned(orientation: int) -> bytes:
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        return save(photo(61, 40), "JPEG", exif=exif)

    large = Image.Exif()
    large[0x010E] = "x" * 60_000  # its description
    files = {f"orientation {value}": turned(value) for value in range(10)}
    return files | {
        "60 KB of EXIF": save(photo(61, 40), "JPEG", exif=large),
        "EXIF that is none": save(photo(61, 40), "JPEG", exif=b"Exif\0\0nonsense"),
        "EXIF cut off": save(photo(61, 40), "WEBP", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01"),
    }


def two_in_one() -> dict[str, bytes]:
    page, jpeg = b"<html><script>alert(1)</script></html>", save(photo(60, 40), "JPEG")
    archive = io.BytesIO()
    zipfile.ZipFile(archive, "w").close()
    return {
        "html in a jpeg's comment": jpeg[:2] + b"\xff\xfe" + struct.pack(">H", len(page) + 2) + page + jpeg[2:],
        "pdf behind a jpeg": jpeg + b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\n",
        "zip behind a png": save(solid()) + archive.getvalue(),
        "gzip behind a gif": save(solid(), "GIF") + gzip.compress(page, mtime=0),
        "php in a png's text": save(solid())[:33]
        + png_chunk(b"tEXt", b"a\0<?php system($_GET[0]);")
        + save(solid())[33:],
    }


def bombs() -> dict[str, bytes]:
    return {
        "png of 20000 x 20000": png((20000, 20000), 0, 1, bytes(2501)),
        "png of 2^31": png((2**31 - 1, 2**31 - 1), 2, 8, b""),
        "jpeg of 65500 x 65500": jpeg_saying(65500, 65500),
        "gif of 13000 x 13000": gif(13000, 13000),
        "webp of 13000 x 13000": webp(13000, 13000),
        "bmp of 2^31": bmp_saying(2**31 - 1, 9),
        "bmp of 40000 x 40000": bmp_saying(40000, 40000),
    }


def other_files() -> dict[str, bytes]:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as writer:
        writer.writestr(zipfile.ZipInfo("cat.jpg"), save(solid(), "JPEG"))
    return {
        "text": b"hello",
        "html": b"<!doctype html><img src=x>",
        "noise": NOISE,
        "zip": archive.getvalue(),
        "gzip": gzip.compress(save(solid()), mtime=0),
        "program": b"MZ\x90\0" + bytes(60) + b"PE\0\0" + NOISE,
        "elf": b"\x7fELF\x02\x01\x01" + NOISE,
        "mp3": b"ID3\x04\0\0\0\0\0\x23" + NOISE,
        "mp3 without a tag": b"\xff\xfb\x90\x44" + NOISE,
        "wav": b"RIFF\x24\0\0\0WAVEfmt " + NOISE,
        "mp4": b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom" + NOISE,
        "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        "pdf": b"%PDF-1.7\n" + save(solid(), "JPEG"),
        "psd": b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 9, 9, 8, 3) + bytes(400),
        "fits": b"SIMPLE  =                    T".ljust(2880),
        "heic": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + NOISE,
        "tiff": save(solid(), "TIFF"),
        "tiff of two pages": save(solid(), "TIFF", save_all=True, append_images=[solid()]),
        "avif": save(solid(), "AVIF"),
        "jpeg 2000": save(solid(), "JPEG2000"),
        "ico": save(solid(), "ICO"),
        "ppm": save(solid(), "PPM"),
        "tga": save(solid(), "TGA"),
        "pcx": save(solid(), "PCX"),
    }


def nothing_in_it() -> dict[str, bytes]:
    sizes = [(0, 0), (0, 9), (9, 0)]
    files = {f"png of {w} x {h}": png((w, h), 2, 8, b"") for w, h in sizes}
    files |= {f"jpeg of {w} x {h}": jpeg_saying(w, h) for w, h in sizes}
    files |= {f"gif of {w} x {h}": gif(w, h) for w, h in sizes}
    files |= {f"bmp of {w} x {h}": bmp_saying(w, h) for w, h in sizes}
    heads = {"jpeg": b"\xff\xd8\xff", "png": b"\x89PNG\r\n\x1a\n", "gif": b"GIF89a", "webp": b"RIFF\4\0\0\0WEBP"}
    return files | {f"head of a {name}": head for name, head in heads.items()}


def cut_off() -> dict[str, bytes]:
    kinds = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
    return {f"{kind} cut off": (data := save(photo(60, 40), kind))[: len(data) // 2] for kind in kinds}


def broken() -> dict[str, bytes]:
    whole, head = save(solid()), save(solid())[:33]
    jpeg = save(photo(60, 40), "JPEG")
    tables = jpeg.index(b"\xff\xc4") + 5
    return {
        "impossible huffman codes": jpeg[:tables] + b"\xff" * 16 + jpeg[tables + 16 :],
        "arithmetic coding without its tables": jpeg.replace(b"\xff\xc0", b"\xff\xc9", 1).replace(
            b"\xff\xc4", b"\xff\xcc"
        ),
        "jpeg of 12 bits": jpeg.replace(b"\xff\xc0\0\x11\x08", b"\xff\xc1\0\x11\x0c", 1),
        "png header with a wrong checksum": whole[:29] + b"\0\0\0\0" + whole[33:],
        "garbage for pixels": head + png_chunk(b"IDAT", NOISE) + png_chunk(b"IEND", b""),
        "png without pixels": head + png_chunk(b"IEND", b""),
        "png with too few pixels": png((40, 30), 2, 8, bytes(500)),
        "png of colour type 5": png((2, 2), 5, 8, bytes(20)),
        "gif without a frame": save(solid(), "GIF")[:13] + b";",
        "bmp of 3 bits": save(solid(), "BMP")[:28] + b"\3" + save(solid(), "BMP")[29:],
        "bmp of unknown compression": save(solid(), "BMP")[:30] + b"\x63" + save(solid(), "BMP")[31:],
        "webp of noise": b"RIFF"
        + struct.pack("<I", len(NOISE) + 12)
        + b"WEBPVP8 "
        + struct.pack("<I", len(NOISE))
        + NOISE,
    }


def costly() -> dict[str, bytes]:
    """Small files that a careless reader would spend seconds or gigabytes on."""
    head, rest = save(solid())[:33], save(solid())[33:]
    packed = zlib.compress(bytes(2**25))
    megabyte = png_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**20 - 1)))
    return {
        "text bomb": head + png_chunk(b"zTXt", b"a\0\0" + packed) + rest,
        "unicode text bomb": head + png_chunk(b"iTXt", b"a\0\1\0\0\0" + packed) + rest,
        "profile bomb": head + png_chunk(b"iCCP", b"a\0\0" + packed) + rest,
        "exif bomb": head + png_chunk(b"zTXt", b"Raw profile type exif\0\0" + packed) + rest,
        "a hundred texts": head + megabyte * 100 + rest,
        "jpeg of scans": jpeg_of_scans(),
        "jpeg of segments": jpeg_of_segments(),
        "png of chunks": png_of_chunks(),
        "gif of blocks": gif_of_blocks(),
    }


def doubtful() -> dict[str, bytes]:
    jpeg, whole, animated = save(photo(60, 40), "JPEG"), save(solid()), save(solid(), "GIF")
    scan = jpeg.rindex(b"\xff\xda") + 14
    return {
        "pixels with a wrong checksum": whole[:-20] + bytes(byte ^ 255 for byte in whole[-20:-12]) + whole[-12:],
        "noise in a jpeg's scan": jpeg[:scan] + NOISE[: len(jpeg) - scan - 2].replace(b"\xff", b"\0") + jpeg[-2:],
        "png with an unknown filter": png((2, 2), 2, 8, (b"\x09" + bytes(6)) * 2),
        "png with too many pixels": png((2, 2), 2, 8, bytes(5000)),
        "palette without colours": png((2, 2), 3, 8, bytes(6)),
        "gif that never ends": animated[:-1],
        "gif outside its screen": animated.replace(b",\0\0\0\0", b",\xff\0\xff\0", 1),
        "gif of a wrong code size": animated.replace(animated[-30:-29], b"\x0d", 1),
        "jpeg with two heads": jpeg[:2] + jpeg,
        "jpeg without an end": jpeg[:-2],
        "webp in a box too large": b"RIFF\xff\xff\xff\x7f" + save(solid(), "WEBP")[8:],
        "bmp with its pixels elsewhere": save(solid(), "BMP")[:10] + b"\xff\xff\xff\x7f" + save(solid(), "BMP")[14:],
    }


def jpeg_saying(width: int, height: int) -> bytes:
    data = bytearray(save(solid(), "JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def bmp_saying(width: int, height: int) -> bytes:
    return b"BM" + struct.pack("<IIIIiiHHIIIIII", 99, 0, 54, 40, width, height, 1, 24, *(0,) * 6)


def upside_down(bmp: bytes) -> bytes:
    (height,) = struct.unpack_from("<i", bmp, 22)
    return bmp[:22] + struct.pack("<i", -height) + bmp[26:]
