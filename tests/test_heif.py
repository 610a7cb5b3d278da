"""HEIC, as iPhones send it, written here by pillow-heif."""

import io
import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
from PIL import Image
from support.image_files import ORANGE, SMALL, difference, photo, save, solid
from support.live_server import live_server
from support.live_server import weights as weights

from models.errors import ImageTooLarge, InvalidImage, UnsupportedImage
from models.images import decoder_process, heif
from models.images.cost import OutOfTime
from models.images.decoding import Limits, decode
from service.settings import Settings, SettingsError

pillow_heif = pytest.importorskip("pillow_heif")
HEIF = frozenset({"HEIF"})
READS_HEIF = Limits(extra_formats=HEIF)


@pytest.fixture(autouse=True, scope="module")
def ended() -> Iterator[None]:
    yield
    decoder_process.close()


def heic(image: Image.Image, **options: object) -> bytes:
    file = io.BytesIO()
    pillow_heif.from_pillow(image).save(file, quality=90, **options)
    return file.getvalue()


def grid(width: int, height: int, tile: int = 64) -> bytes:
    """Tiles, as Apple's devices write them."""
    return heic(photo(width, height), tile_size=tile)


def sized(data: bytes, width: int, height: int) -> bytes:
    """The same file with other sizes in its header."""
    parts = data.split(heif.EXTENTS)
    return heif.EXTENTS.join(
        [parts[0], *(bytes(4) + struct.pack(">II", width, height) + part[12:] for part in parts[1:])]
    )


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
def test_modes(mode: str) -> None:
    data = heic(solid(mode, {"RGB": ORANGE, "L": 90, "RGBA": (*ORANGE, 255)}[mode], (64, 48)))
    expected = torch.tensor((90, 90, 90) if mode == "L" else ORANGE).view(3, 1, 1)
    assert difference(decode(data, SMALL, READS_HEIF), expected)[1] <= 8


def test_a_photograph_is_what_its_png_is() -> None:
    image = photo(160, 120)
    mean, _ = difference(decode(heic(image), SMALL, READS_HEIF), decode(save(image), SMALL))
    assert mean < 4


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_it_is_upright_once(orientation: int) -> None:
    image = Image.new("RGB", (96, 96), "black")
    image.paste("white", (0, 0, 96, 32))  # the top of what is stored
    exif = Image.Exif()
    exif[0x0112] = orientation
    pillow_heif.register_heif_opener()
    data = save(image, "HEIF", exif=exif.tobytes())  # as a box `irot`, and in EXIF, which does not count
    shown = decode(data, SMALL, READS_HEIF)
    expected = decode(save(image, "JPEG", exif=exif), SMALL)
    assert difference(shown, expected)[0] < 3


def test_a_grid_of_tiles() -> None:
    data = grid(200, 150)
    assert heif.size(data) == (200, 150)
    assert decode(data, SMALL, READS_HEIF).shape == (3, 32, 32)


def test_off_by_default() -> None:
    with pytest.raises(UnsupportedImage, match="a HEIC image; save it as PNG or JPEG, or set IMAGO_EXTRA_FORMATS=heif"):
        decode(heic(photo(64, 48)), SMALL)


@pytest.mark.parametrize(("width", "height"), [(20_000, 20_000), (2**32 - 1, 1), (2**31, 2**31)])
def test_huge_sizes_are_refused_before_anything_is_decoded(
    monkeypatch: pytest.MonkeyPatch, width: int, height: int
) -> None:
    monkeypatch.setattr(decoder_process, "load", lambda *_: pytest.fail("it was decoded"))
    with pytest.raises(ImageTooLarge, match="limit"):
        decode(sized(heic(photo(64, 48)), width, height), SMALL, READS_HEIF)


def test_pixels_count_as_those_of_other_formats() -> None:
    with pytest.raises(ImageTooLarge, match=r"128 x 96 is 12,288 pixels; the limit is 12,000"):
        decode(heic(photo(128, 96)), SMALL, Limits(max_pixels=12_000, extra_formats=HEIF))


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(heic(photo(320, 240))[:-5000], id="truncated"),
        pytest.param(heic(photo(64, 48))[:300], id="header alone"),
        pytest.param(heic(photo(64, 48))[:60], id="no size"),
        pytest.param(sized(heic(photo(64, 48)), 8, 8), id="more pixels than promised"),
        pytest.param(sized(grid(200, 150), 64, 64), id="grid of more pixels than promised"),
        pytest.param(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(5000), id="zeros"),
        pytest.param(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0\0\0\x08free" * 5000, id="boxes"),
        pytest.param(heic(photo(64, 48)).replace(b"hvcC", b"hvcX"), id="no decoder configuration"),
    ],
)
def test_damaged_files_are_refused(data: bytes) -> None:
    with pytest.raises((InvalidImage, ImageTooLarge)):
        decode(data, SMALL, READS_HEIF, deadline=time.monotonic() + 30)


@pytest.mark.parametrize("keep", [0.1, 0.3, 0.9])
def test_a_truncated_file_is_named(keep: float) -> None:
    data = heic(photo(64, 48))
    size = int(len(data) * keep)
    with pytest.raises(InvalidImage, match=f"^truncated HEIC: {size} of at least [0-9]+ bytes$"):
        decode(data[:size], SMALL, READS_HEIF)


def test_no_damaged_byte_of_a_header_does_harm() -> None:
    data = bytearray(grid(128, 96))
    for at in range(8, 600, 31):
        broken = bytes(data[:at]) + bytes([data[at] ^ 0xFF]) + bytes(data[at + 1 :])
        try:
            assert decode(broken, SMALL, READS_HEIF).shape == (3, 32, 32)
        except (InvalidImage, ImageTooLarge, UnsupportedImage) as error:
            assert "\n" not in str(error)  # noqa: PT017


def test_the_deadline_ends_it() -> None:
    with pytest.raises(OutOfTime):
        decode(heic(photo(1500, 1000)), SMALL, READS_HEIF, deadline=time.monotonic() + 0.005)


def test_the_setting_needs_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Settings.load(extra_formats="heif,tiff").extra_formats == ("heif", "tiff")
    monkeypatch.setattr(heif, "is_installed", lambda: False)
    with pytest.raises(
        SettingsError, match=r"^IMAGO_EXTRA_FORMATS: heif needs the extra .* pip install 'imago\[heif\]'$"
    ):
        Settings.load(extra_formats="heif")


def test_a_server_answers_it(weights: Path, tmp_path: Path) -> None:
    with live_server(weights, tmp_path, "--extra-formats", "heif") as server:
        answer = httpx.post(f"{server.url}/predict", content=heic(photo(64, 48)), timeout=30)
    assert answer.status_code == 200, json.dumps(answer.json())
