"""uvicorn's HTTP protocol with further guards: framing that is checked twice, and a deadline for every wait.

    first byte ----head_timeout_s----> head complete ----body_timeout_s----> body complete       late: 408, close
               at most max_head bytes                each 10 s at BODY_RATE                  larger: 431, close
    answer ----write_timeout_s, see flow_control----> taken by the client                        late: abort

The body of an upload may take longer, as long as it arrives at that rate.

The parser gets the stream in pieces. Each piece ends where a request can end, and none goes beyond a request whose answer is not sent:
one request at a time, and the rest waits as received bytes. If a request begins inside a piece, parser and protocol disagree about the
framing: 400 and close.
"""

import asyncio
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import httptools
from uvicorn.config import Config
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from models.errors import ModelError
from service.errors import BadRequest, HeadersTooLarge, RequestTimeout, ServiceError
from service.http.connection.flow_control import PausingFlowControl, WriteWatch
from service.http.connection.guards import Guards
from service.http.connection.half_closed import HalfClosed
from service.http.connection.held_bytes import Share
from service.http.connection.request_heads import length_of, refusal_bytes, refusal_of, without_upgrade
from service.http.middleware import LINGER_BYTES, LINGER_S, UPLOADS
from service.system.client_addresses import network_of
from service.system.prefix import place, without

BODY_RATE = 8 * 1024  # bytes a second
BODY_SPAN_S = 10.0  # within which a body must come on at that rate
READ_AHEAD = 4096  # bytes that may wait behind a request before reading pauses; one read brings up to 256 KB
MOST_PIECE = 2**16  # bytes of a head or chunked body that are parsed at a time
BURST = 256  # pieces, after which other connections have their turn
EMPTY_LINE = b"\r\n\r\n"  # every head and every chunked body ends with one


class BodyEvents:
    """The parser callbacks that concern a body alone."""

    def __init__(self, protocol: "GuardedProtocol") -> None:
        self.on_body = protocol.on_body
        self.on_message_complete = protocol.on_message_complete


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
        # What came and waits: the parser has the first `_fed` bytes of it.
        self._waiting, self._fed = b"", 0
        self._tail = b""  # the last bytes that the parser has, of an empty line that may come in two reads
        self._body: list[bytes] = []  # of one piece; a list, since a chunk may have a single byte
        self.on_body = self._body.append  # type: ignore[method-assign, assignment]
        self.parser = httptools.HttpRequestParser(self)  # strict, unlike uvicorn's
        # The request that is being parsed
        self._in_head = True  # or between requests
        self._begun = False
        self._ended = False  # in this piece
        self._upgrading = False
        self._is_own_parser = True
        self._left: int | None = 0  # bytes of its body that are still to come; None where it is chunked
        self._overhead = 0  # bytes of the head, or of chunk heads and trailers since the last byte of the body
        self._body_bytes = 0  # in this span
        self._body_ends = 0.0  # on the loop's clock
        self._refused = False
        self._sender_ended = False
        self._linger_bytes = LINGER_BYTES

    # The connection

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)  # type: ignore[arg-type]
        self._address = (transport.get_extra_info("peername") or ("",))[0]
        guards = self._guards
        client = guards.client_of(self._address)
        self.flow: PausingFlowControl = PausingFlowControl(self.transport)
        unread = Share(guards.held, client)
        self._writing = WriteWatch(self.transport, self.loop, unread, guards.write_timeout_s)
        self._pipelined = Share(guards.held, client)
        guards.joined(self._address)
        if not guards.lets_in(self._address) and not self._makes_room():
            self._refused = True
            self.transport.abort()  # the cheapest answer to a flood
            return
        self._expect(guards.head_timeout_s, self._head_late)

    def _makes_room(self) -> bool:
        """Closes an idle connection of the client with most connections, in favour of a client with fewer. Returns whether it did."""
        crowd = self._guards.crowded(self._address)
        for other in self.connections if crowd is not None else ():
            if isinstance(other, GuardedProtocol) and other is not self and other._is_idle_of(crowd):
                other.transport.abort()
                return True
        return False

    def _is_idle_of(self, client: str | None) -> bool:
        return (
            network_of(self._address) == client and self._in_head and not self._owed and not self.transport.is_closing()
        )

    def connection_lost(self, exc: Exception | None) -> None:
        self._expect_nothing()
        self._unset_keepalive_if_required()
        self._writing.end()
        self._pipelined.set(0)
        self._waiting, self._fed = b"", 0
        self._guards.left(self._address)
        super().connection_lost(exc)

    def eof_received(self) -> bool:  # type: ignore[override]
        """Keeps the connection of a client that has ended its sending side and waits for its answers."""
        if self._refused or not self._in_head or not (self._owed or self._waiting):
            return False
        self._sender_ended = True
        if self._owed and not self.cycle.response_started:
            half_closed = HalfClosed(self.transport, self.loop)
            self.cycle.transport = half_closed
            half_closed.probe()
        return True

    def shutdown(self) -> None:
        super().shutdown()
        if self.transport.is_closing():
            self._writing.begin()

    def leave(self) -> None:
        """Shortens the wait for a client that does not read: the server shuts down."""
        self._writing.hurry(LINGER_S)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._writing.begin()

    def resume_writing(self) -> None:
        super().resume_writing()
        if not self.transport.is_closing():
            self._writing.end()

    def timeout_keep_alive_handler(self) -> None:
        self._close()

    def _close(self) -> None:
        """Closes once the client has taken what is written, within the usual time."""
        if self in self.connections:
            self.transport.close()
            self._writing.begin()

    # Reading

    @property
    def _owed(self) -> bool:
        """Whether there is a request whose answer is not sent."""
        return self.cycle is not None and not self.cycle.response_complete

    def data_received(self, data: bytes) -> None:
        if self._refused:
            self._linger_bytes -= len(data)
            if self._linger_bytes <= 0:
                self._close()
            return
        self._waiting, self._fed = self._waiting[self._fed :] + data if self._waiting else data, 0
        self._feed()

    def _feed(self) -> None:
        """Gives the parser the waiting bytes, up to the end of a request whose answer is not sent."""
        for _ in range(BURST):
            if self._refused or self.transport.is_closing():
                self._waiting, self._fed = b"", 0
                return
            if self._fed == len(self._waiting) or (
                self._in_head and (self._owed or not (self._begun or self._begin()))
            ):
                break
            start, self._fed = self._fed, self._end_of_piece()
            self._parse(start, self._fed)
        else:
            self.loop.call_soon(self._feed)
        self._settle()

    def _begin(self) -> bool:
        """Begins a request, unless only line ends wait, which some clients send after a body."""
        if self._waiting[self._fed] in b"\r\n":
            self._waiting, self._fed = self._waiting[self._fed :].lstrip(b"\r\n"), 0
            if not self._waiting:
                return False
        self._unset_keepalive_if_required()
        self._begun, self._tail, self._overhead = True, b"", 0
        return True

    def _end_of_piece(self) -> int:
        """Returns the end of the next piece: at the latest where a request can end."""
        start, most = self._fed, len(self._waiting)
        if not self._in_head and self._left is not None:
            return min(most, start + self._left)
        split = (self._tail + self._waiting[start : start + 3]).find(EMPTY_LINE) if self._tail else -1
        if split >= 0:
            return start + split + len(EMPTY_LINE) - len(self._tail)
        most = min(most, start + MOST_PIECE)
        found = self._waiting.find(EMPTY_LINE, start, most)
        return most if found < 0 else found + len(EMPTY_LINE)

    def _parse(self, start: int, end: int) -> None:
        """Gives the parser one piece of the waiting bytes."""
        self._ended = False
        if self._in_head or self._left is None:
            self._tail = (self._tail + self._waiting[max(start, end - 3) : end])[-3:]
            self._overhead += end - start
        try:
            self.parser.feed_data(memoryview(self._waiting)[start:end])
            if self._body:
                self._take_body()
        except httptools.HttpParserUpgrade as upgrade:
            self._ignore_upgrade(whole=upgrade.args[0] == end - start)
        except httptools.HttpParserError:
            self._body.clear()
            self._refuse_framing()
        if self._ended:
            if not self._is_own_parser:
                self.parser, self._is_own_parser = httptools.HttpRequestParser(self), True
        elif self._overhead > self._guards.max_head:
            self._refuse_head()
        elif not self._in_head and self._left == 0:
            self._refuse_framing()

    def _ignore_upgrade(self, whole: bool) -> None:
        """Reads the body of a request that asks for an upgrade: a second parser gets the same head without the Upgrade header, and only
        its body events are used."""
        self._upgrading = False
        if not whole:
            self._refuse_framing()
            return
        head = without_upgrade(self.scope["method"].encode(), self.url, self.scope["http_version"], self.headers)
        self.parser, self._is_own_parser = httptools.HttpRequestParser(BodyEvents(self)), False
        try:
            self.parser.feed_data(head)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self._refuse_framing()

    def _take_body(self) -> None:
        """Passes on the body bytes of a piece."""
        data = self._body[0] if len(self._body) == 1 else b"".join(self._body)
        self._body.clear()
        self._body_bytes += len(data)
        if self._left is None:
            self._overhead = 0
        else:
            self._left -= len(data)
        if not self.cycle.response_complete:
            self.cycle.body += data
            if len(self.cycle.body) > HIGH_WATER_LIMIT:
                self.flow.pause_reading()
            self.cycle.message_event.set()

    def _settle(self) -> None:
        """Pauses or resumes reading depending on the waiting bytes, and starts the timer for the next ones."""
        ahead = len(self._waiting) - self._fed > READ_AHEAD
        if ahead or self.flow.ahead:
            self.flow.ahead = ahead
            if not self._pipelined.set(len(self._waiting) if ahead else 0):
                self.transport.abort()
        if ahead:
            self.flow.pause_reading()
            return
        if self._deadline is None:
            if not self._in_head:
                self._expect_body()
            elif self._begun:
                self._expect(self._guards.head_timeout_s, self._head_late)
        if self._fed == len(self._waiting):
            self._waiting, self._fed = b"", 0
            if self._in_head and not self._owed and self.cycle is not None:
                if self._sender_ended:
                    self._close()
                elif not self._begun and self.timeout_keep_alive_task is None:
                    self.timeout_keep_alive_task = self.loop.call_later(
                        self.timeout_keep_alive, self.timeout_keep_alive_handler
                    )
        if not self._owed or len(self.cycle.body) <= HIGH_WATER_LIMIT:
            self.flow.resume_reading()

    # The parser's callbacks

    def on_message_begin(self) -> None:
        if self._ended:
            raise ValueError("a request begins where none can begin")  # ends the parsing
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:  # trailers are dropped: nothing reads them
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self._overhead > self._guards.max_head:
            self._refuse_head()
            raise ValueError("head too large")  # ends the parsing
        error = refusal_of(self.parser.get_http_version(), self.parser.get_method(), self.headers)
        if error is not None:
            self._refuse(error)
            raise ValueError(str(error))
        super().on_headers_complete()
        place(self.scope, self._guards.prefix_of(self._address, self.headers))  # before its task begins
        self._expect_nothing()
        self._in_head, self._overhead, self._body_bytes, self._left = False, 0, 0, length_of(self.headers)
        self._upgrading = self.parser.should_upgrade()
        uploading = (self.scope["method"], self.scope["path"]) in UPLOADS
        self._body_ends = math.inf if uploading else self.loop.time() + self._guards.body_timeout_s

    def on_message_complete(self) -> None:
        if self._upgrading:  # the parser's idea, not ours
            return
        super().on_message_complete()
        self._expect_nothing()
        self._in_head = self._ended = True
        self._begun = False

    def on_response_complete(self) -> None:
        """Continues with the waiting bytes, after other connections had their turn."""
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            self._writing.begin()
        elif self._waiting:
            self.loop.call_soon(self._feed)
        else:
            self._feed()

    # Deadlines and refusals

    def _expect(self, seconds: float, late: Callable[[], None]) -> None:
        self._expect_nothing()
        self._deadline = self.loop.call_later(seconds, late)

    def _expect_body(self) -> None:
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
            self._body_bytes = 0
            self._expect_body()
        else:
            self._refuse(RequestTimeout(f"the request body comes slower than {BODY_RATE >> 10} KB/s"))

    def _refuse_head(self) -> None:
        self._refuse(HeadersTooLarge(f"the request head is larger than {self._guards.max_head >> 10} KB"))

    def _refuse_framing(self) -> None:
        self._refuse(BadRequest("the request is not valid HTTP"))

    def _refuse(self, error: ServiceError | ModelError) -> None:
        """Answers unless an answer has begun, reads on a little so that the client sees it, and closes."""
        if self._refused:
            return
        self._refused = True
        self._expect_nothing()
        answered = (
            not self._in_head and not self._owed
        )  # before its body was there: a second answer would belong to no request
        if self.transport.is_closing() or answered or (self._owed and self.cycle.response_started):
            self._close()
            return
        path = getattr(self, "url", b"").decode("latin-1").partition("?")[0]
        self.transport.write(refusal_bytes(error, without(self._guards.root_path, path)))
        if self._owed:  # its handler learns that the client is gone
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.write_eof()
        self.flow.ahead = False
        self.flow.resume_reading()
        self.loop.call_later(LINGER_S, self._close)
