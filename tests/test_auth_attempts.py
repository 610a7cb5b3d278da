"""Wrong keys: they are slowed, and no key is read from, or written to, a place where it does not belong."""

import asyncio
import logging
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
from support.service_fakes import ADMIN, ADMIN_KEY, API_KEY, GOOD, Service, client_of

from service.errors import TooManyAttempts, Unauthorized
from service.http import auth
from service.http.auth import Attempts, Keys
from service.server import make_server

WRONG = {"Authorization": "Bearer " + "w" * 32}


async def guess(keys: Keys, address: str, times: int, key: str = "wrong") -> None:
    for _ in range(times):
        with pytest.raises(Unauthorized):
            await keys.try_key(keys.check_admin, key, address)


async def seconds_of(keys: Keys, address: str, key: str) -> float:
    started = time.monotonic()
    with suppress(Unauthorized):
        await keys.try_key(keys.check_admin, key, address)
    return time.monotonic() - started


@pytest.mark.abuse("J1", "A1301")
async def test_wrong_keys_are_slowed_and_the_right_one_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auth, "DELAY_S", 0.2)
    keys, now = Keys(ADMIN_KEY), time.monotonic()
    await guess(keys, "10.0.0.1", 10)
    assert await seconds_of(keys, "10.0.0.1", "wrong") >= 0.2
    assert await seconds_of(keys, "10.0.0.1", ADMIN_KEY) < 0.1
    assert await seconds_of(keys, "10.0.0.2", "wrong") < 0.1
    monkeypatch.setattr(time, "monotonic", lambda: now + 61)
    await guess(keys, "10.0.0.1", 1)
    assert keys._attempts._bad["10.0.0.1"][0] == 1


@pytest.mark.abuse("J1", "A1301")
async def test_few_answers_of_an_address_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auth, "DELAY_S", 0.3)
    monkeypatch.setattr(auth, "MAX_DELAYED", 4)
    keys = Keys(ADMIN_KEY)
    await guess(keys, "10.0.0.1", 10)
    tries = (keys.try_key(keys.check_admin, "wrong", "10.0.0.1") for _ in range(20))
    kinds = Counter(type(error) for error in await asyncio.gather(*tries, return_exceptions=True))
    assert kinds == {Unauthorized: 4, TooManyAttempts: 16}
    assert not keys._attempts._delayed


@pytest.mark.abuse("J1")
async def test_right_keys_and_none_at_all_do_not_count() -> None:
    keys = Keys(ADMIN_KEY)
    for _ in range(20):
        await keys.try_key(keys.check_admin, ADMIN_KEY, "10.0.0.1")
        with pytest.raises(Unauthorized):
            await keys.try_key(keys.check_admin, None, "10.0.0.1")
    assert not keys._attempts._bad


@pytest.mark.abuse("J1")
@pytest.mark.parametrize(
    ("first", "second", "one"),
    [
        pytest.param("2001:db8::1", "2001:db8::ffff:1", True, id="a network of IPv6"),
        pytest.param("2001:db8::1", "2001:db8:0:1::1", False, id="two of them"),
        pytest.param("::ffff:10.0.0.1", "::ffff:10.0.0.2", False, id="two of IPv4 within IPv6"),
        pytest.param("::ffff:10.0.0.1", "10.0.0.1", True, id="IPv4 within IPv6"),
    ],
)
async def test_who_is_one_client(first: str, second: str, one: bool) -> None:
    attempts = Attempts()
    await attempts.failed(first)
    await attempts.failed(second)
    assert (len(attempts._bad) == 1) == one


@pytest.mark.abuse("J1")
async def test_many_addresses_take_no_more_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auth, "MAX_ADDRESSES", 100)
    attempts = Attempts()
    for number in range(1000):
        await attempts.failed(f"10.0.{number // 256}.{number % 256}")
    assert len(attempts._bad) == 100


@pytest.mark.system
@pytest.mark.abuse("J1", "A1301")
@pytest.mark.parametrize("path", ["/models", "/finetune"])
async def test_wrong_keys_lock_nobody_out(tmp_path: Path, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auth, "DELAY_S", 0.01)
    service = Service(tmp_path, api_key=API_KEY)
    async with client_of(service) as http:
        answers = [await http.get(path, headers=WRONG) for _ in range(12)]
        right = await http.get(path, headers=ADMIN)
    assert [answer.status_code for answer in answers] == [401] * 12
    assert right.status_code == 200
    assert service.count("imago_rejected_total", reason="unauthorized") == 12


@pytest.mark.abuse("J1")
@pytest.mark.parametrize(
    ("trusted", "counted"),
    [
        pytest.param("127.0.0.1", ["203.0.113.1", "203.0.113.2"], id="trusted"),
        pytest.param("10.0.0.1", ["127.0.0.1"], id="a stranger"),
    ],
)
async def test_behind_a_proxy_the_client_is_counted(tmp_path: Path, trusted: str, counted: list[str]) -> None:
    service = Service(tmp_path, trusted_proxies=trusted, api_key=API_KEY)
    server = make_server(service.settings, service.app, service.engine, service.traffic)
    server.config.load()
    async with service.app.router.lifespan_context(service.app) as state:

        async def app(scope: object, receive: object, send: object) -> None:
            scope["state"] = dict(state or {})  # type: ignore[index]
            await server.config.loaded_app(scope, receive, send)

        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://imago") as http:
            for client in ("203.0.113.1", "203.0.113.2"):
                await http.get("/models", headers=WRONG | {"X-Forwarded-For": client})
    assert list((state or {})["keys"]._attempts._bad) == counted


@pytest.mark.abuse("J17")
@pytest.mark.parametrize(
    "sent",
    [
        pytest.param({"cookies": {"Authorization": f"Bearer {ADMIN_KEY}", "key": ADMIN_KEY}}, id="cookies"),
        pytest.param({"params": {"Authorization": f"Bearer {ADMIN_KEY}", "key": ADMIN_KEY}}, id="query"),
        pytest.param({"params": {"access_token": ADMIN_KEY, "api_key": ADMIN_KEY}}, id="token in the query"),
        pytest.param({"headers": {"X-API-Key": ADMIN_KEY, "Proxy-Authorization": f"Bearer {ADMIN_KEY}"}}, id="headers"),
        pytest.param({"headers": {"Authorization": f"Basic {ADMIN_KEY}"}}, id="basic"),
        pytest.param({"data": {"Authorization": ADMIN_KEY, "key": ADMIN_KEY}}, id="form"),
    ],
)
@pytest.mark.parametrize("path", ["/models/sync", "/models/pets/activate", "/finetune", "/datasets"])
@pytest.mark.filterwarnings("ignore:Setting per-request cookies")
async def test_what_a_browser_sends_by_itself_opens_nothing(
    tmp_path: Path, path: str, sent: dict[str, dict[str, str]]
) -> None:
    """The key comes in a header that no other site's page can have set."""
    service = Service(tmp_path)
    async with client_of(service) as http:
        answer = await http.post(path, **sent)  # type: ignore[arg-type]
    assert (answer.status_code, "set-cookie" in answer.headers, service.store.calls) == (401, False, [])


@pytest.mark.system
@pytest.mark.abuse("J1")
async def test_no_key_shows_anywhere(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # the client's own log of where it went
    service, wrong, said = Service(tmp_path, api_key=API_KEY, access_log=True), "w" * 32, []
    async with client_of(service) as http:
        for key in (ADMIN_KEY, API_KEY, wrong):
            headers = {"Authorization": f"Bearer {key}", "User-Agent": key}
            for url in (f"/models?key={key}", "/finetune?limit=x", "/nothing", "/metrics", "/openapi.json"):
                answer = await http.get(url, headers=headers)
                said.append(answer.text + str(answer.headers))
            said.append((await http.post("/predict", content=GOOD, headers=headers)).text)
    said += [caplog.text, repr(service.settings), str(service.settings.model_dump()), repr(service.state["keys"])]
    shown = [text[:200] for text in said for key in (ADMIN_KEY, API_KEY, wrong) if key in text]
    assert "/predict" in caplog.text
    assert shown == []
