"""Content-Encoding, both ways: bodies that come compressed, piece by piece, and answers that go so."""

import asyncio
import zlib

from starlette.types import Message, Receive

from service.errors import BadRequest, UnsupportedMediaType

PIECE = 2**20  # bytes that one message is inflated to at most: some 3 ms of the event loop
WORTH_IT = 1024  # bytes: less travels in one packet anyway
WINDOW_BITS = {"gzip": 31, "deflate": 15}  # zlib's: with gzip's wrapper, with zlib's own


def inflating(receive: Receive, encoding: str) -> Receive:
    """`receive`, with the body inflated, a piece at a time: whoever counts them stops a bomb before it is in memory.

    Raises UnsupportedMediaType, and, when it is called, BadRequest for a body that is damaged, cut short, or goes on after its end.
    """
    bits = WINDOW_BITS.get(encoding.strip().lower())
    if bits is None:
        raise UnsupportedMediaType("this Content-Encoding is not read; send gzip, deflate, or the body as it is")
    inflater = zlib.decompressobj(bits)
    waiting, more, ended = b"", True, False

    async def inflated() -> Message:
        nonlocal waiting, more, ended
        while not ended:
            if more and not waiting:
                message = await receive()
                if message["type"] != "http.request":
                    return message
                waiting, more = message.get("body", b""), message.get("more_body", False)
            piece, waiting = _inflate(inflater, waiting)
            if piece:
                await asyncio.sleep(0)  # the next request's turn
                return {"type": "http.request", "body": piece, "more_body": True}
            ended = not more and not waiting
            if ended:
                if not inflater.eof:
                    raise BadRequest("the compressed body ends too early")
                return {"type": "http.request", "body": b"", "more_body": False}
        return await receive()

    return inflated


def _inflate(inflater: "zlib._Decompress", data: bytes) -> tuple[bytes, bytes]:
    """At most PIECE inflated bytes, and what of `data` is left for the next time."""
    if inflater.eof and data:
        raise BadRequest("something follows the end of the compressed body")
    try:
        piece = inflater.decompress(data, PIECE)
    except zlib.error:
        raise BadRequest("the body is not what its Content-Encoding says") from None
    return piece, inflater.unused_data if inflater.eof else inflater.unconsumed_tail


def accepted(header: str) -> str | None:
    """The encoding in which the sender of this Accept-Encoding header would like its answer; None is as it is."""
    asked = [part.replace(" ", "").lower().partition(";q=") for part in header.split(",")]
    wanted = {name for name, _, weight in asked if not weight or weight.strip("0.")}
    return next((name for name in WINDOW_BITS if name in wanted), None)


def compressed(body: bytes, encoding: str) -> bytes:
    compressor = zlib.compressobj(level=1, wbits=WINDOW_BITS[encoding])
    return compressor.compress(body) + compressor.flush()
