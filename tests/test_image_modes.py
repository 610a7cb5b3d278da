"""Images of more than 8 bits: on which scale their values are."""

import logging

import numpy as np
import pytest
import torch
from PIL import Image
from support.image_files import SMALL, png, png_chunk, save, solid, tiff_of
from torch import Tensor

from models.errors import InvalidImage
from models.images import decoder_process, decoding
from models.images.decoding import Limits, decode
from models.images.modes import significant_bits
from models.preprocessing import Preprocessing

pytestmark = pytest.mark.system  # the decoder runs in a process of its own

WHOLE = Preprocessing(resize=64, crop=64)
TIFF = Limits(extra_formats=frozenset({"TIFF"}))


def ramp(largest: int, mode: str = "I;16") -> Image.Image:
    values = np.linspace(0, largest, 64 * 64).round().reshape(64, 64)
    return Image.fromarray(values.astype({"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]))


def declaring(data: bytes, bits: int) -> bytes:
    """With a chunk sBIT behind the header."""
    return data[:33] + png_chunk(b"sBIT", bytes([bits])) + data[33:]


def levels(pixels: Tensor) -> int:
    return len(set(pixels[0].flatten().tolist()))


@pytest.mark.parametrize(
    ("largest", "declared", "bits"),
    [
        pytest.param(0, 0, 8, id="black"),
        pytest.param(255, 0, 8, id="8 bits"),
        pytest.param(1023, 0, 10, id="10 bits"),
        pytest.param(1024, 0, 12, id="12 bits"),
        pytest.param(16383, 0, 14, id="14 bits"),
        pytest.param(65535, 0, 16, id="16 bits"),
        pytest.param(70_000, 0, 18, id="sums of frames"),
        pytest.param(2**32 - 1, 0, 32, id="32 bits"),
        pytest.param(300, 12, 12, id="a dark image of declared bits"),
        pytest.param(60000, 12, 16, id="declared bits that were scaled up"),
        pytest.param(2**40, 0, 41, id="floats without end"),
    ],
)
def test_significant_bits(largest: int, declared: int, bits: int) -> None:
    assert significant_bits(largest, declared) == bits


@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_the_bits_that_an_image_uses_become_256_grays(file_format: str, bits: int) -> None:
    pixels = decode(save(ramp(2**bits - 1), file_format), WHOLE, TIFF)
    assert levels(pixels) == 256
    assert (int(pixels.min()), int(pixels.max())) == (0, 255)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_integers_of_32_bits_and_floats_have_the_same_scales(mode: str) -> None:
    assert levels(decode(save(ramp(4095, mode), "TIFF"), WHOLE, TIFF)) == 256
    assert levels(decode(save(ramp(100_000, mode), "TIFF"), WHOLE, TIFF)) > 64  # not 1 of 24 bits


def test_a_dark_image_that_declares_its_bits_stays_dark() -> None:
    dark = ramp(1000)
    assert decode(declaring(save(dark), 12), WHOLE).max() == 62
    assert decode(save(dark), WHOLE).max() == 249
    assert decode(save(dark, "TIFF", tiffinfo={341: 4095}), WHOLE, TIFF).max() == 62


def test_the_scale_is_of_the_whole_image_and_not_of_what_is_shown() -> None:
    values = np.full((64, 200), 200, np.uint16)
    values[:, :4] = 4095  # beside the crop
    assert decode(save(Image.fromarray(values)), WHOLE).max() == 12


# 16-bit colour

COLOUR_TYPES = {2: 4, 3: 2, 4: 6}  # of a PNG, by channels
ADAM7 = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]


def colour_ramp(largest: int, channels: int, alpha: int = 0) -> np.ndarray:
    """(64, 64, channels); of 2 and 4 channels the last is transparency."""
    ramp = np.linspace(0, largest, 64 * 64).round().astype(np.uint16).reshape(64, 64)
    colours = [ramp, ramp[::-1], ramp.T][: channels - (channels in (2, 4))]
    return np.stack([*colours, np.full_like(ramp, alpha)][:channels], axis=2)


def deep_png(pixels: np.ndarray, interlaced: bool = False, chunks: bytes = b"") -> bytes:
    passes = [pixels[y::down, x::across] for y, x, down, across in ADAM7] if interlaced else [pixels]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for part in passes for row in part)
    data = png(pixels.shape[1::-1], COLOUR_TYPES[pixels.shape[2]], 16, rows, interlaced)
    return data[:33] + chunks + data[33:]


def eight_bits(pixels: np.ndarray, bits: int) -> Tensor:
    """The colours of these values on the scale of so many bits."""
    colours = pixels[..., : 1 if pixels.shape[2] < 3 else 3].astype(float) * 255 / (2**bits - 1)
    return torch.from_numpy(np.broadcast_to(colours.round(), (64, 64, 3)).astype(np.uint8)).permute(2, 0, 1)


@pytest.mark.parametrize("outside", [False, True])
@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("channels", [2, 3, 4])
@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_16_bit_colour_has_the_scale_of_the_bits_that_it_uses(
    bits: int, channels: int, interlaced: bool, outside: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if outside:
        monkeypatch.setattr("models.images.decoding.UNINTERRUPTED", {"PNG": 1})
    for alpha in (65535, 2**bits - 1):
        pixels = colour_ramp(2**bits - 1, channels, alpha)
        seen = decode(deep_png(pixels, interlaced), WHOLE)
        assert (seen.int() - eight_bits(pixels, bits).int()).abs().max() <= (bits == 16)


@pytest.mark.parametrize("compression", [1, 8])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("channels", [3, 4])
def test_16_bit_colour_of_a_tiff(channels: int, order: str, compression: int) -> None:
    pixels = colour_ramp(4095, channels, 65535)
    tags = {259: [compression]} | ({338: [2]} if channels == 4 else {})
    assert torch.equal(decode(tiff_of(pixels, 2, tags, order), WHOLE, TIFF), eight_bits(pixels, 12))


def test_16_bit_colour_that_declares_its_bits_stays_dark() -> None:
    pixels = colour_ramp(1000, 3)
    assert decode(deep_png(pixels, chunks=png_chunk(b"sBIT", b"\x0c" * 3)), WHOLE).max() == 62
    assert decode(deep_png(pixels), WHOLE).max() == 249
    assert decode(tiff_of(pixels, 2, {281: [4095] * 3}), WHOLE, TIFF).max() == 62


@pytest.mark.parametrize("bits", [12, 16])
def test_the_transparent_colour_of_16_bits_is_compared_by_all_of_them(bits: int) -> None:
    pixels = np.full((64, 64, 3), 2**bits // 2 + 1, np.uint16)
    pixels[:, 32:] += 1  # not transparent
    pixels[0, 0] = 2**bits - 1
    chunk = png_chunk(b"tRNS", pixels[1, 0].astype(">u2").tobytes())
    seen = decode(deep_png(pixels, chunks=chunk), WHOLE)
    assert seen[:, 1:, :32].min() == 255
    assert abs(int(seen[0, 9, 50]) - 128) <= 1


def test_colours_multiplied_by_their_transparency_are_refused_where_they_use_fewer_bits() -> None:
    assert decode(tiff_of(colour_ramp(60000, 4, 65535), 2, {338: [1]}), WHOLE, TIFF).max() >= 233
    with pytest.raises(InvalidImage, match="16-bit colour that uses 12 bits, multiplied by its transparency"):
        decode(tiff_of(colour_ramp(4095, 4, 65535), 2, {338: [1]}), WHOLE, TIFF)


@pytest.mark.parametrize("orientation", [3, 6])
def test_16_bit_colour_is_upright(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = colour_ramp(4095, 3)
    turned = decode(deep_png(pixels, chunks=png_chunk(b"eXIf", exif.tobytes()[6:])), WHOLE)
    expected = torch.rot90(eight_bits(pixels, 12), 2 if orientation == 3 else -1, (1, 2))
    assert torch.equal(turned, expected)


def test_truncated_16_bit_colour_is_named() -> None:
    data = deep_png(np.random.default_rng(0).integers(0, 4096, (64, 64, 3), np.uint16))
    with pytest.raises(InvalidImage, match="truncated PNG"):
        decode(data[: len(data) // 2], WHOLE)


# Errors of our own


def test_an_error_of_our_own_concerns_one_image(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise KeyError("tiff")

    monkeypatch.setattr(decoding, "_sniff", fail)
    with pytest.raises(InvalidImage, match="the server's log says why"), caplog.at_level(logging.ERROR):
        decode(save(solid()), SMALL)
    assert "KeyError: 'tiff'" in caplog.text
    decoder_process.close()
