"""uvicorn's HTTP protocol with the guards that it lacks: caps on connections and on the head, deadlines for head and body.

first byte ----head_timeout_s----> head complete ----body_timeout_s----> body complete       late: 408, close
           at most max_head bytes                each 10 s at BODY_RATE                  larger: 431, close

The body of an upload may take longer, as long as it comes at that rate.
"""

import asyncio
import math
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from ipaddress import ip_address, ip_network
from secrets import token_hex
from typing import Any

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

from models.errors import ModelError
from service.errors import BadRequest, HeadersTooLarge, RequestTimeout, ServiceError
from service.middleware import LINGER_BYTES, LINGER_S, UPLOADS, render
from service.settings import Settings

BODY_RATE = 8 * 1024  # bytes a second
BODY_SPAN_S = 10.0  # within which a body must come on at that rate


@dataclass(frozen=True)
class Guards:
    """What a client may take its time for, how large a head it may send, and how many connections there may be."""

    max_head: int  # bytes
    head_timeout_s: float
    body_timeout_s: float
    max_connections: int
    max_client_connections: int  # from one address
    is_proxy: Callable[[str], bool]  # its connections are those of many clients
    connected: Counter[str] = field(default_factory=Counter)  # by address, now

    @classmethod
    def of(cls, settings: Settings) -> "Guards":
        return cls(
            settings.max_head_kb * 1024,
            settings.head_timeout_s,
            settings.body_timeout_s,
            settings.max_connections,
            settings.max_client_connections,
            proxies(settings.trusted_proxies),
        )

    def left(self, address: str) -> None:
        self.connected[address] -= 1
        if not self.connected[address]:
            del self.connected[address]

    def lets_in(self, address: str) -> bool:
        """Of a connection that is counted already."""
        mine = 1 if self.is_proxy(address) else self.connected[address]
        return mine <= self.max_client_connections and self.connected.total() <= self.max_connections


def proxies(trusted: Sequence[str]) -> Callable[[str], bool]:
    """Whether an address is among addresses and networks, of which `*` is all."""
    if "*" in trusted:
        return lambda address: True
    networks = []
    for name in trusted:
        with suppress(ValueError):  # it may be no address at all, as uvicorn allows
            networks.append(ip_network(name, strict=False))
    return lambda address: any(ip_address(address) in network for network in networks)


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
        self._address = ""
        self._deadline: asyncio.TimerHandle | None = None
        self._in_head = True
        self._head_bytes = 0
        self._body_bytes = 0  # in this span
        self._body_ends = 0.0  # on the loop's clock
        self._refused = False
        self._linger_bytes = LINGER_BYTES

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)  # type: ignore[arg-type]
        self._address = (transport.get_extra_info("peername") or ("",))[0]
        self._guards.connected[self._address] += 1
        if not self._guards.lets_in(self._address):
            self._refused = True
            self.transport.abort()  # what a flood gets costs us as little as possible
            return
        self._expect(self._guards.head_timeout_s, self._head_late)

    def connection_lost(self, exc: Exception | None) -> None:
        self._expect_nothing()
        self._guards.left(self._address)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            self._linger_bytes -= len(data)
            if self._linger_bytes <= 0:
                self.transport.close()
            return
        if self._in_head:
            if self._deadline is None:  # the first bytes of a further request on this connection
                self._expect(self._guards.head_timeout_s, self._head_late)
            self._head_bytes += len(data)
        super().data_received(data)
        if self._in_head and self._head_bytes > self._guards.max_head:
            self._refuse_head()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = True

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:
            super().on_header(name, value)
            return
        self._head_bytes += len(name) + len(value) + 4  # of trailers, which are dropped: nothing reads them
        if self._head_bytes > self._guards.max_head:
            self._refuse_head()
            raise ValueError("trailers too large")  # ends the parsing

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._head_bytes = 0
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if size > self._guards.max_head:
            self._refuse_head()
            raise ValueError("head too large")  # ends the parsing
        super().on_headers_complete()
        uploading = (self.scope["method"], self.scope["path"]) in UPLOADS
        self._body_ends = math.inf if uploading else self.loop.time() + self._guards.body_timeout_s
        self._expect_body()

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._expect_nothing()
        self._in_head = True
        self._head_bytes = 0

    def send_400_response(self, msg: str) -> None:
        """uvicorn's answer to what its parser refuses, in our shape."""
        self._refuse(BadRequest("the request is not valid HTTP"))

    def _expect(self, seconds: float, late: Callable[[], None]) -> None:
        self._expect_nothing()
        self._deadline = self.loop.call_later(seconds, late)

    def _expect_body(self) -> None:
        self._body_bytes = 0
        span = min(BODY_SPAN_S, self._guards.body_timeout_s)
        self._expect(min(span, self._body_ends - self.loop.time()), partial(self._body_late, span))

    def _expect_nothing(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _head_late(self) -> None:
        self._refuse(RequestTimeout(f"the request head did not arrive within {self._guards.head_timeout_s:g} s"))

    def _body_late(self, span: float) -> None:
        if self.loop.time() >= self._body_ends:
            self._refuse(RequestTimeout(f"the request body did not arrive within {self._guards.body_timeout_s:g} s"))
        elif self._body_bytes >= span * BODY_RATE or self.flow.read_paused:  # we ourselves may be the slow one
            self._expect_body()
        else:
            self._refuse(RequestTimeout(f"the request body comes slower than {BODY_RATE >> 10} KB/s"))

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
