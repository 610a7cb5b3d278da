"""`IMAGO_EXTRA_FORMATS`, from the setting to the answer of a server in a process of its own."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from support.image_files import photo, save
from support.live_server import LiveServer, live_server
from support.live_server import weights as weights

TEXT = b"a text that is no image"


@pytest.fixture(scope="module")
def server(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with live_server(weights, tmp_path_factory.mktemp("server"), "--extra-formats", "tiff,avif") as server:
        yield server
        assert " ERROR " not in server.log.read_text()


@pytest.mark.abuse("A401")
@pytest.mark.parametrize("file_format", ["TIFF", "AVIF", "JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_every_format_is_answered(server: LiveServer, file_format: str) -> None:
    headers = {"Content-Type": f"image/{file_format.lower()}"}
    answer = httpx.post(f"{server.url}/predict", content=save(photo(60, 40), file_format), headers=headers, timeout=30)
    assert answer.status_code == 200, answer.text


@pytest.mark.abuse("A401")
def test_what_is_no_image_is_named_and_its_neighbours_are_answered(server: LiveServer) -> None:
    answer = httpx.post(f"{server.url}/predict", content=TEXT, headers={"Content-Type": "image/tiff"})
    assert answer.status_code == 415
    assert "TIFF" in answer.json()["error"]["message"]
    damaged = save(photo(60, 40), "TIFF", compression="tiff_lzw")[:-3000]
    sent = [save(photo(60, 40), "TIFF"), TEXT, save(photo(60, 40), "JPEG"), damaged, save(photo(60, 40), "AVIF")]
    files = [("file", (f"{n}", data)) for n, data in enumerate(sent)]
    results = httpx.post(f"{server.url}/predict", files=files, timeout=30).json()["results"]
    codes = [result.get("error", {}).get("code", "ok") for result in results]
    assert codes == ["ok", "unsupported_media_type", "ok", "invalid_image", "ok"]
