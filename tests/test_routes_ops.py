"""Health and metrics."""

import asyncio
import threading
from pathlib import Path

import httpx
import pytest
from support.service_fakes import API_KEY, GOOD, Service
from support.service_fakes import http as http

pytestmark = pytest.mark.anyio


@pytest.fixture
def service(tmp_path: Path) -> Service:
    return Service(tmp_path, api_key=API_KEY)  # health and metrics are open all the same


@pytest.mark.system
@pytest.mark.parametrize("path", ["/health/live", "/health/ready", "/metrics", "/docs", "/openapi.json", "/"])
async def test_open_to_all(http: httpx.AsyncClient, path: str) -> None:
    assert (await http.get(path)).status_code == 200


async def test_not_ready_says_why(http: httpx.AsyncClient, service: Service) -> None:
    service.engine.is_ready = False
    answer = await http.get("/health/ready")
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "2")
    assert answer.json()["error"]["message"] == "the default model is still loading"


@pytest.mark.parametrize("path", ["/health/live", "/health/ready"])
async def test_head_tells_as_get_does(http: httpx.AsyncClient, service: Service, path: str) -> None:
    good = await http.head(path)
    service.engine.is_ready = service.engine.is_live = False
    assert (good.status_code, (await http.head(path)).status_code) == (200, 503)


async def test_not_ready_while_draining_but_live(http: httpx.AsyncClient, service: Service) -> None:
    service.engine.draining = True
    ready, live = await http.get("/health/ready"), await http.get("/health/live")
    assert (ready.status_code, ready.json()["error"]["code"], live.status_code) == (503, "draining", 200)


async def test_not_live_when_a_device_hangs(http: httpx.AsyncClient, service: Service) -> None:
    service.engine.is_live = False
    assert (await http.get("/health/live")).status_code == 503


async def test_metrics_say_whether_it_is_ready_and_how_many_jobs_there_are(
    http: httpx.AsyncClient, service: Service
) -> None:
    before = (await http.get("/metrics")).text
    service.engine.is_ready = False
    after = (await http.get("/metrics")).text
    assert "imago_ready 1.0" in before.splitlines()
    assert "imago_ready 0.0" in after.splitlines()
    assert 'imago_jobs{status="failed"} 0.0' in after.splitlines()


async def test_metrics_say_how_full_a_device_is(http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "device=" not in (await http.get("/metrics")).text
    monkeypatch.setattr("service.routes.ops.memory", lambda device: (3, 8))
    lines = (await http.get("/metrics")).text.splitlines()
    assert 'imago_device_memory_used_bytes{device="cpu"} 3.0' in lines
    assert 'imago_device_memory_total_bytes{device="cpu"} 8.0' in lines


async def test_a_device_that_hangs_takes_no_metrics_with_it(
    http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = threading.Event()
    monkeypatch.setattr("service.routes.ops.MEASURE_S", 0.02)
    monkeypatch.setattr("service.routes.ops.memory", lambda device: (0, int(answers.wait(20))))
    try:
        assert "imago_ready 1.0" in (await asyncio.wait_for(http.get("/metrics"), 10)).text
    finally:
        answers.set()


@pytest.mark.abuse("H18")
async def test_metrics_count_by_route_template(http: httpx.AsyncClient, service: Service) -> None:
    headers = {"Authorization": f"Bearer {API_KEY}"}
    await http.post("/predict", content=GOOD, headers=headers)
    await http.get("/models/anything", headers=headers)
    await http.get("/made/up/by/a/caller")
    text = (await http.get("/metrics")).text
    assert 'imago_requests_total{method="POST",route="/predict",status="200"} 1.0' in text
    assert 'imago_requests_total{method="GET",route="/models/{name}",status="404"} 1.0' in text
    assert 'imago_requests_total{method="GET",route="other",status="404"} 1.0' in text
    assert "made/up" not in text


async def hostile_round(http: httpx.AsyncClient, word: str) -> set[str]:
    """Sends a word wherever a caller may put one; returns the names and labels of all series there are then."""
    key = {"Authorization": f"Bearer {API_KEY}"}
    for path in (f"/{word}", f"/models/{word}", f"/finetune/{word}", f"/health/{word}", f"/predict/{word}"):
        await http.get(path, headers=key)
    await http.request(word.upper(), "/predict", headers=key | {"X-Request-ID": word, "User-Agent": word, "Host": word})
    await http.post("/predict", params={"model": word}, content=GOOD, headers=key)
    await http.post("/predict", params={word: word}, content=GOOD, headers=key)
    await http.post("/predict", files={"file": (word, GOOD)}, headers=key)
    await http.post("/predict", files={"file": (word, b"no image")}, headers={"Authorization": f"Bearer {word}"})
    return {line.rpartition(" ")[0] for line in (await http.get("/metrics")).text.splitlines() if line[0] != "#"}


@pytest.mark.abuse("H18")
async def test_no_series_is_made_by_what_callers_choose(http: httpx.AsyncClient) -> None:
    await http.get("/metrics")
    first, second = await hostile_round(http, "evilone"), await hostile_round(http, "eviltwo")
    assert first == second
    assert not [series for series in second if "evil" in series]
