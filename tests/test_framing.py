"""Where a request ends: our protocol against h11 on the same bytes, in any split."""

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.framing import Outcome, Request, through_h11, through_ours

from service.http.connection.guarded_protocol import GuardedProtocol

pytestmark = pytest.mark.system

SMUGGLED = b"DELETE /smuggled HTTP/1.1\r\nHost: x\r\n\r\n"
CHUNKED = b"Transfer-Encoding: chunked"
UPGRADE = b"Connection: Upgrade\r\nUpgrade: h2c"

# What a part of a request usually is, and every way to write it that two parsers have been known to read differently.
PARTS: dict[str, tuple[list[bytes], list[bytes]]] = {
    "method": ([b"POST", b"GET", b"PUT", b"HEAD"], [b"OPTIONS", b"CONNECT", b"post", b"PRI", b"SOURCE", b"G@T", b"", b"\r\nPOST"]),
    "target": ([b"/a", b"/b?c=d"], [b"http://x/e", b"*", b"x:80", b"/\xff", b"/a b", b"", b"/\x00", b"/a\tb"]),
    "version": ([b"HTTP/1.1"], [b"HTTP/1.0", b"HTTP/2.0", b"HTTP/0.9", b"HTTP/1.2", b"HTTP/1.1 ", b"http/1.1", b"HTTP/1.10", b""]),
    "host": ([b"Host: x"], [b"X: y", b"Host: x\r\nHost: y", b"Host:", b"host: x\r\nHOST: x"]),
    "length": ([b"%d"], [b"+%d", b"-%d", b"0%d", b"%d, %d", b"0x%d", b"%d ", b"\t%d", b"%d\x0b", b"%d;", b"%d\x00", b"1%d", b"",
        b"%d\r\nContent-Length: %d", b"%d\r\nContent-Length: 1", b"%d\r\n ", b"9999999999999999999%d", b"%d.0", b"%d\r\nContent-Length:"]),
    "coding": ([b"chunked"], [b"Chunked", b"gzip, chunked", b"chunked, gzip", b"chunked, chunked", b"identity", b"xchunked",
        b"chunkedx", b"chunked;q=1", b"\tchunked", b"chunked\t", b"\x0bchunked", b"\r\n chunked", b"", b"chunked,", b",chunked",
        b"gzip\r\nTransfer-Encoding: chunked", b"chunked\r\nTransfer-Encoding: chunked", b"chunked\r\nTransfer-Encoding: identity"]),
    "field": ([b"X: y", b"Accept: */*", b"Connection: keep-alive", b"Expect: 100-continue", UPGRADE], [
        b"Connection: close", b"Connection: Transfer-Encoding, Content-Length", b"Connection: keep-alive, Upgrade\r\nUpgrade: websocket",
        b"Upgrade: h2c", b"Connection: Upgrade, close\r\nUpgrade: x", b"Connection: upgrade\r\nConnection: close\r\nUpgrade: x, y",
        b"Connection: Upgrade\r\nUpgrade:", b"Upgrade: h2c\r\nConnection: upgrade,\r\nUpgrade: x",
        b"X: y\nTransfer-Encoding: chunked", b"X: y\rContent-Length: 3", b"X: \x00", b"X: y\r\n\tContent-Length: 3",
        b"Transfer-Encoding : chunked", b"Content-Length : 3", b" Content-Length: 3", b"Transfer_Encoding: chunked",
        b"Content-Length:", b"Content-Length", b": y", b"X\x00: y", b"Content-Length: 1", CHUNKED, b"X: \xff", b"\xffX: y", b"X: \x7f"]),
    "end": ([b"\r\n"], [b"\n", b"\r", b"\r\r\n", b"\n\r\n", b"", b" \r\n"]),
    "size": ([b"%x"], [b"%X", b"0%x", b"00000000%x", b"0x%x", b"+%x", b"-%x", b" %x", b"%x_0", b"%x\t",
        b"fffffffffffffffff%x", b"_%x", b""]),
    "extension": ([b"", b";a=b"], [b';a="b"', b";a\x00", b";", b" ", b" ;a", b"\n", b';a="\r\n', b";a=\r",
        b";" + b"a" * 200, b"\r", b";a=b;c", b",a"]),
    "chunk_end": ([b"\r\n"], [b"\n", b"\r", b"\r\r\n", b"\n\r\n", b"", b"X\r\n", b"XX"]),
    "last": ([b"0\r\n\r\n", b"0\r\nX: y\r\n\r\n"], [b"0\r\nContent-Length: 40\r\nTransfer-Encoding: chunked\r\n\r\n", b"0;a=b\r\n\r\n",
        b"000\r\n\r\n", b"0\n\n", b"0\r\n\n", b"0\r\n\r", b"0\r\n\rX", b"0\r\nX: y\n\r\n", b"0\r\n X\r\n\r\n", b"", b"\r\n",
        b"0\r\n\r\n\r\n",
        b"0\r\nX\r\n\r\n", b"0\r\nX: y\r\nHost: z\r\n\r\n", b"-0\r\n\r\n", b"0 \r\n\r\n"]),
}  # fmt: skip
DATA = [b"", b"x", b"abc", b"\r\n\r\n", SMUGGLED, b"0\r\n\r\n" + SMUGGLED, b"z" * 300]


@st.composite
def requests(draw: st.DrawFn) -> bytes:
    odd = draw(st.sampled_from([set[str](), *({name} for name in PARTS), {"field", "coding"}, {"field", "length"}]))

    def part(name: str) -> bytes:
        return draw(st.sampled_from(PARTS[name][name in odd]))

    def chunks(data: bytes) -> bytes:
        cut = draw(st.integers(0, len(data)))
        pieces = [piece for piece in (data[:cut], data[cut:]) if piece]
        heads = [part("size").replace(b"%x", b"%x" % len(piece)) + part("extension") for piece in pieces]
        bodies = [head + b"\r\n" + piece + part("chunk_end") for head, piece in zip(heads, pieces, strict=True)]
        return b"".join(bodies) + part("last")

    data, how = draw(st.sampled_from(DATA)), draw(st.sampled_from(["length", "chunked", "none", "both"]))
    fields = [part("host"), part("field")]
    if how in ("length", "both" if "field" in odd else ""):
        fields.append(b"Content-Length: " + part("length").replace(b"%d", b"%d" % len(data)))
    if how in ("chunked", "both"):
        fields.append(b"Transfer-Encoding: " + part("coding"))
        data = chunks(data)
    elif how == "none" and "field" not in odd:
        data = b""
    line = b" ".join((part("method"), part("target"), part("version")))
    return line + b"\r\n" + b"\r\n".join(draw(st.permutations(fields))) + part("end") + b"\r\n" + data


STREAMS = st.lists(requests(), min_size=1, max_size=4).map(b"".join)


def run(pieces: Sequence[bytes], early: Sequence[int] = ()) -> Outcome:
    return asyncio.run(through_ours(pieces, early))


def split(data: bytes, cuts: Sequence[int]) -> list[bytes]:
    ends = sorted({cut % (len(data) + 1) for cut in cuts} | {len(data)})
    return [data[start:end] for start, end in zip([0, *ends], ends, strict=False) if start < end]


def same(ours: Request, theirs: Request) -> bool:
    return (ours.method, ours.body) in ((theirs.method, theirs.body), (theirs.method, None))


def agree(ours: Outcome, theirs: Outcome, early: bool = False) -> None:
    """Ours saw the same requests, or fewer and then refused and closed: without an answer where the request has one already."""
    pairs = list(zip(ours.requests, theirs.requests, strict=False))
    assert [pair for pair in pairs if not same(*pair)] == []
    assert len(ours.requests) <= len(theirs.requests)
    if len(ours.requests) < len(theirs.requests):
        assert ours.closed
        assert early or ours.refused in (400, 501)
    answered = len(ours.answers) - (ours.refused is not None)
    assert len(ours.requests) <= answered <= len(ours.requests) + early


def check(data: bytes, cuts: Sequence[int], early: Sequence[int]) -> None:
    whole = run([data])
    agree(whole, through_h11(data))
    pieces = run(split(data, cuts))
    assert pieces == whole
    agree(run(split(data, cuts), early), through_h11(data), early=bool(early))


ANY: Any = {
    "data": STREAMS,
    "cuts": st.lists(st.integers(0, 2000), max_size=6),
    "early": st.sets(st.integers(0, 2)).map(sorted),
}


@pytest.mark.abuse("A204")
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(**ANY)
def test_we_see_requests_end_where_h11_does(data: bytes, cuts: list[int], early: list[int]) -> None:
    check(data, cuts, early)


@pytest.mark.abuse("A204")
def test_a_request_that_begins_where_none_can_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the parser saw an end where the protocol sees none: pieces are whole reads."""
    monkeypatch.setattr(GuardedProtocol, "_end_of_piece", lambda self: len(self._waiting))
    outcome = run([b"POST /a HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\nx" + SMUGGLED])
    assert b"DELETE" not in [request.method for request in outcome.requests]
    assert outcome.closed


@pytest.mark.soak
@settings(max_examples=20_000, deadline=None, suppress_health_check=list(HealthCheck))
@given(**ANY)
def test_we_see_requests_end_where_h11_does_for_long(data: bytes, cuts: list[int], early: list[int]) -> None:
    check(data, cuts, early)
