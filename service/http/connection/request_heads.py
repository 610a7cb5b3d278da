"""Request heads: the checks that decide where a request ends, and the answer to a refused one."""

from collections.abc import Sequence
from secrets import token_hex

from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from models.errors import ModelError
from service.errors import BadRequest, ServiceError, TransferCodingUnknown
from service.http.middleware import render

Headers = Sequence[tuple[bytes, bytes]]

MAX_DIGITS = 20  # of a length: 64 bits; the parser stops at these, but counts no zeros in front


def refusal_of(version: str, method: bytes, headers: Headers) -> ServiceError | None:
    """Returns the error that a head is refused with, or None. `headers` are (name in lower case, value)."""
    names = [name for name, _ in headers]
    hosts = names.count(b"host")
    if version not in ("1.1", "1.0"):
        return BadRequest("send HTTP/1.1 or HTTP/1.0")
    if method == b"CONNECT":
        return BadRequest("CONNECT is not answered: this server is not a proxy")
    if hosts > 1 or (hosts == 0 and version == "1.1"):
        return BadRequest("send one Host header")
    if any(name == b"content-length" and len(value.strip()) > MAX_DIGITS for name, value in headers):
        return BadRequest(f"Content-Length has more than {MAX_DIGITS} digits")
    if b"transfer-encoding" in names:
        if version == "1.0":
            return BadRequest("Transfer-Encoding needs HTTP/1.1")
        if [value.strip().lower() for name, value in headers if name == b"transfer-encoding"] != [b"chunked"]:
            return TransferCodingUnknown("the only transfer coding is chunked")
    return None


def length_of(headers: Headers) -> int | None:
    """Returns the bytes of the body after a head; None for a chunked one."""
    length = 0
    for name, value in headers:
        if name == b"transfer-encoding":
            return None
        if name == b"content-length":
            length = int(value)
    return length


def without_upgrade(method: bytes, url: bytes, version: str, headers: Headers) -> bytes:
    """Returns the bytes of the same head without its Upgrade header."""
    lines = [b"%s %s HTTP/%s" % (method, url, version.encode())]
    lines += [b"%s: %s" % header for header in headers if header[0] != b"upgrade"]
    return b"\r\n".join(lines) + b"\r\n\r\n"


def refusal_bytes(error: ServiceError | ModelError, path: str) -> bytes:
    """Returns the whole answer to a refused request, after which the connection is closed."""
    request_id = token_hex(8)
    status, headers, body = render(error, request_id, path)
    headers += [(b"x-request-id", request_id.encode()), (b"connection", b"close")]
    return STATUS_LINE[status] + b"".join(b"%s: %s\r\n" % header for header in headers) + b"\r\n" + body
