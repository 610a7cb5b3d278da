"""Keys: who is let in, and where the admin key comes from."""

import logging
import stat
from pathlib import Path

import pytest
from fastapi.routing import iter_route_contexts
from starlette.types import Message
from support.service_fakes import ADMIN, ADMIN_KEY, API_KEY, GOOD, Service, client_of

from service.errors import Forbidden, Unauthorized
from service.http.auth import Keys, admin_key_of

OPEN = {"/", "/health/live", "/health/ready", "/metrics", "/docs", "/openapi.json"}
OPEN |= {"/v2/health/live", "/v2/health/ready"}
USER = {("POST", "/predict"), ("POST", "/embed"), ("GET", "/models"), ("GET", "/models/{name}"), ("GET", "/v2")}
USER |= {
    ("GET", "/v2/models/stats"),
    ("POST", "/v2/models/{name}/infer"),
    ("POST", "/v2/models/{name}/versions/{version}/infer"),
}
USER |= {
    ("GET", f"/v2/models/{{name}}{version}{what}")
    for version in ("", "/versions/{version}")
    for what in ("", "/ready", "/config", "/stats")
}


@pytest.mark.abuse("J1")
@pytest.mark.parametrize("key", [None, "", "b" * 32, ADMIN_KEY[:-1], ADMIN_KEY + "a", ADMIN_KEY.upper(), "ü"])
def test_a_wrong_admin_key(key: str | None) -> None:
    with pytest.raises(Unauthorized):
        Keys(ADMIN_KEY, API_KEY).check_admin(key)


@pytest.mark.abuse("J1")
def test_the_api_key_does_not_reach_admin_routes() -> None:
    with pytest.raises(Forbidden):
        Keys(ADMIN_KEY, API_KEY).check_admin(API_KEY)


def test_user_routes_are_open_without_an_api_key() -> None:
    Keys(ADMIN_KEY).check_user(None)


def test_with_an_api_key_either_key_opens_user_routes() -> None:
    keys = Keys(ADMIN_KEY, API_KEY)
    keys.check_user(API_KEY)
    keys.check_user(ADMIN_KEY)
    with pytest.raises(Unauthorized):
        keys.check_user(None)


@pytest.mark.abuse("J1")
def test_the_admin_key_is_made_once_for_the_owner_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    key = admin_key_of(tmp_path / "data")
    path = tmp_path / "data" / "admin.key"
    assert (len(key) >= 32, stat.S_IMODE(path.stat().st_mode)) == (True, 0o600)
    assert admin_key_of(tmp_path / "data") == key
    assert str(path) in caplog.text
    assert key not in caplog.text


@pytest.mark.abuse("J1")
def test_an_empty_key_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "admin.key").write_text("\n")
    with pytest.raises(OSError, match=r"admin\.key holds no key"):
        admin_key_of(tmp_path)


def guarded_routes(service: Service) -> list[tuple[str, str]]:
    """(method, path) of each route that needs a key."""
    routes = {
        (method, route.path or "")
        for route in iter_route_contexts(service.app.routes)
        for method in route.methods or ()
    }
    guarded = sorted((method, path) for method, path in routes if path not in OPEN)
    assert len(guarded) > 30
    return guarded


@pytest.mark.system
@pytest.mark.abuse("J1")
@pytest.mark.anyio
async def test_every_route_but_the_open_ones_wants_a_key(tmp_path: Path) -> None:
    service = Service(tmp_path, api_key=API_KEY)
    guarded = guarded_routes(service)
    async with client_of(service) as http:
        for method, path in guarded:
            url = path.replace("{name}", "pets").replace("{version}", "1")
            bare = await http.request(method, url, json={"version": 1})
            user = await http.request(method, url, headers={"Authorization": f"Bearer {API_KEY}"}, json={"version": 1})
            assert (bare.status_code, bare.headers["www-authenticate"]) == (401, "Bearer"), (method, path)
            assert (user.status_code == 403) == ((method, path) not in USER), (method, path)
    assert service.store.calls == []


@pytest.mark.system
@pytest.mark.abuse("A1616")
@pytest.mark.anyio
@pytest.mark.parametrize("length", [None, b"1", b"99999999999"], ids=["of no length", "broken", "huge"])
async def test_no_body_is_read_before_the_key(tmp_path: Path, length: bytes | None) -> None:
    service = Service(tmp_path, api_key=API_KEY)
    async with client_of(service):
        for method, path in guarded_routes(service):
            url = path.replace("{name}", "pets").replace("{version}", "1")
            steps = await steps_of(service, method, url, length)
            assert steps[0] == 401, (method, path, steps)


async def steps_of(service: Service, method: str, path: str, length: bytes | None) -> list[int | str]:
    """The status of the answer and "read" for each read of the body, in their order; the body is `{`."""
    headers = [(b"content-type", b"application/json")]
    headers.append((b"transfer-encoding", b"chunked") if length is None else (b"content-length", length))
    scope = {"type": "http", "method": method, "path": path, "raw_path": b"", "root_path": "", "query_string": b""}
    steps = list[int | str]()

    async def receive() -> Message:
        steps.append("read")
        return {"type": "http.request", "body": b"{", "more_body": False}

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            steps.append(message["status"])

    await service(scope | {"headers": headers, "client": ("10.0.0.1", 5)}, receive, send)
    return steps


@pytest.mark.anyio
async def test_without_an_api_key_users_need_none(tmp_path: Path) -> None:
    async with client_of(Service(tmp_path)) as http:
        predicted = await http.post("/predict", content=GOOD)
        synced = await http.post("/models/sync")
        with_key = await http.post("/models/sync", headers=ADMIN)
    assert [predicted.status_code, synced.status_code, with_key.status_code] == [200, 401, 200]
