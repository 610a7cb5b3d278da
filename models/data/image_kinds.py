"""Bit depth and channels of an image file, from its header alone: `8-bit colour`, `16-bit gray`."""

from io import BytesIO

from PIL import Image

from models.images.cost import jpeg_frame
from models.images.formats import format_of

PNG_CHANNELS = {0: "gray", 2: "colour", 3: "palette", 4: "gray with transparency", 6: "colour with transparency"}
JPEG_CHANNELS = {1: "gray", 3: "colour", 4: "CMYK"}
MODES = {
    "1": "1-bit gray",
    "L": "8-bit gray",
    "LA": "8-bit gray with transparency",
    "P": "8-bit palette",
    "RGB": "8-bit colour",
    "RGBA": "8-bit colour with transparency",
    "CMYK": "8-bit CMYK",
    "I": "32-bit gray",
    "F": "32-bit gray",
}
OTHER = "other"


def image_kind(data: bytes) -> str:
    """Of the bytes of a file that decodes."""
    file_format = format_of(data)
    if file_format == "PNG":
        return f"{data[24]}-bit {PNG_CHANNELS.get(data[25], OTHER)}"
    if file_format == "JPEG":
        frame = jpeg_frame(data)
        return f"{frame[0]}-bit {JPEG_CHANNELS.get(frame[1], OTHER)}" if frame else OTHER
    if file_format == "GIF":
        return "8-bit palette"
    if file_format == "WEBP":
        transparent = (data[12:16] == b"VP8X" and data[20] & 0x10) or (data[12:16] == b"VP8L" and data[24] & 0x10)
        return "8-bit colour with transparency" if transparent else "8-bit colour"
    try:
        with Image.open(BytesIO(data)) as image:
            return "16-bit gray" if image.mode.startswith("I;16") else MODES.get(image.mode, OTHER)
    except Exception:  # a format that Pillow alone does not read
        return OTHER
