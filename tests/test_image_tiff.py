"""TIFFs by their tags: raw files of cameras, and layouts of samples that are read right or named."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from support.image_files import ORANGE, SMALL, save, solid, tiff_of

from models.errors import InvalidImage, UnsupportedImage
from models.images import decoder_process
from models.images.decoding import Limits, decode
from models.images.formats import described, format_of

pytestmark = pytest.mark.system  # the decoder runs in a process of its own

TIFF = Limits(extra_formats=frozenset({"TIFF"}))
RAMP = np.linspace(0, 1, 64 * 64).reshape(64, 64)
ORDERS = ["<", ">"]


@pytest.fixture(autouse=True, scope="module")
def ended() -> Iterator[None]:
    yield
    decoder_process.close()


def bands(count: int, dtype: str = "u1") -> np.ndarray:
    return np.full((40, 40, count), 50, dtype)


def made_by(maker: bytes, tags: dict[int, list[int]]) -> bytes:
    """A small picture with these tags; the name of its maker stands where a TIFF has a tag of text, here of 16 bits."""
    return tiff_of(bands(3), 2, {271: list(maker), **tags})


# White is zero


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    "pixels",
    [
        pytest.param((RAMP * 255).round().astype("u1"), id="8 bits"),
        pytest.param((RAMP * 65535).round().astype("u2"), id="16 bits"),
        pytest.param((RAMP * 4095).round().astype("u2"), id="12 of 16 bits"),
        pytest.param(RAMP.astype("f4"), id="floats"),
    ],
)
@pytest.mark.parametrize("compression", [1, 8])
def test_white_is_zero(pixels: np.ndarray, order: str, compression: int) -> None:
    inverted = decode(tiff_of(pixels, 0, {259: [compression]}, order), SMALL, TIFF)
    plain = decode(tiff_of(pixels, 1, {259: [compression]}, order), SMALL, TIFF)
    assert (inverted.int() + plain.int() - 255).abs().max() <= 1


@pytest.mark.parametrize("order", ORDERS)
def test_unsigned_integers_of_32_bits_are_not_taken_for_negative(order: str) -> None:
    data = tiff_of(np.full((40, 40), 2**32 - 1, "u4"), order=order)
    if order == ">":
        with pytest.raises(InvalidImage, match=r"^TIFF of 1 band of 32 bits in big-endian order is not read"):
            decode(data, SMALL, TIFF)
    else:
        assert decode(data, SMALL, TIFF).min() == 255


# Values below black


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        pytest.param((RAMP * 4000 - 1024).astype("i2"), "negative values, down to -1024:", id="Hounsfield units"),
        pytest.param((RAMP * 4000 - 1024).astype("i4"), "negative values, down to -1024:", id="32 bits"),
        pytest.param((RAMP * 2 - 1).astype("f4"), "negative values, down to -1:", id="-1 to 1"),
        pytest.param(np.full((40, 40), -9999, "f4"), "negative values, down to -9999:", id="no data"),
        pytest.param((RAMP * 100 - 50).astype("i1"), "TIFF of 1 band of signed integers of 8 bits", id="8 bits"),
    ],
)
def test_negative_values_are_refused(pixels: np.ndarray, message: str) -> None:
    with pytest.raises(InvalidImage, match=message):
        decode(tiff_of(pixels), SMALL, TIFF)


@pytest.mark.parametrize(
    "pixels",
    [
        pytest.param((RAMP * 30000).astype("i2"), id="signed, and positive"),
        pytest.param(np.where(RAMP < 0.1, -0.001, RAMP).astype("f4"), id="what rounds to black"),
        pytest.param(np.where(RAMP < 0.1, np.nan, RAMP).astype("f4"), id="no number"),
    ],
)
def test_values_that_are_not_below_black_are_read(pixels: np.ndarray) -> None:
    assert decode(tiff_of(pixels), SMALL, TIFF).min() <= 1


@pytest.mark.parametrize("dtype", ["u2", "i2", "i4", "f4"])
def test_neither_order_nor_compression_changes_the_values(dtype: str) -> None:
    pixels = (RAMP * 4095).astype(dtype)
    plain = decode(tiff_of(pixels), SMALL, TIFF)
    for order, compression in [("<", 8), (">", 1), (">", 8)]:
        assert torch.equal(decode(tiff_of(pixels, 1, {259: [compression]}, order), SMALL, TIFF), plain)


# Layouts


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("pixels", "photometric", "tags", "layout"),
    [
        pytest.param(bands(4), 2, {338: [0]}, "4 bands of 8 bits, the fourth not declared as transp", id="near infrared"),
        pytest.param(bands(4), 2, {}, "4 bands of 8 bits, the fourth not declared as transparency,", id="no tag"),
        pytest.param(bands(4), 2, {338: [0], 284: [2]}, "4 bands of 8 bits, the fourth", id="planes of them"),
        pytest.param(bands(5), 2, {338: [0, 0]}, "5 bands of 8 bits", id="5 bands"),
        pytest.param(bands(6), 2, {338: [2, 0, 0]}, "6 bands of 8 bits", id="transparency and 2 more"),
        pytest.param(bands(8), 2, {338: [0] * 5}, "8 bands of 8 bits", id="8 bands"),
        pytest.param(bands(5, "u2"), 2, {338: [0, 0]}, "5 bands of 16 bits", id="5 bands of 16 bits"),
        pytest.param(bands(13, "u2"), 1, {338: [0] * 12}, "13 bands of 16 bits", id="Sentinel-2"),
        pytest.param(bands(2), 1, {338: [0]}, "2 bands of 8 bits", id="2 bands"),
        pytest.param(bands(3), 1, {338: [0, 0]}, "3 bands of 8 bits", id="3 bands of gray"),
        pytest.param(bands(2, "u2"), 1, {338: [2]}, "2 bands of 16 bits", id="16-bit gray with transparency"),
        pytest.param(bands(3, "u2"), 2, {284: [2]}, "3 bands of 16 bits in separate planes", id="planes of 16 bits"),
        pytest.param(bands(1, "f8"), 1, {}, "1 band of floats of 64 bits", id="doubles"),
        pytest.param(bands(1, "f2"), 1, {}, "1 band of floats of 16 bits", id="half floats"),
        pytest.param(bands(3, "f4"), 2, {}, "3 bands of floats of 32 bits", id="float RGB"),
        pytest.param(bands(1, "c8"), 1, {}, "1 band of numbers that are no integers or floats", id="complex"),
        pytest.param(bands(5), 5, {338: [0]}, "5 bands of 8 bits", id="CMYK and a spot colour"),
        pytest.param(bands(1), 4, {}, "1 band of 8 bits with photometric interpretation 4", id="mask"),
    ],
)  # fmt: skip
def test_a_layout_that_is_not_read_is_named(
    pixels: np.ndarray, photometric: int, tags: dict[int, list[int]], layout: str, order: str
) -> None:
    with pytest.raises(InvalidImage, match=f"^TIFF of {layout}.* is not read: save it as 8-bit RGB or gray$") as error:
        decode(tiff_of(pixels, photometric, tags, order), SMALL, TIFF)
    assert len(str(error.value)) < 200


@pytest.mark.parametrize(
    ("data", "message"),
    [
        pytest.param(b"MM\0+\0\x08\0\0" + bytes(200), "^big-endian BigTIFF is not read", id="big-endian BigTIFF"),
        pytest.param(tiff_of(bands(1), 1, {259: [34712]}), "^TIFF with JPEG 2000 inside", id="JPEG 2000"),
        pytest.param(tiff_of(bands(1), 1, {259: [50001]}), "^TIFF with WebP inside", id="WebP"),
        pytest.param(
            tiff_of(bands(3, "u2"), 2, {266: [2]}), r"^TIFF of 3 bands of 16 bits in reversed order", id="FillOrder"
        ),
        pytest.param(tiff_of(bands(1), 1, {259: [60000]}), "^TIFF with compression 60000 inside", id="unknown"),
        pytest.param(tiff_of(bands(3), 2, {254: [1], 330: [8]}), "^TIFF whose first page is a thumb", id="thumbnail"),
        pytest.param(tiff_of(bands(3), 2, {262: []}), "^TIFF without the tag Photometric", id="no value"),
    ],
)
def test_other_tiffs_that_are_not_read(data: bytes, message: str) -> None:
    with pytest.raises(InvalidImage, match=message):
        decode(data, SMALL, TIFF)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("colour", "photometric", "tags", "shown"),
    [
        pytest.param(ORANGE, 2, {}, ORANGE, id="RGB"),
        pytest.param(ORANGE, 2, {284: [2]}, ORANGE, id="planes"),
        pytest.param((*ORANGE, 255), 2, {338: [2]}, ORANGE, id="transparency"),
        pytest.param((*ORANGE, 0), 2, {338: [2]}, (255, 255, 255), id="all transparent"),
        pytest.param((100, 30, 10, 128), 2, {338: [1]}, (227, 157, 137), id="multiplied by it"),
        pytest.param((55, 195, 235, 0), 5, {}, ORANGE, id="CMYK"),
        pytest.param((90, 255), 1, {338: [2]}, (90, 90, 90), id="gray with transparency"),
    ],
)
def test_what_is_read(
    colour: tuple[int, ...], photometric: int, tags: dict[int, list[int]], shown: tuple[int, ...], order: str
) -> None:
    pixels = np.broadcast_to(np.array(colour, "u1"), (40, 40, len(colour)))
    seen = decode(tiff_of(pixels, photometric, tags, order), SMALL, TIFF)[:, 16, 16]
    assert np.abs(seen.numpy().astype(int) - shown).max() <= 1


# Raw files of cameras


@pytest.mark.parametrize(
    ("data", "name"),
    [
        pytest.param(made_by(b"", {50706: [1, 4, 0, 0]}), "a camera raw file (DNG)", id="dng"),
        pytest.param(made_by(b"NIKON CORPORATION", {254: [1], 330: [8]}), "a camera raw file (Nikon NEF)", id="nef"),
        pytest.param(made_by(b"SONY", {254: [1], 330: [8]}), "a camera raw file (Sony ARW)", id="arw"),
        pytest.param(made_by(b"PENTAX", {259: [65535]}), "a camera raw file (Pentax PEF)", id="pef"),
        pytest.param(made_by(b"Canon", {262: [32803]}), "a camera raw file (Canon)", id="by its filters"),
        pytest.param(made_by(b"Nobody", {262: [34892]}), "a camera raw file; export", id="unknown maker"),
        pytest.param(b"II*\0\x10\0\0\0CR\x02\0" + bytes(99), "a camera raw file (Canon CR2)", id="cr2"),
    ],
)
def test_a_raw_file_is_no_tiff(data: bytes, name: str) -> None:
    assert format_of(data) is None
    assert described(data).startswith(name)
    with pytest.raises(UnsupportedImage, match=r"a camera raw file.*export it as JPEG"):
        decode(data, SMALL, TIFF)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(made_by(b"NIKON CORPORATION", {}), id="exported from a raw file"),
        pytest.param(tiff_of(np.full((40, 40), 0xC612, "u2")), id="pixels like the tag of DNG"),
        pytest.param(tiff_of(np.full((40, 40), 0xC612, "u2"), order=">"), id="in the other order"),
        pytest.param(save(solid(), "TIFF", software="SONY Imaging Edge"), id="a maker's program"),
        pytest.param(tiff_of(bands(3), 2, {254: [1]}), id="one page that calls itself small"),
    ],
)
def test_a_tiff_is_no_raw_file(data: bytes) -> None:
    assert described(data).startswith("a TIFF image")
    assert decode(data, SMALL, TIFF).shape == (3, 32, 32)


def test_no_damaged_byte_of_a_header_does_harm() -> None:
    data = tiff_of(bands(3, "u2"), 2)
    for at in range(4, 200):
        for change in (0xFF, 0x01):
            broken = bytes(data[:at]) + bytes([data[at] ^ change]) + bytes(data[at + 1 :])
            try:
                decode(broken, SMALL, Limits(max_pixels=10_000, extra_formats=TIFF.extra_formats))
            except Exception as error:
                assert getattr(error, "code", "") != "", repr(error)  # noqa: PT017
                assert "server's log" not in str(error)  # noqa: PT017
