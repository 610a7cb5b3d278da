"""Returns bit depth and channels of an image file, from its header alone: `8-bit colour`, `16-bit gray`."""

import re
from io import BytesIO

from PIL import Image

from models.images.cost import jpeg_frame
from models.images.formats import format_of
from models.images.tiff import first_page

PNG_CHANNELS = {0: "gray", 2: "colour", 3: "palette", 4: "gray with transparency", 6: "colour with transparency"}
JPEG_CHANNELS = {1: "gray", 3: "colour", 4: "CMYK"}
TIFF_CHANNELS = {0: "gray", 1: "gray", 3: "palette", 5: "CMYK"}
ALPHA_NAMES = (b"urn:mpeg:mpegB:cicp:systems:auxiliary:alpha", b"urn:mpeg:hevc:2015:auxid:1")
HEAD = 65536  # bytes of a HEIC or AVIF that are searched for its boxes
MODES = {
    "1": "1-bit gray",
    "L": "8-bit gray",
    "LA": "8-bit gray with transparency",
    "P": "8-bit palette",
    "RGB": "8-bit colour",
    "RGBA": "8-bit colour with transparency",
    "CMYK": "8-bit CMYK",
}
OTHER = "other"


def image_kind(data: bytes) -> str:
    """Returns the kind of a file that decodes."""
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
    if file_format == "TIFF":
        return _tiff_kind(data)
    if file_format in ("AVIF", "HEIF") and (kind := _boxed_kind(data)):
        return kind
    try:
        with Image.open(BytesIO(data)) as image:
            return MODES.get(image.mode, OTHER)
    except Exception:  # a format that Pillow alone does not read
        return OTHER


def _tiff_kind(data: bytes) -> str:
    if not (page := first_page(data)):
        return OTHER
    kind = f"{page.bits[0]}-bit {TIFF_CHANNELS.get(page.photometric, 'colour')}"
    return f"{kind} with transparency" if page.has_alpha else kind


def _boxed_kind(data: bytes) -> str:
    """Returns the kind of a HEIC or AVIF by the boxes `pixi` of the image and its transparency; empty if there are none."""
    found = [data[match.end() + 4 : match.end() + 6] for match in re.finditer(b"pixi", data[:HEAD])]
    depths = {content[0]: content[1] for content in found if len(content) == 2 and content[0] in (1, 3)}
    if not depths:
        return ""
    channels = max(depths)
    kind = f"{depths[channels]}-bit {'colour' if channels == 3 else 'gray'}"
    return f"{kind} with transparency" if any(name in data[:HEAD] for name in ALPHA_NAMES) else kind
