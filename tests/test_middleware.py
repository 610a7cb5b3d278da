"""The layer around every request, driven by hand-made ASGI messages."""

import asyncio
import json
import logging
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from starlette.types import Message
from support.service_fakes import ADMIN_KEY, GOOD, Service, client_of

pytestmark = pytest.mark.anyio
MB = 2**20
LEFT: Message = {"type": "http.disconnect"}


def chunk(body: bytes, more: bool = False) -> Message:
    return {"type": "http.request", "body": body, "more_body": more}


@dataclass
class Call:
    """A request whose body comes as `messages`; when they are over, the client waits."""

    messages: Iterable[Message]
    path: str = "/predict"
    headers: dict[str, str] = field(default_factory=lambda: {"transfer-encoding": "chunked"})
    sent: list[Message] = field(default_factory=list)
    reads: int = 0

    async def run(self, service: Service) -> "Call":
        self._left = iter(self.messages)
        headers = [(name.encode(), value.encode("latin-1")) for name, value in self.headers.items()]
        scope = {"type": "http", "method": "POST", "path": self.path, "query_string": b"", "headers": headers}
        await service(scope | {"raw_path": b"", "root_path": "", "client": ("10.0.0.1", 5)}, self.receive, self.send)
        return self

    async def receive(self) -> Message:
        self.reads += 1
        for message in self._left:
            return message
        await asyncio.Event().wait()
        raise AssertionError

    async def send(self, message: Message) -> None:
        self.sent.append(message)

    @property
    def status(self) -> int:
        return int(self.sent[0]["status"])

    @property
    def header(self) -> dict[str, str]:
        return {name.decode(): value.decode() for name, value in self.sent[0]["headers"]}

    @property
    def error(self) -> dict[str, Any]:
        body = b"".join(message.get("body", b"") for message in self.sent[1:])
        error: dict[str, Any] = json.loads(body)["error"]
        return error


@pytest.fixture
def service(tmp_path: Path) -> Service:
    return Service(tmp_path, max_body_mb=1, max_multipart_mb=2, max_queue_mb=1)


@pytest.mark.abuse("H5")
async def test_a_declared_size_is_refused_before_the_body(service: Service) -> None:
    async with client_of(service):
        call = await Call([chunk(b"x")], headers={"content-length": "99999999999"}).run(service)
    assert (call.status, call.error["code"]) == (413, "payload_too_large")
    assert call.header["connection"] == "close"
    assert call.sent[1]["body"] != b""  # all of the answer is out
    assert call.sent[1]["more_body"]  # but the connection stays to read on a little
    assert service.count("imago_rejected_total", reason="too_large") == 1
    assert service.count("imago_requests_total", route="/predict", method="POST", status="413") == 1


async def test_multipart_may_be_larger(service: Service) -> None:
    async with client_of(service):
        headers = {"content-length": str(2 * MB), "content-type": "multipart/form-data; boundary=b"}
        call = await Call([chunk(b"x")], headers=headers).run(service)
    assert call.status == 400


@pytest.mark.abuse("H4")
async def test_an_undeclared_size_is_refused_at_the_limit(service: Service) -> None:
    async with client_of(service):
        call = await Call([chunk(b"x" * MB, more=True), chunk(b"x", more=True), chunk(b"", more=False)]).run(service)
    assert (call.status, call.error["code"]) == (413, "payload_too_large")


async def test_at_the_limit_is_not_beyond_it(service: Service) -> None:
    async with client_of(service):
        assert (await Call([chunk(b"x" * MB)]).run(service)).status == 200


async def test_other_routes_take_little(service: Service) -> None:
    headers = {
        "authorization": f"Bearer {ADMIN_KEY}",
        "content-type": "application/json",
        "transfer-encoding": "chunked",
    }
    async with client_of(service):
        call = await Call([chunk(b"1" * MB, more=True), chunk(b"1")], "/models/pets/activate", headers).run(service)
    assert (call.status, call.error["code"]) == (413, "payload_too_large")


@pytest.mark.abuse("H7")
async def test_of_a_refused_body_64_mb_are_read(service: Service) -> None:
    flood = (chunk(b"x" * 2**16, more=True) for _ in range(2000))
    async with client_of(service):
        call = await Call(flood, headers={"content-length": "131072000"}).run(service)
    assert call.reads == 1024  # of 64 KB each: 64 MB


async def test_a_refused_body_takes_no_share_of_the_memory_while_its_rest_comes(service: Service) -> None:
    held: list[int] = []

    def messages() -> Iterator[Message]:
        for _ in range(4):
            yield chunk(b"x" * (MB // 2), more=True)
            held.append(service.traffic.held)

    async with client_of(service):
        call = await Call(messages()).run(service)
    assert call.status == 413
    assert held == [MB // 2, MB, 0, 0]


@pytest.mark.abuse("H6")
async def test_the_length_must_be_a_number(service: Service) -> None:
    async with client_of(service):
        call = await Call([chunk(b"x")], headers={"content-length": "-1"}).run(service)
    assert (call.status, call.error["code"]) == (400, "bad_request")


async def test_all_bodies_together_are_bounded(service: Service) -> None:
    service.engine.gate = asyncio.Event()
    async with client_of(service) as http:
        first = asyncio.create_task(http.post("/predict", content=b"x" * 900_000))
        await service.engine.waiting.wait()
        second = await http.post("/predict", content=b"x" * 900_000)
        service.engine.gate.set()
        assert (await first).status_code == 200
        third = await http.post("/predict", content=b"x" * 900_000)
    assert (second.status_code, third.status_code) == (429, 200)
    assert (second.json()["error"]["code"], second.headers["retry-after"]) == ("queue_full", "1")


FORM = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n' + b"x" * (MB // 2)


@pytest.mark.abuse("H10")
@pytest.mark.parametrize(
    ("kind", "half"),
    [pytest.param("image/png", b"half", id="raw"), pytest.param("multipart/form-data; boundary=b", FORM, id="form")],
)
async def test_a_client_that_leaves_while_sending(
    service: Service, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, kind: str, half: bytes
) -> None:
    monkeypatch.setattr(tempfile.SpooledTemporaryFile, "rollover", lambda self: pytest.fail("a file on disk"))
    headers = {"transfer-encoding": "chunked", "content-type": kind}
    async with client_of(service):
        call = await Call([chunk(half, more=True), chunk(b"x" * (MB // 4), more=True), LEFT], headers=headers).run(
            service
        )
    assert call.sent == []
    assert service.count("imago_requests_total", route="/predict", method="POST", status="499") == 1
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


@pytest.mark.abuse("H11")
async def test_a_client_that_leaves_while_waiting_cancels_the_engine(service: Service) -> None:
    service.engine.gate = asyncio.Event()
    async with client_of(service):
        call = await asyncio.wait_for(Call([chunk(GOOD), LEFT]).run(service), 5)
    assert service.engine.cancelled
    assert call.sent == []


async def test_draining_refuses_what_is_new(service: Service) -> None:
    async with client_of(service):
        service.engine.draining = True
        call = await Call([chunk(GOOD)]).run(service)
    assert (call.status, call.error["code"]) == (503, "draining")
    assert (call.header["retry-after"], call.header["connection"]) == ("30", "close")


async def test_traffic_counts_until_the_answer_has_ended(service: Service) -> None:
    service.engine.gate = asyncio.Event()
    async with client_of(service) as http:
        task = asyncio.create_task(http.post("/predict", content=GOOD))
        await service.engine.waiting.wait()
        assert not await service.traffic.ended(0.01)
        await http.get("/health/live")
        assert service.traffic.under_way == 1
        service.engine.gate.set()
        await task
    assert await service.traffic.ended(0)


async def test_an_upload_that_began_before_the_drain_is_answered(service: Service) -> None:
    def messages() -> Iterator[Message]:
        yield chunk(GOOD[:4], more=True)
        service.engine.draining = True
        yield chunk(GOOD[4:])

    async with client_of(service):
        call = await Call(messages()).run(service)
    assert (call.status, service.engine.asked["files"]) == (200, [GOOD])


async def test_what_is_cut_short_by_a_shutdown_gets_503(service: Service) -> None:
    service.engine.gate = asyncio.Event()
    async with client_of(service):
        call = Call([chunk(GOOD)])
        task = asyncio.create_task(call.run(service))
        await service.engine.waiting.wait()
        service.engine.draining = True
        task.cancel()
        await task
    assert (call.status, call.error["code"]) == (503, "draining")


@pytest.mark.abuse("H20")
async def test_the_access_log_is_one_line_of_json(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    service = Service(tmp_path, access_log=True)
    caplog.set_level(logging.INFO, "service.access")
    headers = {"user-agent": "\x1b[31m" + "u" * 30_000, "x-request-id": "'" * 128}
    async with client_of(service):
        await Call([chunk(b"")], path="/nowhere\n\x1b[31m" + "\x1b\U0001f431" * 1000, headers=headers).run(service)
    (line,) = [record.getMessage() for record in caplog.records if record.name == "service.access"]
    assert line.isprintable()
    assert line.isascii()
    assert len(line) <= 512
    assert json.loads(line)["path"].startswith("/nowhere%0A%1B")
    assert json.loads(line)["route"] == "other"
    assert json.loads(line)["status"] == 404


async def test_the_access_log_says_what_answered_and_not_what_was_asked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    service = Service(tmp_path, access_log=True)
    caplog.set_level(logging.INFO, "service.access")
    async with client_of(service) as http:
        await http.post("/predict?top_k=1&model=evil&model=pets", content=GOOD)
    (line,) = [json.loads(record.getMessage()) for record in caplog.records if record.name == "service.access"]
    assert (line["route"], line["path"], line["images"], line["models"]) == ("/predict", "/predict", 1, "evil@1,pets@1")
    assert "top_k" not in str(line)


@pytest.mark.abuse("H20")
async def test_a_line_is_bounded_whatever_it_says(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    service = Service(tmp_path, access_log=True)
    caplog.set_level(logging.INFO, "service.access")
    models = "&".join(f"model={'m' * 60}{number}" for number in range(16))
    async with client_of(service) as http:
        await http.post(f"/predict?{models}", content=GOOD, headers={"x-request-id": "i" * 128})
    (line,) = [record.getMessage() for record in caplog.records if record.name == "service.access"]
    assert len(line) <= 512
    assert json.loads(line)["models"].startswith("mmm")
