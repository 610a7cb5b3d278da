"""What bytes are that are no image, and what to do about it."""

import base64
import gzip
import io
import tarfile
import zipfile

import pytest
from support.image_files import photo, save, solid

from models.images import formats, heif
from models.images.formats import described

JPEG, PNG = save(solid(), "JPEG"), save(solid(), "PNG")


def archive(kind: str) -> bytes:
    file = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(file, "w") as packed:
            packed.writestr("a.jpg", JPEG)
    else:
        with tarfile.open(fileobj=file, mode="w") as tar:
            tar.addfile(tarfile.TarInfo("a.jpg"))
    return file.getvalue()


def boxed(brand: bytes, *more: bytes) -> bytes:
    brands = brand + bytes(4) + b"".join(more)
    return (8 + len(brands)).to_bytes(4, "big") + b"ftyp" + brands + bytes(100)


@pytest.mark.parametrize(
    ("data", "what"),
    [
        pytest.param(boxed(b"heic", b"mif1", b"heic"), "a HEIC image; save it as PNG or JPEG, or ", id="heic"),
        pytest.param(boxed(b"mif1", b"heic"), "a HEIC image", id="heic by a compatible brand"),
        pytest.param(boxed(b"mif1", b"miaf"), "a HEIF image", id="heif"),
        pytest.param(save(solid(), "AVIF"), "an AVIF image; save it as PNG or JPEG, or set IMAGO_EXTRA_FORMATS=avif", id="avif"),
        pytest.param(save(solid(), "TIFF"), "a TIFF image; save it as PNG or JPEG, or set IMAGO_EXTRA_FORMATS=tiff", id="tiff"),
        pytest.param(boxed(b"isom", b"mp41"), "a video; send a frame", id="mp4"),
        pytest.param(boxed(b"qt  "), "a video", id="mov"),
        pytest.param(boxed(b"crx ", b"isom"), "a camera raw file (Canon CR3)", id="cr3"),
        pytest.param(b"II*\0\x10\0\0\0CR\x02\0" + bytes(99), "a camera raw file (Canon CR2)", id="cr2"),
        pytest.param(b"IIRO\x08\0\0\0" + bytes(99), "a camera raw file (Olympus ORF)", id="orf"),
        pytest.param(b"\xff\xd8\xff\xf7\0\x0b" + bytes(99), "a JPEG-LS image", id="jpeg-ls"),
        pytest.param(b"\0\0\0\x0cJXL \r\n\x87\n", "a JPEG XL image", id="jpeg xl"),
        pytest.param(b"\xff\x0a" + bytes(20), "a JPEG XL image", id="jpeg xl codestream"),
        pytest.param(save(solid(), "JPEG2000"), "a JPEG 2000 image", id="jpeg 2000"),
        pytest.param(b"%PDF-1.7\n", "a PDF document; save its page as PNG", id="pdf"),
        pytest.param(b"8BPS\0\1", "a Photoshop image", id="psd"),
        pytest.param(b"P3\n1 1\n255\n0 0 0\n", "a Netpbm image (PGM, PPM); save it as PNG or JPEG", id="ppm"),
        pytest.param(b"{\\rtf1\\ansi hello}", "an RTF document", id="rtf"),
        pytest.param(save(solid(), "ICO"), "an icon", id="ico"),
        pytest.param(b"%!PS-Adobe-3.0 EPSF-3.0", "an EPS drawing", id="eps"),
        pytest.param(bytes(128) + b"DICM", "a DICOM image", id="dicom"),
        pytest.param(b'<?xml version="1.0"?>\n<svg>', "an SVG drawing", id="svg"),
        pytest.param(b"\n<!DOCTYPE html><p>404", "an HTML page; download the image itself", id="html"),
        pytest.param(archive("zip"), "a zip file", id="zip"),
        pytest.param(gzip.compress(JPEG), "a gzip file", id="gzip"),
        pytest.param(archive("tar"), "a tar file", id="tar"),
        pytest.param(b'{"image": "..."}', "JSON; send it with Content-Type: application/json", id="json"),
        pytest.param(base64.b64encode(JPEG), "text that looks like base64; send it as JSON, ", id="base64"),
        pytest.param(base64.encodebytes(PNG), "text that looks like base64", id="base64 in lines"),
        pytest.param(b"data:image/jpeg;base64,/9j/4AAQ", "a data URL; send it as JSON, ", id="data url"),
        pytest.param(b"https://x/a.jpg", "an address; nothing is fetched", id="address"),
        pytest.param(b'--x1\r\nContent-Disposition: form-data; name="file"', "a multipart body; its", id="multipart"),
        pytest.param(b"photo.jpg", "text; to send a file with curl, write @", id="name of a file"),
        pytest.param(b"top_k=5", "a form without a file", id="form"),
        pytest.param(b"version https://git-lfs.github.com/spec/v1", "a pointer of Git LFS", id="lfs"),
        pytest.param(PNG.translate(None, b"\r\n\0"), "a PNG image without its line ends", id="curl -d"),
        pytest.param(JPEG.decode("latin-1").encode(), "a JPEG image encoded as text", id="as text"),
        pytest.param(JPEG.decode("utf-8", "replace").encode(), "binary data that was decoded as text", id="lossy"),
        pytest.param(bytes(range(256)), "of unknown format", id="random"),
    ],
)  # fmt: skip
def test_what_it_is_and_the_remedy(data: bytes, what: str) -> None:
    assert described(data).startswith(what)


def test_heif_is_named_with_its_extra_where_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heif, "is_installed", lambda: False)
    assert described(boxed(b"heic")).endswith("or install imago[heif] and set IMAGO_EXTRA_FORMATS=heif")
    monkeypatch.setattr(heif, "is_installed", lambda: True)
    assert described(boxed(b"heic")).endswith("or set IMAGO_EXTRA_FORMATS=heif")


def test_every_remedy_is_one_short_line() -> None:
    assert all("\n" not in what + remedy and len(what + remedy) < 160 for *_, what, remedy in formats.SIGNATURES)


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "GIF", "BMP", "WEBP"])
def test_an_image_that_is_read_matches_no_row(file_format: str) -> None:
    data = save(photo(40, 30), file_format)
    assert not [what for offset, start, what, _ in formats.SIGNATURES if data.startswith(start, offset)]
