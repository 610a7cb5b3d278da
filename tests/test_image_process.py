"""TIFF and AVIF, decoded in processes that can be ended."""

import json
import time
from collections.abc import Iterator
from io import BytesIO
from types import SimpleNamespace

import pytest
from PIL import Image
from support.hostile_images import tiff_of_one_strip
from support.image_files import SMALL, photo, save

from models.errors import ImageTooLarge, InvalidImage
from models.images import decoder_child, decoder_process
from models.images.cost import OutOfTime
from models.images.decoding import Limits, decode

pytestmark = pytest.mark.system  # the decoder runs in a process of its own

EXTRA = Limits(extra_formats=frozenset({"TIFF", "AVIF"}))
ENDLESS = tiff_of_one_strip(180_000, strips=60_000)


@pytest.fixture(autouse=True)
def ended() -> Iterator[None]:
    decoder_process.close()
    yield
    decoder_process.close()


def test_a_process_is_kept_for_the_next_image() -> None:
    decode(save(photo(40, 30), "TIFF"), SMALL, EXTRA)
    [process] = decoder_process._idle
    decode(save(photo(40, 30), "AVIF"), SMALL, EXTRA)
    assert decoder_process._idle == [process]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "F"])
def test_modes_come_back_as_they_were(mode: str) -> None:
    image = photo(40, 30).convert("L").convert("I;16" if mode == "I;16" else mode)
    loaded = decoder_process.load(save(image, "TIFF"), "TIFF", deadline=time.monotonic() + 30)
    expected = {"1": "L", "P": "RGB", "CMYK": "RGB"}.get(mode, mode)
    assert loaded.mode == expected
    assert loaded.tobytes() == image.convert(expected).tobytes()


def test_an_answer_is_a_short_line_whatever_the_text_of_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("image file is truncated: " + "\U0001f600" * 500)

    order = {"bytes": 0, "cpu_s": 1, "memory": 1, "format": "TIFF", "max_pixels": None, "raw_mode": None}
    answers = BytesIO()
    monkeypatch.setattr(decoder_child, "_decoded", fail)
    monkeypatch.setattr(decoder_child, "_limit", lambda *_: None)
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=BytesIO(json.dumps(order).encode() + b"\n")))
    monkeypatch.setattr("sys.stdout", SimpleNamespace(buffer=answers))
    decoder_child.main()
    assert len(answers.getvalue()) < decoder_process.ANSWER_BYTES
    assert json.loads(answers.getvalue()) == {"error": "truncated"}


def test_a_damaged_file_leaves_the_process_for_the_next() -> None:
    data = save(photo(40, 30), "TIFF", compression="tiff_lzw")
    for damaged in (data[:200], data[:1000] + bytes(500) + data[1500:]):
        with pytest.raises(InvalidImage, match=r"^(truncated|damaged) TIFF"):
            decode(damaged, SMALL, EXTRA)
    assert len(decoder_process._idle) == 1


@pytest.mark.parametrize("keep", [0.3, 0.9])
def test_a_truncated_avif_is_named(keep: float) -> None:
    data = save(photo(40, 30), "AVIF")
    size = int(len(data) * keep)
    with pytest.raises(InvalidImage, match=f"^truncated AVIF: {size} of at least [0-9]+ bytes$"):
        decode(data[:size], SMALL, EXTRA)


def test_an_orientation_comes_back() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert (
        decoder_process.load(save(photo(40, 30), "AVIF", exif=exif), "AVIF", time.monotonic() + 30).getexif()[274] == 6
    )


@pytest.mark.abuse("A402")
def test_the_deadline_ends_the_process() -> None:
    decode(save(photo(40, 30), "TIFF"), SMALL, EXTRA)
    [process] = decoder_process._idle
    start = time.monotonic()
    with pytest.raises(OutOfTime):
        decode(ENDLESS, SMALL, EXTRA, deadline=start + 0.3)
    assert time.monotonic() - start < 2
    assert process.poll() is not None
    decode(save(photo(40, 30), "TIFF"), SMALL, EXTRA)


@pytest.mark.abuse("A402")
def test_the_process_ends_once_the_caller_has_left() -> None:
    start = time.monotonic()
    with pytest.raises(OutOfTime):
        decode(ENDLESS, SMALL, EXTRA, left=lambda: time.monotonic() > start + 0.3)
    assert time.monotonic() - start < 3
    assert decoder_process._idle == []


@pytest.mark.abuse("A402")
def test_cpu_seconds_end_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder_process, "CPU_S", 0)
    with pytest.raises(InvalidImage, match="more than 0 s to decode"):
        decode(ENDLESS, SMALL, EXTRA)


@pytest.mark.abuse("A402")
def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder_process, "MEMORY", 2**20)
    with pytest.raises((ImageTooLarge, InvalidImage)):
        decode(save(photo(400, 300), "TIFF"), SMALL, EXTRA)


# PNG and WebP of many pixels


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is large."""
    monkeypatch.setattr("models.images.decoding.UNINTERRUPTED", {"PNG": 1, "WEBP": 1})


@pytest.mark.parametrize(
    ("data", "tolerance"),
    [
        pytest.param(save(photo(61, 40)), 0, id="png"),
        pytest.param(save(photo(61, 40).convert("L")), 0, id="gray"),
        pytest.param(save(photo(61, 40).convert("LA")), 0, id="alpha"),
        pytest.param(save(photo(61, 40).convert("L").convert("I;16")), 0, id="16 bits"),
        pytest.param(save(photo(61, 40).convert("P")), 6, id="palette"),
        pytest.param(save(photo(61, 40), transparency=(1, 2, 3)), 0, id="transparent colour"),
        pytest.param(save(photo(61, 40), "WEBP"), 0, id="webp"),
    ],
)
def test_a_large_image_is_the_same_from_a_process(data: bytes, tolerance: int, monkeypatch: pytest.MonkeyPatch) -> None:
    here = decode(data, SMALL)
    monkeypatch.setattr("models.images.decoding.UNINTERRUPTED", {"PNG": 1, "WEBP": 1})
    there = decode(data, SMALL)
    assert len(decoder_process._idle) == 1
    assert (here.int() - there.int()).abs().max() <= tolerance


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("file_format", ["PNG", "WEBP"])
def test_a_large_image_ends_with_its_deadline(file_format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data, exchange = save(photo(61, 40), file_format), decoder_process._exchange

    def slow(*args: object) -> object:
        time.sleep(0.5)
        return exchange(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(decoder_process, "_exchange", slow)
    with pytest.raises(OutOfTime):
        decode(data, SMALL, deadline=time.monotonic() + 0.2)
    assert decoder_process._idle == []
