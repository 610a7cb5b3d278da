"""The bounds on what decoding a file costs: scans, memory, time."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from time import process_time

import pytest
from support.hostile_images import ARITHMETIC, BASELINE, EXTENDED, PROGRESSIVE, at_the_limit, jpeg, many_scans, segment
from support.image_files import IMAGENET, SMALL, photo, save

from models.errors import ImageTooLarge, InvalidImage
from models.images import cost
from models.images.cost import MAX_SCANNED, JpegCost, Limits, OutOfTime, jpeg_cost
from models.images.decoding import decode

MANY = many_scans()


@pytest.mark.abuse("A101")
@pytest.mark.parametrize("data", [pytest.param(data, id=name) for name, data in MANY.items()])
def test_a_jpeg_of_thousands_of_scans_is_refused_before_the_first(data: bytes) -> None:
    start = process_time()
    with pytest.raises(InvalidImage, match="49,000,000 pixels in too many scans"):
        decode(data, IMAGENET)
    assert process_time() - start < 0.1


@pytest.mark.abuse("A101")
def test_small_jpegs_may_not_have_any_number_of_segments() -> None:
    start = process_time()
    with pytest.raises(InvalidImage, match="more than 20,000 segments"):
        decode(jpeg((16, 16), 100_000), IMAGENET)
    assert process_time() - start < 1


@pytest.mark.abuse("A101")
@pytest.mark.parametrize(
    ("save_options", "bytes_behind"),
    [
        pytest.param({}, b"", id="baseline"),
        pytest.param({"progressive": True}, b"", id="progressive"),
        pytest.param({"progressive": True}, b"\xff\xda" * 10_000, id="a film behind it"),
    ],
)
def test_photographs_pass(save_options: dict[str, object], bytes_behind: bytes) -> None:
    data = save(photo(400, 300), "JPEG", **save_options) + bytes_behind
    thumbnail = segment(0xE1, b"Exif\0\0" + b"\xff\xda\0\0" * 5000)
    assert decode(data[:2] + thumbnail + data[2:], SMALL).shape == (3, 32, 32)


def test_scans_cost_by_the_samples_that_they_pass_over() -> None:
    assert jpeg_cost(save(photo(400, 300), "JPEG")) == JpegCost()
    assert jpeg_cost(jpeg((400, 300), 4)) == JpegCost(3 * 120_000, 4 * 120_000)
    assert jpeg_cost(jpeg((400, 300), 3, sampling=0x22)) == JpegCost(180_000, 180_000)
    assert jpeg_cost(jpeg((400, 300), 6, frame=PROGRESSIVE, per_scan=3)) == JpegCost(3 * 120_000, 18 * 120_000)
    assert jpeg_cost(save(photo(400, 300), "JPEG", progressive=True)).samples == 180_000


def test_arithmetic_coding_costs_six_times_as_much() -> None:
    most = MAX_SCANNED // (4000 * 4000)
    jpeg_cost(jpeg((4000, 4000), most))
    with pytest.raises(InvalidImage):
        jpeg_cost(jpeg((4000, 4000), most + 1))
    with pytest.raises(InvalidImage):
        jpeg_cost(jpeg((4000, 4000), most // 6 + 1, frame=ARITHMETIC))


@pytest.mark.abuse("A104")
@pytest.mark.parametrize("frame", [BASELINE, EXTENDED, PROGRESSIVE])
def test_the_coefficients_of_several_scans_count_at_full_size(frame: int) -> None:
    held: list[int] = []

    @contextmanager
    def hold(pixels: int) -> Iterator[None]:
        held.append(pixels)
        yield

    decode(jpeg((800, 800), 3, frame=frame), SMALL, hold=hold)
    assert held == [100 * 100 + 3 * 800 * 800 // 2]  # at 1/8; a pixel is 4 bytes, a coefficient 2


@pytest.mark.system
@pytest.mark.abuse("A104")
def test_a_baseline_jpeg_counts_by_the_pixels_that_are_decoded() -> None:
    limits = Limits(max_pixels=20_000)
    assert decode(save(photo(800, 800), "JPEG"), SMALL, limits).shape == (3, 32, 32)
    with pytest.raises(ImageTooLarge, match="800 x 800 is 320,000 pixels; the limit is 20,000"):
        decode(save(photo(800, 800), "JPEG", progressive=True), SMALL, limits)


@pytest.mark.abuse("A104")
@pytest.mark.parametrize("size", [(8160, 6144), (16382, 3628), (12000, 9000)], ids=["50 MP", "panorama", "108 MP"])
def test_photographs_of_telephones_are_decoded(size: tuple[int, int]) -> None:
    assert decode(jpeg(size, 1, per_scan=3), IMAGENET).shape == (3, 224, 224)


# Time


def test_after_the_deadline_nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("it was loaded"))
    for file_format in ("JPEG", "PNG", "WEBP", "GIF", "BMP"):
        with pytest.raises(OutOfTime):
            decode(save(photo(40, 30), file_format), SMALL, deadline=time.monotonic() - 1)


def test_nothing_is_loaded_for_a_caller_who_has_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("it was loaded"))
    with pytest.raises(OutOfTime):
        decode(save(photo(40, 30), "JPEG"), SMALL, left=lambda: True)


@pytest.mark.system
@pytest.mark.abuse("A102")
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "GIF", "BMP"])
def test_a_deadline_interrupts_the_decoder(file_format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Time stands still until the decoder has asked for its second piece of input."""
    data, at = save(photo(600, 600), file_format, quality=98), list[int]()
    read = cost.ImageBytes.read

    def recorded(self: cost.ImageBytes, size: int | None = -1) -> bytes:
        at.append(self.tell())
        return read(self, size)

    monkeypatch.setattr(cost.ImageBytes, "read", recorded)
    monkeypatch.setattr("models.images.cost.time.monotonic", lambda: 2.0 if max(at, default=0) > 2**16 else 0.0)
    with pytest.raises(OutOfTime):
        decode(data, IMAGENET, deadline=1.0)
    assert max(at) < len(data) - 2**16


@pytest.mark.soak
@pytest.mark.abuse("A103")
def test_the_dearest_files_within_the_limits() -> None:
    seconds = {}
    for name, data in at_the_limit().items():
        start = process_time()
        assert decode(data, IMAGENET).shape == (3, 224, 224), name
        seconds[name] = process_time() - start
    assert max(seconds.values()) < 3, seconds
