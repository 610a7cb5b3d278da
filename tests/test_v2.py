"""`/v2` in process, around the real engine and tiny networks."""

import base64
import gzip
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from support.service_fakes import ADMIN, Service, client_of
from support.v2_requests import KIND, PICTURES, PIXELS, binary, body, elements, tensor

from models import architectures
from models.classifier import Head, HeadConfig, LayerConfig
from models.preprocessing import Preprocessing, normalise
from models.store.store import ModelStore
from service.app import create_app
from service.inference.engine import Engine

pytestmark = [pytest.mark.system, pytest.mark.anyio]
OTHER = Preprocessing(resize=40, crop=32, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
CLASSES = ["ant", "bee", "cat"]
INFER = "/v2/models/tiny/infer"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two versions of `tiny`, of which the first is served; `pair`, whose members want different pixels; `spare`, which is not served."""
    store = ModelStore(tmp_path_factory.mktemp("weights"))
    network = architectures.create("lenet5", 3, channels=3)
    first = store.put_backbone("lenet5", network.backbone, KIND)
    second = store.put_backbone("lenet5", network.backbone, OTHER)
    for name in ("tiny", "tiny", "spare"):
        store.publish(name, [first], Head.of(network.layer), CLASSES)
    layers = (LayerConfig(in_features=network.feature_dim),) * 2
    store.publish("pair", [first, second], Head(HeadConfig(kind="mean", layers=layers), 3), CLASSES)
    store.activate("tiny", 1)
    store.activate("pair", 1)
    return store.root


@pytest.fixture
def service(weights: Path, tmp_path: Path) -> Service:
    options = {"weights": weights, "device": "cpu", "engine": "torch", "max_batch": 8, "threads": 1}
    service = Service(tmp_path, **options, max_files=4, max_multipart_mb=1)
    store = ModelStore(weights)
    service.engine = Engine(service.settings, store, service.metrics)  # type: ignore[assignment]
    service.app = create_app(service.settings, service.engine, store, service.metrics, traffic=service.traffic)
    return service


@pytest.fixture
async def http(service: Service) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(service) as client:
        await service.engine.wait_ready(60)
        client.headers["Accept-Encoding"] = "identity"
        yield client


async def predicted(http: httpx.AsyncClient, model: str = "tiny") -> np.ndarray[Any, Any]:
    """What /predict makes of the pictures: (2, 3)."""
    answer = await http.post(f"/predict?model={model}", files=[("file", ("a.png", file)) for file in PICTURES])
    rows = [{p["index"]: p["probability"] for p in result["predictions"]} for result in answer.json()["results"]]
    return np.array([[row[i] for i in range(3)] for row in rows], np.float32)


def probabilities(answer: httpx.Response) -> np.ndarray[Any, Any]:
    assert answer.status_code == 200, answer.text
    [output] = answer.json()["outputs"]
    return np.array(output["data"], np.float32).reshape(output["shape"])


def sized(header_length: int) -> dict[str, str]:
    return {"Inference-Header-Content-Length": str(header_length)}


async def test_every_kind_of_input_gets_the_numbers_of_predict(http: httpx.AsyncClient) -> None:
    floats = normalise(PIXELS, KIND).numpy()
    inputs = [
        ("UINT8", (2, 3, 32, 32), PIXELS.numpy().tobytes()),
        ("UINT8", (2, 32, 32, 3), PIXELS.permute(0, 2, 3, 1).numpy().tobytes()),
        ("FP32", (2, 3, 32, 32), floats.astype("<f4").tobytes()),
        ("BYTES", (2, 1), elements(*PICTURES)),
    ]
    expected = await predicted(http)
    for given in inputs:
        content, size = binary(*given)
        answer = probabilities(await http.post(INFER, content=content, headers=sized(size)))
        assert np.allclose(answer, expected, atol=1e-6), given[:2]


async def test_the_same_in_json(http: httpx.AsyncClient) -> None:
    expected = await predicted(http)
    texts = [base64.b64encode(file).decode() for file in PICTURES]
    pixels = tensor("FP32", (2, 3, 32, 32), data=normalise(PIXELS, KIND).tolist())
    for given in (pixels, tensor("BYTES", (2,), data=texts)):
        answer = await http.post(INFER, content=body(given, id="7"))
        assert answer.json() | {"outputs": 0} == {"model_name": "tiny", "model_version": "1", "id": "7", "outputs": 0}
        assert np.allclose(probabilities(answer), expected, atol=1e-6)


async def test_a_bare_image_is_answered_in_binary(http: httpx.AsyncClient) -> None:
    answer = await http.post(INFER, content=PICTURES[0], headers=sized(0))
    size = int(answer.headers["inference-header-content-length"])
    [output] = json.loads(answer.content[:size])["outputs"]
    assert (answer.headers["content-type"], output["shape"]) == ("application/octet-stream", [1, 3])
    assert np.allclose(np.frombuffer(answer.content[size:], "<f4"), (await predicted(http))[0], atol=1e-6)
    assert answer.headers["server-timing"].startswith("decode;dur=")


async def test_networks_that_want_different_pixels_take_encoded_images(http: httpx.AsyncClient) -> None:
    metadata = (await http.get("/v2/models/pair")).json()
    files, size = binary("BYTES", (2,), elements(*PICTURES))
    answer = await http.post("/v2/models/pair/infer", content=files, headers=sized(size))
    pixels = await http.post("/v2/models/pair/infer", content=body(tensor(data=[0] * 3072)))
    assert (metadata["inputs"][0]["datatype"], metadata["inputs"][0]["shape"]) == ("BYTES", [-1, 1])
    assert np.allclose(probabilities(answer), await predicted(http, "pair"), atol=1e-6)
    assert (pixels.status_code, "BYTES" in pixels.json()["error"]) == (400, True)


async def test_a_bad_image_fails_its_request_by_its_number(http: httpx.AsyncClient, service: Service) -> None:
    content, size = binary("BYTES", (2,), elements(PICTURES[0], PICTURES[1][:200]))
    answer = await http.post(INFER, content=content, headers=sized(size))
    assert answer.status_code == 422
    assert answer.json() == {"error": "image 2 of 2: truncated PNG: its image data breaks off after 200 bytes"}
    assert service.count("imago_images_total", outcome="invalid_image") == 1


@pytest.mark.parametrize(
    ("method", "path", "status", "text"),
    [
        pytest.param("GET", "/v2/nowhere", 404, "no such path", id="path"),
        pytest.param("PUT", "/v2", 405, "no such method", id="method"),
        pytest.param("GET", "/v2/models/none", 404, "no model of that name", id="model"),
        pytest.param("GET", "/v2/models/A%20b", 404, "no model has such a name", id="impossible name"),
        pytest.param("GET", "/v2/models/tiny/versions/2", 404, "version 1 is", id="another version"),
        pytest.param("GET", "/v2/models/tiny/versions/x/ready", 404, "whole number", id="no version"),
        pytest.param("POST", "/v2/models/none/infer", 404, "no model of that name", id="infer"),
        pytest.param("POST", INFER, 400, "EOF", id="no body"),
        pytest.param("POST", "/v2/repository/index", 401, "admin key", id="no key"),
    ],
)
async def test_failures_have_the_protocols_shape(
    http: httpx.AsyncClient, method: str, path: str, status: int, text: str
) -> None:
    answer = await http.request(method, path)
    assert (answer.status_code, list(answer.json())) == (status, ["error"])
    assert text in answer.json()["error"]


@pytest.mark.parametrize("length", ["-1", "x", "99999", "9" * 40])
async def test_header_lengths_that_cannot_be(http: httpx.AsyncClient, length: str) -> None:
    answer = await http.post(INFER, content=b"{}", headers={"Inference-Header-Content-Length": length})
    assert (answer.status_code, list(answer.json())) == (400, ["error"])


async def test_a_compressed_request_and_a_small_answer(http: httpx.AsyncClient) -> None:
    content, size = binary("UINT8", (2, 3, 32, 32), PIXELS.numpy().tobytes())
    headers = sized(size) | {"Content-Encoding": "gzip", "Accept-Encoding": "gzip"}
    small = await http.post(INFER, content=gzip.compress(content), headers=headers)
    assert np.allclose(probabilities(small), await predicted(http), atol=1e-6)
    assert "content-encoding" not in small.headers


async def test_a_large_answer_is_compressed_for_who_asks(http: httpx.AsyncClient) -> None:
    content = body(tensor(data=[0] * 3072), id="x" * 2000)
    plain = await http.post(INFER, content=content)
    packed = await http.post(INFER, content=content, headers={"Accept-Encoding": "deflate"})
    assert packed.headers["content-encoding"] == "deflate"
    assert int(packed.headers["content-length"]) < len(plain.content) == len(packed.content)


async def test_a_bomb_is_refused_at_the_limit(http: httpx.AsyncClient, service: Service) -> None:
    bomb = gzip.compress(b"0" * 2**26)
    answer = await http.post(INFER, content=bomb, headers={"Content-Encoding": "gzip"})
    assert answer.status_code == 413
    assert answer.json() == {"error": "the request body is larger than 1 MB"}
    assert service.count("imago_rejected_total", reason="too_large") == 1


async def test_other_routes_inflate_nothing(http: httpx.AsyncClient) -> None:
    answer = await http.post("/predict", content=gzip.compress(PICTURES[0]), headers={"Content-Encoding": "gzip"})
    assert answer.status_code == 415


async def test_priority_becomes_a_head_start_and_a_long_timeout_none(
    http: httpx.AsyncClient, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[bool, float]] = []
    submit = service.engine.batcher.submit

    async def noted(queue: Any, item: Any) -> Any:
        asked.append((item.deadline - time.monotonic() <= 10, item.head_start_s))
        return await submit(queue, item)

    monkeypatch.setattr(service.engine.batcher, "submit", noted)
    for parameters in ({"timeout": 10**12, "priority": 1}, {"priority": 3}, {"priority": 9}):
        answer = await http.post(INFER, content=body(tensor(data=[0] * 3072), parameters=parameters))
        assert answer.status_code == 200
    assert asked == [(True, 1.0), (True, -1.0), (True, 0.0)]


async def test_a_passed_timeout_is_504(http: httpx.AsyncClient, service: Service) -> None:
    [backbone] = service.engine.registry.bind("tiny").backbones
    [runtime] = backbone.queue.runtimes.values()
    backbone.queue.runtimes = {torch.device("cpu"): Slow(runtime)}
    answer = await http.post(INFER, content=body(tensor(data=[0] * 3072), parameters={"timeout": 20_000}))
    assert (answer.status_code, answer.json()) == (504, {"error": "no answer within 20 ms"})


class Slow:
    """A runtime that takes its time."""

    def __init__(self, runtime: Any) -> None:
        self.runtime, self.max_batch = runtime, runtime.max_batch

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        time.sleep(0.2)
        features: torch.Tensor = self.runtime(pixels)
        return features

    def with_maps(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        raise AssertionError("nobody asks for maps here")


async def test_one_request_has_so_many_images(http: httpx.AsyncClient) -> None:
    config = (await http.get("/v2/models/tiny/config")).json()
    answer = await http.post(INFER, content=body(tensor(shape=(5, 3, 32, 32), data=[0] * 5 * 3072)))
    assert config["max_batch_size"] == 4
    assert (answer.status_code, answer.json()) == (
        400,
        {"error": "a request has 1 to 4 images: the first number of the shape"},
    )


async def test_statistics_count_every_route(http: httpx.AsyncClient) -> None:
    await predicted(http)
    await http.post(INFER, content=body(tensor(data=[0] * 3072)))
    await http.post(INFER, content=b"no image", headers=sized(0))
    [stats] = (await http.get("/v2/models/tiny/versions/1/stats")).json()["model_stats"]
    counts = {name: stats["inference_stats"][name]["count"] for name in ("success", "fail", "queue", "compute_infer")}
    assert (stats["inference_count"], counts) == (3, {"success": 2, "fail": 1, "queue": 2, "compute_infer": 2})
    assert stats["execution_count"] >= 2
    assert stats["inference_stats"]["success"]["ns"] > stats["inference_stats"]["compute_infer"]["ns"] > 0
    everything = (await http.get("/v2/models/stats")).json()["model_stats"]
    assert sorted(model["name"] for model in everything) == ["pair", "tiny"]


async def test_the_repository(http: httpx.AsyncClient) -> None:
    async def rows(**body: Any) -> dict[tuple[str, str], str]:
        answer = await http.post("/v2/repository/index", json=body or None, headers=ADMIN)
        return {(row["name"], row["version"]): row["state"] for row in answer.json()}

    ready = {("tiny", "1"): "READY", ("pair", "1"): "READY"}
    assert await rows() == ready | {("tiny", "2"): "UNAVAILABLE", ("spare", "1"): "UNAVAILABLE"}
    loaded = await http.post("/v2/repository/models/spare/load", headers=ADMIN)
    assert (loaded.status_code, loaded.content) == (200, b"")
    assert await rows(ready=True) == ready | {("spare", "1"): "READY"}
    unloaded = await http.post(
        "/v2/repository/models/spare/unload", json={"parameters": {"unload_dependents": True}}, headers=ADMIN
    )
    assert (unloaded.status_code, await rows(ready=True)) == (200, ready)
    assert (await http.get("/v2/models/spare/ready")).status_code == 404


@pytest.mark.parametrize(
    ("path", "sent", "status"),
    [
        pytest.param("spare/unload", {}, 404, id="not served"),
        pytest.param("none/load", {}, 404, id="not in the store"),
        pytest.param("spare/load", {"parameters": {"config": "{}"}}, 422, id="a configuration"),
    ],
)
async def test_what_the_repository_refuses(http: httpx.AsyncClient, path: str, sent: Any, status: int) -> None:
    answer = await http.post(f"/v2/repository/models/{path}", json=sent, headers=ADMIN)
    assert (answer.status_code, list(answer.json())) == (status, ["error"])
    assert status != 422 or answer.json()["error"].startswith("parameters.config: ")


async def test_health_and_draining(http: httpx.AsyncClient, service: Service) -> None:
    assert (await http.get("/v2/health/live")).json() == {"live": True}
    assert (await http.get("/v2/health/ready")).json() == {"ready": True}
    service.engine.draining = True
    answers = [await http.get(path) for path in ("/v2/health/ready", "/v2/models/tiny/ready", "/v2")]
    assert [answer.status_code for answer in answers] == [503, 503, 503]
    assert answers[0].json() == {"error": "the server is shutting down"}
