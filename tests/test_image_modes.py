"""Images of more than 8 bits: on which scale their values are."""

import logging
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from support.image_files import SMALL, save, solid
from torch import Tensor

from models.errors import InvalidImage
from models.images import decoder_process, decoding
from models.images.decoding import Limits, decode
from models.images.modes import significant_bits
from models.preprocessing import Preprocessing

WHOLE = Preprocessing(resize=64, crop=64)
TIFF = Limits(extra_formats=frozenset({"TIFF"}))


def ramp(largest: int, mode: str = "I;16") -> Image.Image:
    values = np.linspace(0, largest, 64 * 64).round().reshape(64, 64)
    return Image.fromarray(values.astype({"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]))


def declaring(png: bytes, bits: int) -> bytes:
    """With a chunk sBIT behind the header."""
    chunk = b"sBIT" + bytes([bits])
    return png[:33] + struct.pack(">I", 1) + chunk + struct.pack(">I", zlib.crc32(chunk)) + png[33:]


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
        pytest.param(300, 12, 12, id="a dark image of declared bits"),
        pytest.param(60000, 12, 16, id="declared bits that were scaled up"),
        pytest.param(2**40, 0, 41, id="floats without end"),
    ],
)
def test_significant_bits(largest: int, declared: int, bits: int) -> None:
    assert significant_bits(largest, declared) == bits


@pytest.mark.system
@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_the_bits_that_an_image_uses_become_256_grays(file_format: str, bits: int) -> None:
    pixels = decode(save(ramp(2**bits - 1), file_format), WHOLE, TIFF)
    assert levels(pixels) == 256
    assert (int(pixels.min()), int(pixels.max())) == (0, 255)


@pytest.mark.system
@pytest.mark.parametrize("mode", ["I", "F"])
def test_integers_of_32_bits_and_floats_have_the_same_scales(mode: str) -> None:
    assert levels(decode(save(ramp(4095, mode), "TIFF"), WHOLE, TIFF)) == 256


@pytest.mark.system
def test_a_dark_image_that_declares_its_bits_stays_dark() -> None:
    dark = ramp(1000)
    assert decode(declaring(save(dark), 12), WHOLE).max() == 62
    assert decode(save(dark), WHOLE).max() == 249
    assert decode(save(dark, "TIFF", tiffinfo={341: 4095}), WHOLE, TIFF).max() == 62


def test_the_scale_is_of_the_whole_image_and_not_of_what_is_shown() -> None:
    values = np.full((64, 200), 200, np.uint16)
    values[:, :4] = 4095  # beside the crop
    assert decode(save(Image.fromarray(values)), WHOLE).max() == 12


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
