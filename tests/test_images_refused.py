"""Decoding what nobody should send: other formats, bombs, damage."""

import os
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from time import process_time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile
from support.image_files import (
    ORANGE,
    SMALL,
    difference,
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
    webp,
)

from models.errors import EmptyImage, ImageError, ImageTooLarge, InvalidImage, UnsupportedImage
from models.images.decoding import FORMATS, Limits, decode

# 415 and 422 are interchangeable for fuzzed files.
STATUS = {200: "ok", 413: "too large", 415: "refused", 422: "refused"}


def images_made() -> int:
    """How often Pillow has allocated pixels so far."""
    from PIL import _imaging

    count: int = _imaging.get_stats()["new_count"]
    return count


# What is refused


@pytest.mark.abuse("I1", "I17")
@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"hello", id="text"),
        pytest.param(b"BMW is a make of cars, and this is a text", id="text that begins like a bitmap"),
        pytest.param(b"<!doctype html><img src=x>", id="html"),
        pytest.param(b"<svg xmlns='http://www.w3.org/2000/svg'/>", id="svg"),
        pytest.param(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", id="eps"),
        pytest.param(b"%PDF-1.7\n", id="pdf"),
        pytest.param(b"8BPS\0\1" + bytes(60), id="psd"),
        pytest.param(b"SIMPLE  =                    T".ljust(2880), id="fits"),
        pytest.param(bytes(range(256)), id="random bytes"),
        pytest.param(b"MZ\x90\0" + bytes(60), id="program"),
        pytest.param(b"ID3\4" + bytes(60), id="mp3"),
        pytest.param(b"PK\3\4" + bytes(60), id="zip"),
        pytest.param(b"RIFF\x24\0\0\0WAVEfmt ", id="wav"),
        pytest.param(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", id="heic"),
        pytest.param(save(solid(), "TIFF"), id="tiff"),
        pytest.param(save(solid(), "AVIF"), id="avif"),
        pytest.param(save(solid(), "PPM"), id="ppm"),
        pytest.param(save(solid(), "ICO"), id="ico"),
        pytest.param(save(solid(), "JPEG2000"), id="jpeg 2000"),
    ],
)
def test_other_formats_never_reach_an_opener(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("an opener ran"))
    with pytest.raises(UnsupportedImage, match=r"^The file is .*\. Send JPEG, PNG, WebP, GIF or BMP\.$"):
        decode(data, SMALL)


@pytest.mark.parametrize("file_format", ["TIFF", "AVIF"])
def test_extra_formats(file_format: str) -> None:
    allowed = frozenset({file_format})
    pixels = decode(save(solid(), file_format), SMALL, Limits(extra_formats=allowed))
    assert difference(pixels, torch.tensor(ORANGE).view(3, 1, 1))[1] <= 6
    with pytest.raises(UnsupportedImage, match=f"Send JPEG, PNG, WebP, GIF, BMP or {file_format}"):
        decode(b"hello", SMALL, Limits(extra_formats=allowed))


@pytest.mark.abuse("I2")
def test_empty() -> None:
    with pytest.raises(EmptyImage, match="0 bytes"):
        decode(b"", SMALL)


@pytest.mark.abuse("I13")
@pytest.mark.parametrize(
    ("data", "limits", "message"),
    [
        pytest.param(
            save(solid()), Limits(max_bytes=50), r"has .* bytes; the limit is 50 \(IMAGO_MAX_IMAGE_MB\)", id="bytes"
        ),
        pytest.param(
            save(solid()),
            Limits(max_pixels=1000),
            r"1,200 pixels; the limit is 1,000 \(IMAGO_MAX_IMAGE_MEGAPIXELS\): send it",
            id="pixels",
        ),
        pytest.param(
            save(solid()), Limits(max_side=39), r"the limit is 39 pixels a side \(IMAGO_MAX_IMAGE_SIDE\)", id="side"
        ),
        pytest.param(png((20000, 20000), 0, 8, b""), Limits(), "400,000,000 pixels; the limit is 50,000,000", id="png"),
        pytest.param(png((10000, 9000), 0, 8, b""), Limits(), "10000 x 9000 is 90,000,000", id="png that warns"),
        pytest.param(gif(13000, 13000), Limits(), "13000 x 13000", id="gif"),
        pytest.param(webp(13000, 13000), Limits(), "13000 x 13000", id="webp"),
        pytest.param(
            b"BM" + struct.pack("<IIIIiiHHIIIIII", 99, 0, 54, 40, 2**31 - 1, 9, 1, 24, *(0,) * 6),
            Limits(),
            "limit",
            id="bmp",
        ),
    ],
)
def test_too_large_is_refused_before_pixels_are_allocated(data: bytes, limits: Limits, message: str) -> None:
    made = images_made()
    with pytest.raises(ImageTooLarge, match=message):
        decode(data, SMALL, limits)
    assert images_made() == made


@pytest.mark.abuse("I13")
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="VP8"),
        pytest.param({"lossless": True}, id="VP8L"),
        pytest.param({"exif": b"Exif\0\0"}, id="VP8X"),
    ],
)
def test_size_of_a_webp_is_checked_before_its_opener_runs(
    options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = save(photo(61, 40), "WEBP", **options)
    assert decode(data, SMALL, Limits(max_pixels=61 * 40, max_side=61)).shape == (3, 32, 32)
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("an opener ran"))
    with pytest.raises(ImageTooLarge, match="61 x 40 is 2,440 pixels"):
        decode(data, SMALL, Limits(max_pixels=61 * 40 - 1))


@pytest.mark.abuse("I13")
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_bomb_leaves_memory_behind() -> None:
    """With the allocator as the server sets it, what is touched once stays with the process: two canvases are 429 MB."""
    program = r"""
import re
from support.image_files import SMALL, avif, gif, save, solid, tiff, webp
from models.errors import ImageTooLarge
from models.images.decoding import EXTRA_FORMATS, Limits, decode
from models.runtime import tune_allocator

def resident():
    return int(re.search(r"VmRSS:\s+(\d+) kB", open("/proc/self/status").read())[1]) / 1024

tune_allocator()
decode(save(solid()), SMALL)
for bomb in (gif, webp, tiff, avif):
    before = resident()
    for _ in range(3):
        try:
            decode(bomb(7500, 7500), SMALL, Limits(extra_formats=frozenset(EXTRA_FORMATS)))
        except ImageTooLarge:
            print(bomb.__name__, resident() - before)
"""
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    environment = {**os.environ, "PYTHONPATH": paths}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    grown = [(name, float(megabytes)) for name, megabytes in map(str.split, run.stdout.splitlines())]
    assert len(grown) == 12
    assert max(megabytes for _, megabytes in grown) < 20, grown


def test_limit_beyond_the_ceiling_is_refused() -> None:
    with pytest.raises(ValueError, match="ceiling is 178,956,970"):
        Limits(max_pixels=200_000_000)


def test_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(Image.Image, "resize", fail)
    with pytest.raises(ImageTooLarge, match="not enough memory for this PNG"):
        decode(save(solid()), SMALL)


@pytest.mark.abuse("I15", "I16")
@pytest.mark.parametrize(
    ("build", "message"),
    [
        pytest.param(jpeg_of_segments, "too many pieces", id="jpeg of segments"),
        pytest.param(png_of_chunks, "too many pieces", id="png of chunks"),
        pytest.param(gif_of_blocks, "too many pieces", id="gif of blocks"),
        pytest.param(jpeg_of_scans, "too many scans", id="jpeg of scans"),
        pytest.param(
            lambda: save(solid())[:33] + png_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(9**8))), "header", id="text"
        ),
    ],
)
def test_small_files_cannot_cost_much(build: Callable[[], bytes], message: str) -> None:
    data = build()
    start = process_time()
    with pytest.raises(InvalidImage, match=message):
        decode(data, SMALL)
    assert process_time() - start < 2


# Damage


@pytest.mark.abuse("I3")
@pytest.mark.parametrize(
    ("file_format", "message"),
    [
        ("JPEG", "truncated JPEG: its image data breaks off after {} bytes"),
        ("PNG", "truncated PNG: its image data breaks off after {} bytes"),
        ("GIF", "truncated GIF: its image data breaks off after {} bytes"),
        ("WEBP", "truncated WebP: {} of {} bytes"),
        ("BMP", "truncated BMP: {} of {} bytes"),
    ],
)
def test_truncated_is_an_error_that_says_where(file_format: str, message: str) -> None:
    data = save(photo(40, 30), file_format)
    with pytest.raises(InvalidImage) as caught:
        decode(data[:-100], SMALL)
    assert str(caught.value) == message.format(len(data) - 100, len(data))
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


def outcome(data: bytes, extra_formats: frozenset[str] = frozenset()) -> str:
    """Nothing but an `ImageError` may come out, and its message shows nothing of the inside."""
    try:
        assert decode(data, SMALL, Limits(extra_formats=extra_formats)).shape == (3, 32, 32)
    except ImageTooLarge:
        return "too large"
    except ImageError as error:
        inside = [word for word in ("PIL", "object at", "<", "/", "_io") if word in str(error)]
        return f"shows {inside}" if inside else "refused"
    return "ok"


SMALL_FILES = [save(photo(16, 12), file_format) for file_format in (*FORMATS, "TIFF", "AVIF")]
EXTRA = frozenset({"TIFF", "AVIF"})


@pytest.mark.abuse("I3", "I19")
@pytest.mark.parametrize(
    "data", [pytest.param(data, id=name) for data, name in zip(SMALL_FILES, (*FORMATS, *EXTRA), strict=True)]
)
def test_cut_off_at_every_byte(data: bytes) -> None:
    outcomes = [outcome(data[:length], EXTRA) for length in range(1, len(data))]
    assert set(outcomes) <= set(STATUS.values())
    assert outcomes[0] == outcomes[len(data) // 3] == "refused"


@pytest.mark.abuse("I4", "I20")
@settings(max_examples=200, deadline=2000)
@given(st.sampled_from(SMALL_FILES), st.data())
def test_flipped_bytes(data: bytes, draw: st.DataObject) -> None:
    damaged = bytearray(data)
    for _ in range(draw.draw(st.integers(1, 4))):
        damaged[draw.draw(st.integers(0, len(data) - 1))] = draw.draw(st.integers(0, 255))
    assert outcome(bytes(damaged), EXTRA) in STATUS.values()


@pytest.mark.abuse("I4")
@pytest.mark.data
def test_odd_images(data_dir: Path) -> None:
    with zipfile.ZipFile(data_dir / "odd-images.zip") as archive:
        rows = [line.split("\t") for line in archive.read("index.tsv").decode().splitlines()[1:]]
        files = {row[0]: (archive.read(row[0]), STATUS[int(row[2])]) for row in rows}
    files["214.png"] = (files["214.png"][0], "ok")  # its EXIF is broken, its picture is not
    start = process_time()
    wrong = {name: got for name, (data, expected) in files.items() if (got := outcome(data)) != expected}
    assert not wrong
    assert process_time() - start < 20
