"""uvicorn's HTTP protocol with the guards that it lacks: a cap on the head, and deadlines for head and body.

first byte ----head_timeout_s----> head complete ----body_timeout_s----> body complete       late: 408, close
           at most max_head bytes                                                        larger: 431, close

The body of an upload may take longer, as long as each span of body_timeout_s brings it on by UPLOAD_RATE.
"""

import asyncio
from dataclasses import dataclass
from secrets import token_hex
from typing import Any

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

from models.errors import ModelError
from service.errors import BadRequest, HeadersTooLarge, RequestTimeout, ServiceError
from service.middleware import LINGER_BYTES, LINGER_S, UPLOADS, render
from service.settings import Settings

UPLOAD_RATE = 8 * 1024  # bytes a second


@dataclass(frozen=True)
class Guards:
    """What a client may take its time for, and how large a head it may send."""

    max_head: int  # bytes
    head_timeout_s: float
    body_timeout_s: float

    @classmethod
    def of(cls, settings: Settings) -> "Guards":
        return cls(settings.max_head_kb * 1024, settings.head_timeout_s, settings.body_timeout_s)


class GuardedProtocol(HttpToolsProtocol):
    """One connection."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        guards: Guards,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._guards = guards
        self._deadline: asyncio.TimerHandle | None = None
        self._in_head = True
        self._head_bytes = 0
        self._body_bytes = 0  # since the deadline was set
        self._refused = False
        self._linger_bytes = LINGER_BYTES

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)  # type: ignore[arg-type]
        self._expect("request head", self._guards.head_timeout_s)

    def connection_lost(self, exc: Exception | None) -> None:
        self._expect_nothing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            self._linger_bytes -= len(data)
            if self._linger_bytes <= 0:
                self.transport.close()
            return
        if self._in_head:
            if self._deadline is None:  # the first bytes of a further request on this connection
                self._expect("request head", self._guards.head_timeout_s)
            self._head_bytes += len(data)
        super().data_received(data)
        if self._in_head and self._head_bytes > self._guards.max_head:
            self._refuse_head()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = True

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:  # trailers are dropped: nothing reads them, and no cap would hold for them
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._head_bytes = 0
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if size > self._guards.max_head:
            self._refuse_head()
            raise ValueError("head too large")  # ends the parsing
        super().on_headers_complete()
        self._expect("request body", self._guards.body_timeout_s)

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._expect_nothing()
        self._in_head = True

    def send_400_response(self, msg: str) -> None:
        """uvicorn's answer to what its parser refuses, in our shape."""
        self._refuse(BadRequest("the request is not valid HTTP"))

    def _expect(self, what: str, seconds: float) -> None:
        self._expect_nothing()
        self._body_bytes = 0
        self._deadline = self.loop.call_later(seconds, self._late, what, seconds)

    def _expect_nothing(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _late(self, what: str, seconds: float) -> None:
        uploading = not self._in_head and (self.scope["method"], self.scope["path"]) in UPLOADS
        if uploading and self._body_bytes >= seconds * UPLOAD_RATE:
            self._expect(what, seconds)
            return
        self._refuse(RequestTimeout(f"the {what} did not arrive within {seconds:g} s"))

    def _refuse_head(self) -> None:
        self._refuse(HeadersTooLarge(f"the request head is larger than {self._guards.max_head >> 10} KB"))

    def _refuse(self, error: ServiceError | ModelError) -> None:
        """Answers unless an answer has begun, reads on a little so that the client sees it, and closes."""
        if self._refused:
            return
        self._refused = True
        self._expect_nothing()
        answering = self.cycle is not None and not self.cycle.response_complete
        # What an earlier, pipelined request waits for cannot be overtaken, nor can half an answer be taken back.
        if self.transport.is_closing() or (answering and (self.cycle.response_started or not self.cycle.more_body)):
            self.transport.close()
            return
        request_id = token_hex(8)
        status, headers, body = render(error, request_id, getattr(self, "url", b"").decode("latin-1").partition("?")[0])
        headers += [(b"x-request-id", request_id.encode()), (b"connection", b"close")]
        head = b"".join(name + b": " + value + b"\r\n" for name, value in headers)
        self.transport.write(STATUS_LINE[status] + head + b"\r\n" + body)
        if answering:  # its handler learns that the client is gone
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.write_eof()
        self.loop.call_later(LINGER_S, self.transport.close)
