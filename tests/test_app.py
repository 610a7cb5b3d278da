"""The application as a whole: one shape for every failure, request ids, CORS."""

import json
from pathlib import Path

import httpx
import pytest
from support.service_fakes import ADMIN, GOOD, Service, client_of
from support.service_fakes import http as http

pytestmark = pytest.mark.anyio


@pytest.fixture
def service(tmp_path: Path) -> Service:
    return Service(tmp_path, cors_origins="https://page.example")


@pytest.mark.abuse("H22")
@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        pytest.param("GET", "/nowhere", 404, "not_found", id="404"),
        pytest.param("GET", "/predict", 405, "method_not_allowed", id="405"),
        pytest.param("TRACE", "/predict", 405, "method_not_allowed", id="TRACE"),
        pytest.param("OPTIONS", "/models/sync", 405, "method_not_allowed", id="OPTIONS"),
        pytest.param("GET", "/predict/", 404, "not_found", id="no redirect"),
        pytest.param("GET", "/" + "x" * 60_000, 404, "not_found", id="long path"),
        pytest.param("POST", "/models/sync", 401, "unauthorized", id="401"),
    ],
)
async def test_the_frameworks_errors_have_our_shape(
    http: httpx.AsyncClient, method: str, path: str, status: int, code: str
) -> None:
    answer = await http.request(method, path)
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/json"
    assert set(answer.json()["error"]) == {"code", "message", "param", "request_id"}
    assert answer.json()["error"]["code"] == code
    assert answer.json()["error"]["request_id"] == answer.headers["x-request-id"]


@pytest.mark.abuse("H22")
@pytest.mark.parametrize(
    ("path", "allow"),
    [("/predict", "POST"), ("/models/pets", "DELETE, GET"), ("/finetune", "GET, POST"), ("/health/live", "GET, HEAD")],
)
async def test_405_says_what_is_allowed(http: httpx.AsyncClient, path: str, allow: str) -> None:
    answer = await http.request("PATCH", path)
    assert (answer.status_code, answer.headers["allow"]) == (405, allow)


async def test_a_bug_is_500_with_a_fixed_text_and_its_id_in_the_log(
    http: httpx.AsyncClient, service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    service.engine.error = ZeroDivisionError("secret")
    answer = await http.post("/predict", content=GOOD, headers={"X-Request-ID": "bug-1"})
    assert answer.status_code == 500
    assert answer.json()["error"] == {
        "code": "internal",
        "message": "internal error; the log has the details",
        "param": None,
        "request_id": "bug-1",
    }
    assert "request bug-1 failed" in caplog.text
    assert "ZeroDivisionError: secret" in caplog.text


@pytest.mark.abuse("G4")
async def test_nan_never_reaches_the_wire(http: httpx.AsyncClient, service: Service) -> None:
    service.engine.registry.version = float("nan")  # type: ignore[assignment]
    assert (await http.post("/predict", content=GOOD)).status_code == 500


@pytest.mark.parametrize(
    ("given", "echoed"),
    [
        pytest.param(b"abc-123", True, id="plain"),
        pytest.param(b"x" * 128, True, id="longest"),
        pytest.param(b"x" * 129, False, id="too long"),
        pytest.param(b"a b", False, id="space"),
        pytest.param(b'a"b', False, id="quote"),
        pytest.param("ü".encode(), False, id="not ASCII"),
        pytest.param(b"\x1b[31m", False, id="ANSI"),
        pytest.param(b"", False, id="empty"),
    ],
)
async def test_request_ids(http: httpx.AsyncClient, given: bytes, echoed: bool) -> None:
    answer = await http.get("/health/live", headers=[(b"X-Request-ID", given)])
    shown = answer.headers["x-request-id"]
    assert (shown.encode() == given) if echoed else len(shown) == 16


async def test_every_answer_forbids_sniffing(http: httpx.AsyncClient) -> None:
    assert (await http.get("/models")).headers["x-content-type-options"] == "nosniff"


@pytest.mark.abuse("H19")
async def test_cors_for_the_listed_origin_on_user_routes(http: httpx.AsyncClient) -> None:
    answer = await http.post("/predict", content=GOOD, headers={"Origin": "https://page.example"})
    other = await http.post("/predict", content=GOOD, headers={"Origin": "https://evil.example"})
    assert answer.headers["access-control-allow-origin"] == "https://page.example"
    assert "access-control-allow-origin" not in other.headers


@pytest.mark.abuse("H19")
async def test_by_default_no_origin_is_let_in(tmp_path: Path) -> None:
    origin = {"Origin": "https://page.example"}
    async with client_of(Service(tmp_path)) as http:
        answer = await http.post("/predict", content=GOOD, headers=origin)
        preflight = await http.options("/predict", headers=origin | {"Access-Control-Request-Method": "POST"})
    assert preflight.status_code == 405
    assert not [name for reply in (answer, preflight) for name in reply.headers if name.startswith("access-control-")]


@pytest.mark.abuse("H19")
@pytest.mark.parametrize("origins", ["*", "https://page.example"])
async def test_no_origin_sends_credentials(tmp_path: Path, origins: str) -> None:
    origin = {"Origin": "https://page.example", "Cookie": "a=b", "Access-Control-Request-Method": "POST"}
    async with client_of(Service(tmp_path, cors_origins=origins)) as http:
        answers = [
            await http.post("/predict", content=GOOD, headers=origin),
            await http.options("/predict", headers=origin),
        ]
    assert [answer.status_code for answer in answers] == [200, 200]
    assert all("access-control-allow-credentials" not in answer.headers for answer in answers)


@pytest.mark.abuse("H19")
@pytest.mark.parametrize(
    ("path", "method"),
    [
        pytest.param("/models/sync", "POST", id="sync"),
        pytest.param("/models/pets", "DELETE", id="remove"),
        pytest.param("/models/pets/activate", "POST", id="activate"),
    ],
)
async def test_no_cors_for_admin_routes(http: httpx.AsyncClient, path: str, method: str) -> None:
    origin = {"Origin": "https://page.example"}
    preflight = await http.options(path, headers=origin | {"Access-Control-Request-Method": method})
    answer = await http.request(method, path, headers=ADMIN | origin)
    assert preflight.status_code in (400, 405)
    assert "access-control-allow-origin" not in answer.headers


async def test_the_lifespan_closes_the_engine(service: Service) -> None:
    async with client_of(service):
        assert not service.engine.closed
    assert service.engine.closed


async def test_labels_in_utf8(http: httpx.AsyncClient) -> None:
    answer = await http.post("/predict", files={"file": ("Käfer.jpg", GOOD)})
    assert "Käfer.jpg" in answer.content.decode()
    json.loads(answer.content)
