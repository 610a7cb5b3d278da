"""No request keeps the event loop waiting: hostile bodies, large answers, a thousand models."""

import gzip
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import httpx
import pytest
import torch
from support import hostile
from support.attack_driver import LONGEST_STALL_MS, Hostile, attack
from support.image_files import save, solid
from support.live_server import LiveServer, live_server
from support.live_server import weights as weights

from models import architectures
from models.classifier import Head
from models.store.store import ModelStore

KEY = "k" * 32
ADMIN = {"Authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="module")
def server(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with live_server(weights, tmp_path_factory.mktemp("server"), env={"IMAGO_ADMIN_KEY": KEY}, watched=True) as server:
        yield server


def test_the_driver_measures_a_server(server: LiveServer) -> None:
    seen = attack(server, [Hostile("GET", "/models")] * 3 + [Hostile("GET", "/no-such-path")], clients=2)
    assert seen.statuses == {200: 3, 404: 1}
    assert seen.stall_ms < LONGEST_STALL_MS
    assert seen.peak_mb > 100


@pytest.mark.abuse("A302")
def test_the_openapi_document_is_ready(server: LiveServer) -> None:
    assert attack(server, [Hostile("GET", "/openapi.json")]).stall_ms < LONGEST_STALL_MS


INFER = "/v2/models/insects/infer"
ZIPPED = {"Content-Type": "application/json", "Content-Encoding": "gzip"}


def inferences(size: int) -> list[Hostile]:
    bodies = hostile.infer_bodies(size)
    return [Hostile("POST", INFER, gzip.compress(body, 1), ZIPPED, name) for name, body in bodies]


def worst(server: LiveServer, requests: list[Hostile]) -> list[str]:
    """The requests that stalled the event loop for too long or got a 5xx, each sent alone."""
    found = []
    for request in requests:
        seen = attack(server, [request])
        if seen.stall_ms > LONGEST_STALL_MS or any(status == 0 or status >= 500 for status in seen.statuses):
            found.append(f"{request}: {seen.stall_ms:.0f} ms, {dict(seen.statuses)}")
    return found


@pytest.mark.abuse("A301")
@pytest.mark.parametrize("name", ["data of UINT8: empty lists", "data of FP32: lists of one", "unknown: keys"])
def test_8_kb_of_gzip_do_not_stop_the_event_loop(server: LiveServer, name: str) -> None:
    [body] = [body for found, body in hostile.infer_bodies(2**23 - 2**12) if found == name]
    seen = attack(server, [Hostile("POST", INFER, gzip.compress(body), ZIPPED)])
    assert seen.statuses == {400: 1}
    assert seen.stall_ms < LONGEST_STALL_MS


@pytest.mark.abuse("A301")
@pytest.mark.parametrize("name", ["images: empty lists", "images: one text", "image: escapes", "unknown: keys"])
def test_no_large_json_for_predict_stops_the_event_loop(server: LiveServer, name: str) -> None:
    bodies = hostile.json_bodies({"image": 1, "images": 1}, {}, 2**25)
    [body] = [body for found, body in bodies if found == name]
    seen = attack(server, [Hostile("POST", "/predict", body, {"Content-Type": "application/json"})])
    assert seen.stall_ms < LONGEST_STALL_MS
    assert set(seen.statuses) <= {400, 413, 422}


@pytest.mark.soak
@pytest.mark.abuse("A301")
def test_no_json_for_v2_stops_the_event_loop(server: LiveServer) -> None:
    assert worst(server, inferences(2**23 - 2**12)) == []


def requests_of(server: LiveServer, size: int) -> list[Hostile]:
    return [*hostile.requests(httpx.get(server.url + "/openapi.json").json(), ADMIN, size)]


@pytest.mark.abuse("A302")
def test_some_hostile_requests_of_every_kind(server: LiveServer) -> None:
    some = [*requests_of(server, 2**16 - 2**10)[::23], *inferences(2**16)[::7]]
    seen = attack(server, some)
    assert seen.stall_ms < LONGEST_STALL_MS
    assert not [status for status in seen.statuses if status == 0 or status >= 500]


@pytest.mark.soak
@pytest.mark.abuse("A302")
@pytest.mark.parametrize("size", [2**16 - 2**10, 2**20 - 2**12])
def test_no_hostile_request_to_any_route_stops_the_event_loop(server: LiveServer, size: int) -> None:
    assert worst(server, requests_of(server, size)) == []


# Many models, large answers


def publish(root: Path, count: int, classes: int) -> list[str]:
    """Heads with random weights on one backbone."""
    store, network = ModelStore(root), architectures.create("lenet5", num_classes=3, channels=3)
    ref = store.put_backbone(network.name, network.backbone, network.preprocessing)
    names = [f"m{number:04}" for number in range(count)]
    width = store.load_backbone(ref).feature_dim
    with patch("os.fsync"):
        for name in names:
            layer = torch.nn.Linear(width, classes)
            store.publish(name, [ref], Head.of(layer), [f"class-{number}" for number in range(classes)])
            store.activate(name, 1)
        store.set_default(names[0])
    return names


@pytest.mark.soak
@pytest.mark.abuse("A701")
def test_a_thousand_models_do_not_stop_the_event_loop(tmp_path: Path) -> None:
    publish(tmp_path / "weights", 1000, 3)
    requests = [
        Hostile("GET", "/models"),
        Hostile("GET", "/models?limit=100"),
        Hostile("GET", "/models/m0000"),
        Hostile("GET", "/metrics"),
        Hostile("GET", "/v2/models/stats"),
        Hostile("GET", "/finetune/schema", b"", ADMIN),
        Hostile("POST", "/v2/repository/index", b"", ADMIN),
        Hostile("POST", "/models/sync", b"", ADMIN),
        Hostile("DELETE", "/models/m0999", b"", ADMIN),
        Hostile("POST", "/models/m0001/activate", b'{"version":1}', ADMIN | {"Content-Type": "application/json"}),
    ]
    with live_server(tmp_path / "weights", tmp_path, env={"IMAGO_ADMIN_KEY": KEY}, watched=True) as server:
        assert worst(server, requests) == []
        seen = attack(server, [Hostile("GET", "/models")] * 200, clients=100)
    assert seen.statuses == {200: 200}
    assert seen.stall_ms < LONGEST_STALL_MS
    assert seen.answer_bytes < 2 * 2**20


@pytest.mark.soak
@pytest.mark.abuse("A801")
def test_large_answers_do_not_stop_the_event_loop(tmp_path: Path) -> None:
    names = publish(tmp_path / "weights", 16, 1000)
    part = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    body = b"".join(part + save(solid()) + b"\r\n" for _ in range(32)) + b"--b--\r\n"
    form = {"Content-Type": "multipart/form-data; boundary=b"}

    def predict(models: int, query: str) -> Hostile:
        asked = "&".join(f"model={name}" for name in names[:models])
        return Hostile("POST", f"/predict?{asked}&{query}", body, form)

    with live_server(tmp_path / "weights", tmp_path, watched=True) as server:
        allowed = attack(server, [predict(1, "top_k=1000"), predict(16, "top_k=90"), predict(16, "top_k=5")] * 4, 4)
        refused = attack(server, [predict(6, "top_k=1000"), predict(16, "explain=overlay")])
    assert (allowed.statuses, refused.statuses) == ({200: 12}, {422: 2})
    assert max(allowed.stall_ms, refused.stall_ms) < LONGEST_STALL_MS
    assert allowed.answer_bytes < 5 * 2**20
