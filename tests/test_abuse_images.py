"""Hostile images over HTTP, to a server in a process of its own: no 5xx, the same process, bounded time and memory."""

import zipfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from support.image_files import save, solid
from support.live_server import LiveServer, live_server
from support.live_server import weights as weights
from support.odd_images import ANY, OK, REFUSED, TOO_LARGE, Odd, bombs, odd_images, strips, two_in_one

MEGAPIXELS = 100  # at a time; the server has the threads for four times as many
RAW = {"Content-Type": "application/octet-stream"}


@pytest.fixture(scope="module")
def server(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    flags = ("--decode-threads", "8", "--max-megapixels-in-flight", str(MEGAPIXELS))
    with live_server(weights, tmp_path_factory.mktemp("server"), *flags) as server:
        yield server
        assert server.alive
        assert " ERROR " not in server.log.read_text()


def wrong(server: LiveServer, files: Iterable[Odd], most_cpu_s: float) -> list[str]:
    """What got another status than it may get, or took more of the server's CPU: unlike wall time, it does not depend on others."""
    found = []
    with httpx.Client(base_url=server.url, timeout=30) as http:
        for odd in files:
            before = server.cpu_s()
            answer = http.post("/predict", content=odd.data, headers=RAW)
            took = server.cpu_s() - before
            if answer.status_code not in odd.statuses or took > most_cpu_s:
                found.append(f"{odd.name}: {answer.status_code} after {took:.2f} s: {answer.text[:200]}")
    return found


def replay_twice(server: LiveServer, files: list[Odd]) -> None:
    """The second time, nothing is left to warm up."""
    assert wrong(server, files, most_cpu_s=2) == []
    before = server.memory_mb()
    assert wrong(server, files, most_cpu_s=2) == []
    assert server.memory_mb() - before < 20


@pytest.mark.abuse("I1", "I3", "I4", "I5", "I7", "I9", "I10", "I11", "I15", "I16", "I18")
def test_the_generated_set(server: LiveServer) -> None:
    files = odd_images()
    assert len({odd.data for odd in files}) > 100
    replay_twice(server, files)


@pytest.mark.data
@pytest.mark.abuse("I4", "I20")
def test_files_of_other_peoples_corpora(server: LiveServer, data_dir: Path) -> None:
    with zipfile.ZipFile(data_dir / "odd-images.zip") as archive:
        rows = [line.split("\t") for line in archive.read("index.tsv").decode().splitlines()[1:]]
        files = [Odd(row[0], archive.read(row[0]), expected(row[1], int(row[2]))) for row in rows]
    replay_twice(server, files)


def expected(category: str, status: int) -> set[int]:
    """Fuzzed files may get what they like short of a 5xx; others are what they are, though some that are no image begin like one."""
    if status in (200, 413):
        return {status}
    return REFUSED if category.startswith("unsupported") else ANY


@pytest.mark.abuse("I12")
def test_long_strips_cost_neither_time_nor_memory(server: LiveServer) -> None:
    before = server.peak_mb()
    assert wrong(server, [Odd(name, data, OK) for name, data in strips().items()], most_cpu_s=1) == []
    assert server.peak_mb() - before < 100


@pytest.mark.abuse("I13")
def test_bombs_are_refused_by_their_headers(server: LiveServer) -> None:
    before = server.peak_mb()
    assert wrong(server, [Odd(name, data, TOO_LARGE) for name, data in bombs().items()], most_cpu_s=0.05) == []
    assert server.peak_mb() - before < 20


@pytest.mark.abuse("I14")
def test_many_large_images_at_once_stay_within_the_pixels_in_flight(server: LiveServer) -> None:
    data = save(solid("L", 0, (7000, 7000)))  # one byte a pixel
    before = server.memory_mb()
    with ThreadPoolExecutor(32) as pool:
        post = [
            pool.submit(httpx.post, server.url + "/predict", content=data, headers=RAW, timeout=60) for _ in range(32)
        ]
        statuses = {each.result().status_code for each in post}
    assert statuses <= {200, 504}
    assert 200 in statuses
    assert server.peak_mb() - before < MEGAPIXELS + 60


@pytest.mark.abuse("I18")
def test_the_content_decides_and_the_answer_is_json_that_no_browser_sniffs(server: LiveServer) -> None:
    files = [("file", (f"{name}.html", data, "text/html")) for name, data in two_in_one().items()]
    answer = httpx.post(server.url + "/predict", files=files)
    assert all("predictions" in result for result in answer.json()["results"])
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.abuse("I18")
def test_a_declared_type_makes_no_image(server: LiveServer) -> None:
    for name, kind in (("cat.png", "image/png"), ("cat.jpg", "image/jpeg")):
        answer = httpx.post(server.url + "/predict", files={"file": (name, b"<html>", kind)})
        assert (answer.status_code, answer.json()["error"]["code"]) == (415, "unsupported_media_type")


@pytest.mark.abuse("I2")
def test_an_empty_file_part(server: LiveServer) -> None:
    answer = httpx.post(server.url + "/predict", files={"file": ("cat.jpg", b"")})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "empty_file")
