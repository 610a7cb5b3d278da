"""`/models`: what serves, and the admin's routes."""

from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from service_fakes import ADMIN, CLASSES, Service, client_of

pytestmark = pytest.mark.anyio


@pytest.fixture
def service(tmp_path: Path) -> Service:
    return Service(tmp_path)


@pytest.fixture
async def http(service: Service) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(service) as client:
        yield client


async def test_list(http: httpx.AsyncClient) -> None:
    answer = await http.get("/models")
    assert [model["name"] for model in answer.json()["models"]] == ["pets"]


async def test_show(http: httpx.AsyncClient) -> None:
    body = (await http.get("/models/pets")).json()
    assert (body["version"], body["classes"], body["state"]) == (1, CLASSES, "ready")


@pytest.mark.abuse("H15")
@pytest.mark.parametrize("name", ["none", "%2e%2e%2fx", "ü", "n" * 10_000])
async def test_show_what_is_not_there(http: httpx.AsyncClient, name: str) -> None:
    answer = await http.get(f"/models/{name}")
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] in ("model_not_found", "not_found")


async def test_activate(http: httpx.AsyncClient) -> None:
    answer = await http.post("/models/pets/activate", json={"version": 2}, headers=ADMIN)
    assert (answer.status_code, answer.json()["version"]) == (200, 2)


async def test_activate_a_version_that_is_not_there(http: httpx.AsyncClient) -> None:
    answer = await http.post("/models/pets/activate", json={"version": 9}, headers=ADMIN)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


async def test_a_version_that_does_not_load_is_not_activated(http: httpx.AsyncClient, service: Service) -> None:
    service.engine.broken = {2}
    answer = await http.post("/models/pets/activate", json={"version": 2}, headers=ADMIN)
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "invalid_weights")
    assert (service.engine.version, service.store.version) == (1, 1)


@pytest.mark.abuse("H15")
@pytest.mark.parametrize(
    ("method", "path"),
    [
        pytest.param("GET", "/models/NOT%20A%20NAME", id="show"),
        pytest.param("POST", "/models/NOT%20A%20NAME/activate", id="activate"),
        pytest.param("POST", "/models/NOT%20A%20NAME/rollback", id="rollback"),
        pytest.param("DELETE", "/models/NOT%20A%20NAME", id="remove"),
        pytest.param("DELETE", "/models/NOT%20A%20NAME/versions/1", id="remove a version"),
    ],
)
async def test_a_name_that_no_model_can_have_is_not_there(http: httpx.AsyncClient, method: str, path: str) -> None:
    body = {"version": 1} if path.endswith("activate") else None
    answer = await http.request(method, path, json=body, headers=ADMIN)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        pytest.param('{"version": "2"}', 422, "validation_error", "version", id="text"),
        pytest.param('{"version": 0}', 422, "validation_error", "version", id="zero"),
        pytest.param('{"version": 2, "force": true}', 422, "unknown_field", "force", id="unknown field"),
        pytest.param("{}", 422, "validation_error", "version", id="missing"),
        pytest.param("{version", 400, "bad_request", None, id="no JSON"),
    ],
)
async def test_activate_refuses_a_wrong_body(
    http: httpx.AsyncClient, body: str, status: int, code: str, param: str | None
) -> None:
    headers = ADMIN | {"Content-Type": "application/json"}
    answer = await http.post("/models/pets/activate", content=body, headers=headers)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (status, code, param)


async def test_roll_back_with_nothing_before(http: httpx.AsyncClient) -> None:
    answer = await http.post("/models/pets/rollback", headers=ADMIN)
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "name_conflict")


async def test_sync(http: httpx.AsyncClient, service: Service) -> None:
    service.store.version = 2
    answer = await http.post("/models/sync", headers=ADMIN)
    assert answer.json()["models"][0]["version"] == 2


async def test_remove(http: httpx.AsyncClient, service: Service) -> None:
    answers = [await http.delete(path, headers=ADMIN) for path in ("/models/pets", "/models/pets/versions/2")]
    assert [answer.status_code for answer in answers] == [204, 204]
    assert service.store.calls == [("remove", "pets", None), ("remove", "pets", 2)]
