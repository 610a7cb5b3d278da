from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from models.data.image_kinds import image_kind


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


def test_a_damaged_header_is_of_no_kind() -> None:
    assert image_kind(b"\xff\xd8\xff\xe0\0\x10" + bytes(30)) == "other"
    assert image_kind(b"nothing") == "other"
