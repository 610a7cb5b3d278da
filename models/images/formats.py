"""Names bytes that are not an image, or are of a format that is not read, with the remedy: for requests and for audits of datasets.

The first bytes decide. Every row is (first bytes, what it is, what to do); the remedies continue a sentence after a semicolon.
"""

import re

from models.images import heif, tiff

AS_PNG = "save it as PNG or JPEG"
RAW = "export it as JPEG from the photo editor"
UNPACK = "unpack it and send the images in it"
AS_JSON = 'send it as JSON, {"image": "<base64>"}, with Content-Type: application/json'
SAME_BYTES = "send the file unchanged, with curl --data-binary @file or -F file=@file, not -d"
HEAD = 512  # bytes that are read

# (offset, bytes, what, remedy), in this order
SIGNATURES: tuple[tuple[int, bytes, str, str], ...] = (
    (0, b"\x89PNG\x1a", "a PNG image without its line ends and zero bytes", SAME_BYTES),
    (0, b"\x89PNG\n\x1a", "a PNG image whose line ends were converted", SAME_BYTES),
    (0, b"\xef\xbf\xbd", "binary data that was decoded as text", "send the bytes as they are, not a string of them"),
    (0, b"\xc3\xbf\xc3\x98", "a JPEG image encoded as text", "send the bytes as they are, not a string of them"),
    (0, b"\xc2\x89PNG", "a PNG image encoded as text", "send the bytes as they are, not a string of them"),
    (0, b"%PDF", "a PDF document", "save its page as PNG"),
    (0, b"8BPS", "a Photoshop image", AS_PNG),
    (0, b"\x00\x00\x01\x00", "an icon", "save it as PNG"),
    (0, b"\x00\x00\x02\x00", "a cursor", "save it as PNG"),
    (0, b"\x00\x00\x00\x0cJXL ", "a JPEG XL image", AS_PNG),
    (0, b"\xff\x0a", "a JPEG XL image", AS_PNG),
    (0, b"\x00\x00\x00\x0cjP", "a JPEG 2000 image", AS_PNG),
    (0, b"\xff\x4f\xff\x51", "a JPEG 2000 image", AS_PNG),
    (0, b"II\xbc", "a JPEG XR image", AS_PNG),
    (0, b"\xff\xd8\xff\xf7", "a JPEG-LS image", AS_PNG),
    (4, b"ftypcrx", "a camera raw file (Canon CR3)", RAW),
    (6, b"HEAPCCDR", "a camera raw file (Canon CRW)", RAW),
    (0, b"IIRO", "a camera raw file (Olympus ORF)", RAW),
    (0, b"IIRS", "a camera raw file (Olympus ORF)", RAW),
    (0, b"MMOR", "a camera raw file (Olympus ORF)", RAW),
    (0, b"IIU\0", "a camera raw file (Panasonic RW2)", RAW),
    (0, b"FUJIFILMCCD-RAW", "a camera raw file (Fujifilm RAF)", RAW),
    (0, b"\0MRM", "a camera raw file (Minolta MRW)", RAW),
    (0, b"FOVb", "a camera raw file (Sigma X3F)", RAW),
    (0, b"%!PS", "an EPS drawing", "save it as PNG"),
    (0, b"\xc5\xd0\xd3\xc6", "an EPS drawing", "save it as PNG"),
    (0, b"\xd7\xcd\xc6\x9a", "a WMF drawing", "save it as PNG"),
    (128, b"DICM", "a DICOM image", "export its pixels as PNG"),
    (0, b"SIMPLE  =", "a FITS image", "export its pixels as PNG"),
    (0, b"\x89HDF", "an HDF5 file", "export its images as PNG"),
    (0, b"\x93NUMPY", "a NumPy array", "save it as PNG, or send its pixels to /v2"),
    (0, b"\x76\x2f\x31\x01", "an OpenEXR image", AS_PNG),
    (0, b"#?RADIANCE", "a Radiance HDR image", AS_PNG),
    (0, b"DDS ", "a DDS texture", AS_PNG),
    (0, b"qoif", "a QOI image", AS_PNG),
    (0, b"gimp xcf", "a GIMP image", AS_PNG),
    (0, b"FLIF", "a FLIF image", AS_PNG),
    *((0, b"P%d%b" % (kind, blank), "a Netpbm image (PGM, PPM)", AS_PNG) for kind in range(1, 7) for blank in (b"\n", b" ")),
    (0, b"{\\rtf", "an RTF document", "save the images in it as PNG or JPEG"),
    (0, b"PK\x03\x04", "a zip file or an office document", UNPACK),
    (0, b"PK\x05\x06", "an empty zip file", UNPACK),
    (0, b"\x1f\x8b", "a gzip file", UNPACK),
    (0, b"BZh", "a bzip2 file", UNPACK),
    (0, b"\xfd7zXZ", "an xz file", UNPACK),
    (0, b"\x28\xb5\x2f\xfd", "a Zstandard file", UNPACK),
    (0, b"Rar!", "a RAR file", UNPACK),
    (0, b"7z\xbc\xaf", "a 7z file", UNPACK),
    (257, b"ustar", "a tar file", UNPACK),
    (0, b"\x7fELF", "a program", ""),
    (0, b"MZ", "a program", ""),
    (0, b"SQLite format 3", "a database", ""),
    (0, b"\xd0\xcf\x11\xe0", "an OLE file, such as Thumbs.db", ""),
    (0, b"bplist00", "a property list of macOS", ""),
    (0, b"\x00\x05\x16\x07", "a resource file of macOS (AppleDouble)", ""),
    (0, b"\x1a\x45\xdf\xa3", "a video (Matroska or WebM)", "send a frame of it as JPEG"),
    (8, b"AVI ", "a video (AVI)", "send a frame of it as JPEG"),
    (0, b"FLV\x01", "a video (FLV)", "send a frame of it as JPEG"),
    (0, b"\x00\x00\x01\xba", "a video (MPEG)", "send a frame of it as JPEG"),
    (0, b"\x30\x26\xb2\x75", "a video (WMV)", "send a frame of it as JPEG"),
    (0, b"OggS", "an Ogg file", ""),
    (0, b"ID3", "an audio file", ""),
    (8, b"WAVE", "an audio file", ""),
    (0, b"\x0b\x77", "an audio file", ""),
)  # fmt: skip
AVIF_BRANDS = {b"avif", b"avis"}
HEIC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"}
HEIF_BRANDS = HEIC_BRANDS | {b"mif1", b"msf1", b"mif2"}

_URL = re.compile(rb"[a-z][a-z0-9+.-]{1,15}://", re.IGNORECASE)
_BOUNDARY = re.compile(rb"--[^\r\n]{1,256}\r?\n(content-[a-z-]+):", re.IGNORECASE)
_BASE64 = re.compile(rb"[A-Za-z0-9+/_-]{60,}+={0,2}(\s|$)")
_FORM = re.compile(rb"[\w.\[\]%-]{1,64}=")


def format_of(data: bytes) -> str | None:
    """Returns Pillow's name of the format that the first bytes show. File names and declared types never count."""
    if data.startswith(b"\xff\xd8\xff") and data[3:4] != b"\xf7":  # that is JPEG-LS
        return "JPEG"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "GIF"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "WEBP"
    if data.startswith(b"BM") and data[16:18].strip(b"\0") == b"":  # a header of less than 64 KiB, unlike a text's
        return "BMP"
    if data.startswith(tiff.STARTS):
        return "TIFF" if tiff.camera(data) is None else None
    named = brands(data)
    if named & AVIF_BRANDS:
        return "AVIF"
    return "HEIF" if named & HEIF_BRANDS else None


def brands(data: bytes) -> set[bytes]:
    """Returns the brands of an ISO box file, which tell HEIC, AVIF and kinds of video apart; empty for other files."""
    if data[4:8] != b"ftyp":
        return set()
    end = min(max(16, int.from_bytes(data[:4], "big")), 256)
    return {data[8:12], *(data[at : at + 4] for at in range(16, end, 4))}


def is_address(data: bytes) -> bool:
    """Whether the bytes are an address (`https://...`) and not an image."""
    return _URL.match(data) is not None


def is_multipart(data: bytes) -> bool:
    """Whether the bytes are a multipart body: a boundary, and the head of a part."""
    return _BOUNDARY.match(data) is not None


def described(data: bytes) -> str:
    """Returns what undecodable bytes are, with the remedy: `a PDF document; save its page as PNG`.

    Formats that a setting adds are named with that setting.
    """
    what, remedy = _named(data)
    return f"{what}; {remedy}" if remedy else what


def _named(data: bytes) -> tuple[str, str]:
    for offset, start, what, remedy in SIGNATURES:
        if data.startswith(start, offset):
            return what, remedy
    if data.startswith(tiff.STARTS):
        return _tiff(data)
    if data[4:8] == b"ftyp":
        return _boxed(data)
    return _text(data[:HEAD].removeprefix(b"\xef\xbb\xbf"))


def _tiff(data: bytes) -> tuple[str, str]:
    """Names a TIFF, or a raw file of a camera, which is built like one."""
    if (camera := tiff.camera(data)) is not None:
        return f"a camera raw file ({camera})" if camera else "a camera raw file", RAW
    return "a TIFF image", f"{AS_PNG}, or set IMAGO_EXTRA_FORMATS=tiff"


def _boxed(data: bytes) -> tuple[str, str]:
    file_format = format_of(data)
    if file_format == "AVIF":
        return "an AVIF image", f"{AS_PNG}, or set IMAGO_EXTRA_FORMATS=avif"
    if file_format == "HEIF":
        name = "a HEIC image" if brands(data) & HEIC_BRANDS else "a HEIF image"
        installed = "" if heif.is_installed() else "install imago[heif] and "
        return name, f"{AS_PNG}, or {installed}set IMAGO_EXTRA_FORMATS=heif"
    return "a video", "send a frame of it as JPEG"


def _text(start: bytes) -> tuple[str, str]:
    text = start.lstrip()
    small = text.lower()
    if b"<svg" in small:
        return "an SVG drawing", "save it as PNG"
    if small.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
        return "an HTML page", "download the image itself; a page was saved in its place"
    if small.startswith(b"<?xml"):
        return "an XML document", ""
    if small.startswith(b"data:"):
        return "a data URL", AS_JSON
    if small.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS", "fetch the file with git lfs pull"
    if is_address(small):
        return "an address", "nothing is fetched: send the image itself"
    if is_multipart(text):
        return (
            "a multipart body",
            "its Content-Type must be multipart/form-data with its boundary; leave that header to your HTTP library",
        )
    if small.startswith((b"{", b"[")):
        return "JSON", "send it with Content-Type: application/json"
    if _BASE64.match(text):
        return "text that looks like base64", AS_JSON
    if any(byte < 32 and byte not in b"\t\r\n\f" for byte in start):
        return "of unknown format", ""
    if _FORM.match(text):
        return "a form without a file", "send it with curl -F file=@photo.jpg"
    return "text", "to send a file with curl, write @ before its name: -F file=@photo.jpg"
