"""Bit depth and channels of an image file, from its header alone: `8-bit colour`, `16-bit gray`."""

from io import BytesIO

from PIL import Image

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
    if data.startswith(b"\x89PNG"):
        return f"{data[24]}-bit {PNG_CHANNELS.get(data[25], OTHER)}"
    if data.startswith(b"\xff\xd8"):
        return _jpeg_kind(data)
    if data.startswith(b"GIF8"):
        return "8-bit palette"
    if data.startswith(b"RIFF"):
        transparent = (data[12:16] == b"VP8X" and data[20] & 0x10) or (data[12:16] == b"VP8L" and data[24] & 0x10)
        return "8-bit colour with transparency" if transparent else "8-bit colour"
    try:
        with Image.open(BytesIO(data)) as image:
            return "16-bit gray" if image.mode.startswith("I;16") else MODES.get(image.mode, OTHER)
    except Exception:  # a format that Pillow alone does not read
        return OTHER


def _jpeg_kind(data: bytes) -> str:
    """From the frame header, the first of the markers SOF0 to SOF15."""
    at = 2
    while at + 9 < len(data):
        if data[at] != 0xFF:
            break
        marker = data[at + 1]
        if marker == 0xFF or marker == 0x01 or 0xD0 <= marker <= 0xD8:  # a fill byte, or a marker without content
            at += 1 if marker == 0xFF else 2
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return f"{data[at + 4]}-bit {JPEG_CHANNELS.get(data[at + 9], OTHER)}"
        else:
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return OTHER
