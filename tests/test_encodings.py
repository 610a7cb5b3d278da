"""Compressed bodies, piece by piece."""

import gzip
import random
import zlib
from collections.abc import Callable, Iterator

import pytest
from starlette.types import Message, Receive

from service.errors import BadRequest, UnsupportedMediaType
from service.http.compression import PIECE, accepted, compressed, inflating

TEXT = random.Random(0).randbytes(3000) + b"x" * 3 * PIECE


def receiving(*chunks: bytes) -> Receive:
    left: Iterator[Message] = iter(
        [{"type": "http.request", "body": c, "more_body": i < len(chunks)} for i, c in enumerate(chunks, 1)]
    )

    async def receive() -> Message:
        return next(left, {"type": "http.disconnect"})

    return receive


async def pieces(receive: Receive) -> list[bytes]:
    found, more = [], True
    while more:
        message = await receive()
        found.append(message["body"])
        more = message["more_body"]
    return found


@pytest.mark.anyio
@pytest.mark.parametrize("step", [1000, 10**6], ids=["in chunks", "at once"])
@pytest.mark.parametrize(("encoding", "compress"), [("gzip", gzip.compress), (" Deflate", zlib.compress)])
async def test_a_body_is_inflated_in_small_pieces(encoding: str, compress: Callable[[bytes], bytes], step: int) -> None:
    data = compress(TEXT)
    receive = inflating(receiving(*(data[i : i + step] for i in range(0, len(data), step))), encoding)
    found = await pieces(receive)
    assert b"".join(found) == TEXT
    assert max(map(len, found)) <= PIECE
    assert (await receive())["type"] == "http.disconnect"


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("data", "message"),
    [
        pytest.param(b"", "ends too early", id="empty"),
        pytest.param(gzip.compress(TEXT)[:-1], "ends too early", id="cut short"),
        pytest.param(gzip.compress(TEXT) + b"x", "follows the end", id="something after it"),
        pytest.param(zlib.compress(TEXT), "not what its Content-Encoding says", id="another encoding"),
        pytest.param(b"plain", "not what its Content-Encoding says", id="not compressed"),
    ],
)
async def test_damaged_bodies(data: bytes, message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        await pieces(inflating(receiving(data), "gzip"))


def test_an_unknown_encoding() -> None:
    with pytest.raises(UnsupportedMediaType, match="gzip, deflate"):
        inflating(receiving(b""), "br")


@pytest.mark.parametrize(
    ("header", "encoding"),
    [
        ("", None),
        ("br", None),
        ("gzip", "gzip"),
        ("deflate, br", "deflate"),
        ("GZIP;q=0.5, x", "gzip"),
        ("gzip; q=0.0", None),
    ],
)
def test_what_an_accept_encoding_header_asks_for(header: str, encoding: str | None) -> None:
    assert accepted(header) == encoding


def test_answers_are_compressed_as_clients_read_them() -> None:
    assert gzip.decompress(compressed(TEXT, "gzip")) == TEXT
    assert zlib.decompress(compressed(TEXT, "deflate")) == TEXT
