"""An upgrade that is offered is ignored: the body belongs to its request, and the next request is answered."""

import asyncio
from typing import Any

import pytest
from support.framing import Request, through_ours
from support.service_fakes import GOOD
from test_server import PATIENCE_S, port_of, serving, small

SMUGGLED = b"GET /v2 HTTP/1.1\r\nHost: x\r\n\r\n"
NEXT = b"GET /next HTTP/1.1\r\nHost: x\r\n\r\n"
OFFERS = [b"h2c", b"websocket", b"anything"]


def offering(upgrade: bytes, body: bytes, chunked: bool, path: bytes = b"/predict") -> bytes:
    framing = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: %d" % len(body)
    head = b"POST %s HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: %s\r\n%s\r\n\r\n"
    return head % (path, upgrade, framing) + (b"%x\r\n%s\r\n0\r\nX: y\r\n\r\n" % (len(body), body) if chunked else body)


@pytest.mark.abuse("A201")
@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("upgrade", OFFERS)
def test_the_body_belongs_to_its_request_in_any_split(upgrade: bytes, chunked: bool) -> None:
    stream = offering(upgrade, SMUGGLED, chunked) + NEXT

    async def all_splits() -> None:
        splits = [[stream], [stream[i : i + 1] for i in range(len(stream))]]
        splits += [[stream[:cut], stream[cut:]] for cut in range(1, len(stream))]
        for pieces in splits:
            outcome = await through_ours(pieces)
            assert outcome.requests == [Request(b"POST", b"/predict", SMUGGLED), Request(b"GET", b"/next", b"")]
            assert (outcome.answers, outcome.closed) == ([200, 200], False)

    asyncio.run(all_splits())


@pytest.mark.abuse("A201")
def test_without_a_body_too() -> None:
    stream = b"GET /a HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n" + NEXT
    outcome = asyncio.run(through_ours([stream]))
    assert [request.target for request in outcome.requests] == [b"/a", b"/next"]


@pytest.mark.abuse("A201")
def test_the_body_is_read_where_it_does_not_fit_the_framing() -> None:
    stream = offering(b"h2c", b"abc", chunked=True).replace(b"3\r\nabc", b"4\r\nabc")
    outcome = asyncio.run(through_ours([stream + NEXT]))
    assert (outcome.requests, outcome.answers, outcome.closed) == ([], [400], True)


@pytest.mark.abuse("A205")
@pytest.mark.parametrize(
    "stream",
    [
        pytest.param(b"CONNECT x:80 HTTP/1.1\r\nHost: x:80\r\n\r\n", id="CONNECT"),
        pytest.param(b"CONNECT /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 28\r\n\r\n", id="CONNECT with a body"),
        pytest.param(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", id="the preface of HTTP/2"),
        pytest.param(b"POST /a HTTP/2.0\r\nHost: x\r\n\r\n", id="HTTP/2.0"),
        pytest.param(
            b"GET /a HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\nx\r\n0\r\n\r\n", id="line end"
        ),
    ],
)
def test_after_anything_not_understood_the_connection_closes(stream: bytes) -> None:
    outcome = asyncio.run(through_ours([stream, SMUGGLED]))
    assert (outcome.requests, outcome.answers, outcome.closed) == ([], [400], True)


@pytest.mark.anyio
@pytest.mark.abuse("A201")
@pytest.mark.parametrize("chunked", [False, True])
async def test_at_the_socket(tmp_path: Any, chunked: bool) -> None:
    service = small(tmp_path)
    async with serving(service) as server:
        for upgrade in OFFERS:
            reader, writer = await asyncio.open_connection("127.0.0.1", port_of(server))
            stream = offering(upgrade, GOOD, chunked)
            head = stream.index(b"\r\n\r\n") + 4
            for piece in (stream[:head], stream[head:], b"GET /v2 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"):
                writer.write(piece)
                await asyncio.sleep(0.05)
            answers = await asyncio.wait_for(reader.read(), PATIENCE_S)
            writer.close()
            assert answers.count(b"HTTP/1.1 200 OK") == answers.count(b"HTTP/1.1 ") == 2
            assert service.engine.asked["files"] == [GOOD]
