from io import BytesIO

import numpy as np
import pytest
from PIL import Image
from support.image_files import tiff_of

from models.images.kinds import image_kind


@pytest.mark.parametrize(
    ("mode", "file_format", "kind"),
    [
        pytest.param("RGB", "JPEG", "8-bit colour", id="photograph"),
        pytest.param("L", "JPEG", "8-bit gray", id="gray JPEG"),
        pytest.param("CMYK", "JPEG", "8-bit CMYK", id="print"),
        pytest.param("RGB", "PNG", "8-bit colour", id="PNG"),
        pytest.param("I;16", "PNG", "16-bit gray", id="16 bits"),
        pytest.param("1", "PNG", "1-bit gray", id="one bit"),
        pytest.param("RGBA", "PNG", "8-bit colour with transparency", id="transparent PNG"),
        pytest.param("RGBA", "WEBP", "8-bit colour with transparency", id="transparent WebP"),
        pytest.param("RGB", "WEBP", "8-bit colour", id="WebP"),
        pytest.param("P", "GIF", "8-bit palette", id="GIF"),
        pytest.param("L", "BMP", "8-bit gray", id="BMP"),
        pytest.param("I;16", "TIFF", "16-bit gray", id="TIFF"),
        pytest.param("RGBA", "TIFF", "8-bit colour with transparency", id="transparent TIFF"),
        pytest.param("RGB", "AVIF", "8-bit colour", id="AVIF"),
        pytest.param("RGBA", "AVIF", "8-bit colour with transparency", id="transparent AVIF"),
    ],
)
def test_depth_and_channels_from_the_header(mode: str, file_format: str, kind: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (8, 8, 4), dtype=np.uint8)
    image = (
        Image.fromarray(pixels[:, :, 0].astype(np.uint16)) if mode == "I;16" else Image.fromarray(pixels).convert(mode)
    )
    buffer = BytesIO()
    image.save(buffer, file_format)
    assert image_kind(buffer.getvalue()) == kind


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        pytest.param(tiff_of(np.zeros((8, 8, 3), "u2"), 2), "16-bit colour", id="16-bit RGB"),
        pytest.param(tiff_of(np.zeros((8, 8, 4), "u1"), 5), "8-bit CMYK", id="CMYK"),
        pytest.param(tiff_of(np.zeros((8, 4), "u1"), 0, {256: [8], 258: [4]}), "4-bit gray", id="4 bits"),
        pytest.param(tiff_of(np.zeros((8, 8), "f4")), "32-bit gray", id="floats"),
    ],
)
def test_tiffs_by_their_tags(data: bytes, kind: str) -> None:
    assert image_kind(data) == kind


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_heic_by_its_boxes(mode: str) -> None:
    pillow_heif = pytest.importorskip("pillow_heif")
    buffer = BytesIO()
    pillow_heif.from_bytes(f"{mode};12", (64, 64), bytes(64 * 64 * 2 * len(mode))).save(buffer)
    assert image_kind(buffer.getvalue()) == "12-bit colour" + (" with transparency" if mode == "RGBA" else "")


def test_a_damaged_header_is_of_no_kind() -> None:
    assert image_kind(b"\xff\xd8\xff\xe0\0\x10" + bytes(30)) == "other"
    assert image_kind(b"nothing") == "other"
