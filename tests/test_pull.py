import dataclasses
import hashlib
import io
import logging
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from torch import nn

from models import architectures
from models.errors import DownloadError, WeightsError
from models.preprocessing import Preprocessing
from models.store import download, pull
from models.store.store import ModelStore

pytestmark = pytest.mark.system

PREPROCESSING = Preprocessing(resize=32, crop=32)


class Shelf(ThreadingHTTPServer):
    """A web server on 127.0.0.1 with one file, which misbehaves as told."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = b""
        self.ranges = True  # whether it honours Range
        self.etag = '"one"'
        self.cut_after: list[int] = []  # bytes after which the next connections break
        self.statuses: list[int] = []  # what the next requests are answered with
        self.requests: list[dict[str, str]] = []
        self.paths: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Shelf

    def do_GET(self) -> None:
        shelf = self.server
        shelf.requests.append(dict(self.headers))
        shelf.paths.append(self.path)
        if shelf.statuses:
            return self.send_error(shelf.statuses.pop(0))
        start = self.start()
        if start >= len(shelf.content) > 0:
            return self.send_error(416)
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(shelf.content) - 1}/{len(shelf.content)}")
        self.send_header("ETag", shelf.etag)
        self.send_header("Content-Length", str(len(shelf.content) - start))
        self.end_headers()
        end = start + shelf.cut_after.pop(0) if shelf.cut_after else None
        self.wfile.write(shelf.content[start:end])
        return None

    def start(self) -> int:
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        unchanged = self.headers.get("If-Range", self.server.etag) == self.server.etag
        return int(wanted[1]) if wanted and unchanged and self.server.ranges else 0

    def log_message(self, *arguments: Any) -> None:
        """Nothing on stderr."""


@pytest.fixture
def shelf(monkeypatch: pytest.MonkeyPatch) -> Iterator[Shelf]:
    torch.set_num_threads(1)
    monkeypatch.setattr(download, "BACKOFF_S", 0)
    with Shelf() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    return ModelStore(tmp_path / "weights")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def saved(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


@pytest.fixture
def network() -> nn.Module:
    return architectures.build("lenet5", 3)


@pytest.fixture
def offer(shelf: Shelf, network: nn.Module, monkeypatch: pytest.MonkeyPatch) -> Callable[..., pull.Published]:
    """Publishes `content` as lenet5's weights, under the hash it has unless told otherwise."""

    def publish(content: bytes | None = None, sha256: str | None = None) -> pull.Published:
        shelf.content = saved(network.state_dict()) if content is None else content
        prefix = (sha256 or hashlib.sha256(shelf.content).hexdigest())[:8]
        source = pull.Published(
            weights="LeNet5_Weights.V1",
            url=f"https://weights.example/models/lenet5-{prefix}.pth",
            classes=("crane", "maillot", "crane"),
            preprocessing=PREPROCESSING,
            metrics={"acc@1": 69.8},
            recipe="https://recipes.example/lenet5",
        )
        monkeypatch.setattr(pull, "published", lambda name, weights: source)
        return source

    return publish


def test_a_pulled_network_is_the_published_one(
    shelf: Shelf, store: ModelStore, cache: Path, network: nn.Module, offer: Callable[..., pull.Published]
) -> None:
    source = offer()
    progress: list[tuple[int, int | None]] = []
    config = pull.pull("lenet5", store, cache, lambda done, total: progress.append((done, total)), base_url=shelf.url)
    loaded = store.load("lenet5", 1)
    images = torch.randn(2, 3, 32, 32)
    features = loaded.backbones[0].module(images)
    torch.testing.assert_close(loaded.head(features), network.eval()(images))
    assert config.classes == source.classes
    assert config.backbones[0].preprocessing == PREPROCESSING
    assert config.metrics == {"acc@1": 69.8}
    assert config.lineage["source"] == source.url
    assert config.lineage["sha256"] == hashlib.sha256(shelf.content).hexdigest()
    assert progress[-1] == (len(shelf.content), len(shelf.content))
    assert shelf.paths == [httpx.URL(source.url).path]


def test_a_second_pull_does_nothing_and_says_so(
    shelf: Shelf, store: ModelStore, cache: Path, offer: Callable[..., pull.Published], caplog: pytest.LogCaptureFixture
) -> None:
    offer()
    first = pull.pull("lenet5", store, cache, base_url=shelf.url)
    with caplog.at_level(logging.INFO):
        assert pull.pull("lenet5", store, cache, base_url=shelf.url) == first
    assert "in the store already, as version 1" in caplog.text
    assert len(shelf.requests) == 1
    assert not list(cache.glob("*.pth*")), "the store has the weights; a second copy is no use"


@pytest.mark.parametrize(("damaged", "versions"), [("backbone", [1]), ("head", [1, 2])])
def test_a_damaged_model_is_pulled_again(
    shelf: Shelf,
    store: ModelStore,
    cache: Path,
    offer: Callable[..., pull.Published],
    damaged: str,
    versions: list[int],
) -> None:
    offer()
    config = pull.pull("lenet5", store, cache, base_url=shelf.url)
    folder = store.backbones.folder(config.backbones[0]) if damaged == "backbone" else store.models / "lenet5" / "1"
    next(folder.glob("*.safetensors")).write_bytes(b"")
    again = pull.pull("lenet5", store, cache, base_url=shelf.url)
    assert store.versions("lenet5") == versions
    store.load("lenet5", again.version)


def test_a_file_in_the_cache_needs_no_network(
    shelf: Shelf, store: ModelStore, cache: Path, offer: Callable[..., pull.Published]
) -> None:
    file = cache / Path(offer().url).name
    cache.mkdir()
    file.write_bytes(shelf.content)
    pull.pull("lenet5", store, cache, base_url="http://127.0.0.1:1")
    assert file.exists()
    assert shelf.requests == []


def test_a_wrong_hash_is_refused_and_deleted(
    shelf: Shelf, store: ModelStore, cache: Path, offer: Callable[..., pull.Published]
) -> None:
    offer(sha256="deadbeef")
    got = hashlib.sha256(shelf.content).hexdigest()[:16]
    with pytest.raises(DownloadError, match=f"begins with deadbeef, got {got}"):
        pull.pull("lenet5", store, cache, base_url=shelf.url)
    assert not list(cache.glob("*.pth*"))
    assert store.names() == []


def fetched(shelf: Shelf, cache: Path) -> bytes:
    prefix = hashlib.sha256(shelf.content).hexdigest()[:8]
    return download.fetch(httpx.URL(f"{shelf.url}/net-{prefix}.pth"), cache).read_bytes()


def test_a_cut_connection_is_resumed(shelf: Shelf, cache: Path) -> None:
    shelf.content, shelf.cut_after = bytes(range(256)) * 1000, [100_000, 50_000]
    assert fetched(shelf, cache) == shelf.content
    assert [request.get("Range") for request in shelf.requests] == [None, "bytes=100000-", "bytes=150000-"]
    assert shelf.requests[1]["If-Range"] == '"one"'


def test_a_download_is_resumed_by_a_later_run(shelf: Shelf, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shelf.content, shelf.cut_after = bytes(range(256)) * 1000, [1000]
    with monkeypatch.context() as patch:
        patch.setattr(download, "ATTEMPTS", 1)
        with pytest.raises(DownloadError, match="could not be fetched in 1 attempts"):
            fetched(shelf, cache)
    assert fetched(shelf, cache) == shelf.content
    assert shelf.requests[1]["Range"] == "bytes=1000-"
    assert not list(cache.glob("*.part*"))


def test_a_server_without_ranges_is_asked_from_the_start(shelf: Shelf, cache: Path) -> None:
    shelf.content, shelf.cut_after, shelf.ranges = bytes(range(256)) * 1000, [100_000], False
    assert fetched(shelf, cache) == shelf.content
    assert len(shelf.requests) == 2


def test_a_file_that_changed_meanwhile_is_fetched_from_the_start(shelf: Shelf, cache: Path) -> None:
    shelf.content = bytes(range(256)) * 1000
    name = f"net-{hashlib.sha256(shelf.content).hexdigest()[:8]}.pth"
    cache.mkdir()
    (cache / f"{name}.part").write_bytes(b"old" * 100)
    (cache / f"{name}.part.validator").write_text('"zero"')
    assert fetched(shelf, cache) == shelf.content


def test_a_part_longer_than_the_file_is_thrown_away(shelf: Shelf, cache: Path) -> None:
    shelf.content = b"short"
    name = f"net-{hashlib.sha256(shelf.content).hexdigest()[:8]}.pth"
    cache.mkdir()
    (cache / f"{name}.part").write_bytes(b"longer than that")
    assert fetched(shelf, cache) == shelf.content


def test_a_server_that_recovers_is_waited_for(shelf: Shelf, cache: Path) -> None:
    shelf.content, shelf.statuses = b"weights", [503, 429, 500]
    assert fetched(shelf, cache) == shelf.content


def test_a_body_that_is_always_cut_is_given_up(shelf: Shelf, cache: Path) -> None:
    shelf.content, shelf.ranges, shelf.cut_after = bytes(10_000), False, [10] * download.ATTEMPTS
    with pytest.raises(DownloadError, match="5 attempts"):
        fetched(shelf, cache)


def test_a_missing_file_is_not_asked_for_twice(shelf: Shelf, cache: Path) -> None:
    shelf.statuses = [404]
    with pytest.raises(DownloadError, match="404 Not Found"):
        fetched(shelf, cache)
    assert len(shelf.requests) == 1


def test_an_endless_body_is_cut(shelf: Shelf, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "MAX_BYTES", 1000)
    shelf.content = bytes(2000)
    with pytest.raises(DownloadError, match="more than 1000 bytes"):
        fetched(shelf, cache)


def test_a_file_without_a_hash_in_its_name_is_not_fetched(shelf: Shelf, cache: Path) -> None:
    with pytest.raises(DownloadError, match="no hash"):
        download.fetch(httpx.URL(f"{shelf.url}/net.pth"), cache)
    assert shelf.requests == []


def test_a_host_that_is_not_there(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "BACKOFF_S", 0)
    with pytest.raises(DownloadError, match="Connection refused"):
        download.fetch(httpx.URL("http://127.0.0.1:1/net-00000000.pth"), cache)


class Payload:
    """Touches a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, str]]:
        return open, (str(self.path), "w")


def test_a_payload_in_a_published_file_is_not_run(
    shelf: Shelf, store: ModelStore, cache: Path, tmp_path: Path, offer: Callable[..., pull.Published]
) -> None:
    offer(saved({"fc.weight": Payload(tmp_path / "touched")}))
    with pytest.raises(WeightsError, match=r"no plain tensors: fc\.weight"):
        pull.pull("lenet5", store, cache, base_url=shelf.url)
    assert not (tmp_path / "touched").exists()
    assert store.names() == []


def test_torchvisions_own_record_of_its_weights() -> None:
    source = pull.published("inception_v3")
    assert source.weights == "Inception_V3_Weights.IMAGENET1K_V1"
    assert download.hash_prefix(Path(source.url).name) == "0cc3c7bd"
    assert (source.preprocessing.resize, source.preprocessing.crop) == (342, 299)
    assert (len(source.classes), source.classes[134], source.metrics["acc@1"]) == (1000, "crane bird", 77.294)
    assert pull.published("resnet50", "IMAGENET1K_V2").preprocessing.resize == 232
    with pytest.raises(WeightsError, match="no published weights"):
        pull.published("lenet5")


def test_a_real_squeezenet_with_its_convolution_as_last_layer(
    shelf: Shelf, store: ModelStore, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    squeezenet = architectures.build("squeezenet1_1").eval()
    shelf.content = saved(squeezenet.state_dict())
    name = f"squeezenet1_1-{hashlib.sha256(shelf.content).hexdigest()[:8]}.pth"
    source = dataclasses.replace(pull.published("squeezenet1_1"), url=f"https://weights.example/{name}")
    monkeypatch.setattr(pull, "published", lambda name, weights: source)
    pull.pull("squeezenet1_1", store, cache, base_url=shelf.url)
    loaded = store.load("squeezenet1_1")
    image = torch.randn(1, 3, 224, 224)
    torch.testing.assert_close(loaded.head(loaded.backbones[0].module(image)), squeezenet(image))


def test_the_group_shares_its_backbones_with_its_ensemble(
    shelf: Shelf, store: ModelStore, cache: Path, offer: Callable[..., pull.Published], monkeypatch: pytest.MonkeyPatch
) -> None:
    offer()
    monkeypatch.setattr(pull, "IMAGENET_GROUP", ("lenet5", "lenet5"))
    first, second, both = pull.pull_group(store, cache, base_url=shelf.url)
    assert first == second
    assert both.name == "imagenet-ensemble"
    assert both.backbones == first.backbones * 2
    assert pull.pull_group(store, cache, base_url=shelf.url)[-1] == both


def test_packaged_models_need_no_network(store: ModelStore, cache: Path) -> None:
    config = pull.pull("efficientnet_lite0", store, cache, base_url="http://127.0.0.1:1")
    assert (config.name, config.lineage["licence"], len(config.classes)) == ("efficientnet_lite0", "Apache-2.0", 1000)
    assert not cache.exists()
