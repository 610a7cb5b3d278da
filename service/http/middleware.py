"""The one layer around every request: its id, its size, its time, and an answer to every uncaught error.

head -> request id -> host? draining? window? -> routes: key? declared size? -> the body, uncompressed and counted -> metrics, access log,
trace
"""

import asyncio
import contextlib
import errno
import json
import logging
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from secrets import token_hex
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, quote

import anyio
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from models.errors import ModelError
from service.errors import (
    BadRequest,
    Draining,
    InsufficientStorage,
    Internal,
    PayloadTooLarge,
    QueueFull,
    ServiceError,
    envelope,
    status_of,
)
from service.http.auth import client_of
from service.http.compression import inflating
from service.http.large_requests import Windows
from service.inference.backbone_queue import Flow, Shares
from service.inference.traces import Traces
from service.observability.logs import ACCESS, Fields, request_id
from service.observability.metrics import Metrics, Rejection
from service.settings import Settings
from service.system.hosts import Hosts

if TYPE_CHECKING:
    from opentelemetry.trace import Span

log = logging.getLogger(__name__)
access_log = logging.getLogger(ACCESS)

LARGE_BODY = 2**16  # bytes; what is smaller is read sooner than it is worth to refuse it unread
SMALL_BODY = 2**16  # bytes: all that a route without images may be sent. 1 MB of `[],` stops the event loop for 0.4 s
IMAGE_PATHS = frozenset({"/predict", "/embed"})
UPLOADS = frozenset({("POST", "/datasets")})  # their bodies go to the disk as they come
INFER_PATH = re.compile(r"/v2/models/(?P<model>[^/]+)(/versions/[^/]+)?/infer")  # the Open Inference Protocol's
USER_PATHS = {
    "POST": re.compile(rf"/predict|/embed|{INFER_PATH.pattern}"),
    "GET": re.compile(r"/models(/[^/]+)?|/v2(/(models|health)/.*)?"),
}
HEALTH = (
    "/health/",
    "/v2/health/",
)  # answered under any Host: load balancers send the address that they reach the server by
OPEN_WHILE_DRAINING = (*HEALTH, "/metrics")
BODY_SHARE = 1 / 2  # of the memory for bodies that others leave, for one client, and of that for one request
# The rest of a refused body is read and dropped: closing before that resets the connection, and many clients lose the answer with it.
LINGER_BYTES, LINGER_S, LINGER_ALL_S = 2**26, 2.0, 15.0  # as long as more comes within 2 s, and in all
MAX_LINE, MAX_LOGGED_PATH, MAX_LOGGED_MODELS = 512, 240, 96  # characters of a line of the access log, and in it
OF_OTHER_FIELDS = 290  # characters that names, address, method, route, numbers and trace_id take at most
CLIENT_LEFT = 499  # nobody reads it; it keeps those who left apart in the metrics

_REQUEST_ID = re.compile(rb"[\x21\x23-\x5b\x5d-\x7e]{1,128}")  # nothing that JSON would have to escape
_ENCODER = json.JSONEncoder(allow_nan=False, ensure_ascii=False, separators=(",", ":"))
_REJECTIONS: dict[str, Rejection] = {
    "queue_full": "queue_full",
    "draining": "draining",
    "not_ready": "not_ready",
    "unauthorized": "unauthorized",
    "too_many_attempts": "unauthorized",
    "payload_too_large": "too_large",
}


@dataclass(slots=True, eq=False)
class Exchange:
    """One request and its answer, as the middleware sees them."""

    request_id: bytes
    limit: int  # bytes of body
    started: float = field(default_factory=time.perf_counter)
    received: int = 0
    client: str = ""
    held: int = 0  # bytes of body in memory
    flow: Flow | None = None  # of a large request, in the window of which it counts
    status: int = 0
    admitted: bool = False  # it counts as traffic, and a shutdown waits for it
    complete: bool = False  # the whole body has been received
    oversized: bool = False  # by its declared size: nothing of the body is read
    closing: bool = False  # the connection is to be closed after the answer
    refusal: ServiceError | None = None  # raised to whoever read the body, who may have taken it for something else
    models: Sequence[str] = ()  # that answered, as name@version
    images: int = 0  # that were sent
    span: "Span | None" = None

    def check_size(self) -> None:
        """Raises PayloadTooLarge for a body whose declared size exceeds the limit, before any of it is read."""
        if self.oversized:
            self.refusal = _too_large(self.limit)
            raise self.refusal


class Traffic:
    """The number of requests under way, from admission to the end of the answer; health and metrics do not count."""

    def __init__(self) -> None:
        self.under_way = 0
        self.held = 0  # bytes of bodies in memory
        self._none = asyncio.Event()
        self._none.set()

    def begin(self) -> None:
        self.under_way += 1
        self._none.clear()

    def end(self) -> None:
        self.under_way -= 1
        if self.under_way == 0:
            self._none.set()

    async def ended(self, within_s: float) -> bool:
        """Waits until no request is under way; returns False if some still are after `within_s`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                await self._none.wait()
        return self.under_way == 0


class Edge:
    """Pure ASGI middleware. Counts the bytes of bodies in memory by client, so that slow senders cannot fill it."""

    def __init__(
        self, app: ASGIApp, settings: Settings, metrics: Metrics, traffic: Traffic, traces: Traces | None
    ) -> None:
        self.app, self.settings, self.metrics, self.traffic, self.traces = app, settings, metrics, traffic, traces
        self.hosts = Hosts(settings.host, settings.allowed_hosts)
        self.bodies = Shares(settings.max_queue_mb * 2**20, BODY_SHARE)  # bytes of all requests under way
        self.windows = Windows()
        self._raw_limit = settings.max_body_mb * 2**20
        self._multipart_limit = settings.max_multipart_mb * 2**20

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        exchange = Exchange(_request_id(headers.get(b"x-request-id")), self._limit(scope, headers))
        exchange.complete = b"content-length" not in headers and b"transfer-encoding" not in headers
        scope["state"]["request_id"] = exchange.request_id.decode()
        scope["state"]["exchange"] = exchange
        request_id.set(exchange.request_id.decode())
        exchange.client = client_of(Request(scope))
        if self.traces is not None and not scope["path"].startswith(OPEN_WHILE_DRAINING):
            exchange.span = self.traces.begin(scope, headers)
        try:
            await self._answer(scope, headers, exchange, receive, send)
        finally:
            exchange.refusal = (
                None  # its traceback refers to the exchange, which would live on until a garbage collection
            )
            self._release(exchange)
            if exchange.flow is not None:
                self.windows.leave(exchange.flow, refused=exchange.status == 429)
            if exchange.admitted:
                self.traffic.end()
            self._record(scope, exchange)

    async def _answer(
        self, scope: Scope, headers: dict[bytes, bytes], exchange: Exchange, receive: Receive, send: Send
    ) -> None:
        reply = self._reply_to(exchange, send)
        try:
            self._admit(scope, headers, exchange)
            await self._enter_window(scope, headers, exchange)
            body = self._body(scope, headers, exchange, receive)
            await self.app(scope, self._counted(exchange, body, _is_upload(scope)), reply)
        except ClientDisconnect:
            exchange.status = CLIENT_LEFT
        except asyncio.CancelledError:  # the grace time of a shutdown is over
            if exchange.status or not scope["state"]["engine"].draining:
                raise
            late = Draining("the server shut down before the answer was there")
            await self._refuse(late, scope["path"], exchange, receive, reply)
        except (ServiceError, ModelError) as error:
            await self._refuse(exchange.refusal or error, scope["path"], exchange, receive, reply)
        except Exception as error:
            log.exception("request %s failed", exchange.request_id.decode())
            if exchange.status:  # the answer had begun: all we can do is to break it off
                raise
            await self._refuse(_unforeseen(error), scope["path"], exchange, receive, reply)

    def _limit(self, scope: Scope, headers: dict[bytes, bytes]) -> int:
        path = scope["path"]
        if _is_upload(scope):
            return self.settings.max_dataset_mb * 2**20
        if INFER_PATH.fullmatch(path):
            return self._multipart_limit
        if path not in IMAGE_PATHS:
            return SMALL_BODY
        kind = headers.get(b"content-type", b"").partition(b";")[0].lower()
        several = kind.lstrip().startswith(b"multipart/") or b"json" in kind
        return self._multipart_limit if several else self._raw_limit

    def _admit(self, scope: Scope, headers: dict[bytes, bytes], exchange: Exchange) -> None:
        """Raises the errors that the head of a request shows."""
        if not scope["path"].startswith(HEALTH):
            self.hosts.check(headers.get(b"host"))
        draining = scope["state"]["engine"].draining
        exchange.closing = draining
        if not scope["path"].startswith(OPEN_WHILE_DRAINING):
            if draining:
                raise Draining("the server is shutting down; try again", retry_after_s=self.settings.drain_seconds)
            exchange.admitted = True
            self.traffic.begin()
        declared = headers.get(b"content-length", b"0").strip()
        if not declared.isdigit():
            raise BadRequest("Content-Length must be a number")
        if int(declared) > exchange.limit:  # refused once the key is checked
            exchange.oversized = exchange.closing = True

    async def _enter_window(self, scope: Scope, headers: dict[bytes, bytes], exchange: Exchange) -> None:
        """Counts a large request with images in the window of its flow. Raises QueueFull if there is no room there in time."""
        large = b"transfer-encoding" in headers or int(headers.get(b"content-length", b"0")) > LARGE_BODY
        if not large or exchange.oversized or not (scope["path"] in IMAGE_PATHS or INFER_PATH.fullmatch(scope["path"])):
            return
        flow = (exchange.client, _model_of(scope))
        if not await self.windows.enter(flow):
            raise QueueFull(
                "the queue is full of your requests for this model; try again when some of them are answered",
                retry_after_s=1.0,
            )
        exchange.flow = flow

    def _body(self, scope: Scope, headers: dict[bytes, bytes], exchange: Exchange, receive: Receive) -> Receive:
        """Wraps `receive`: notes when everything has arrived, and uncompresses bodies of routes that accept that."""

        async def noted() -> Message:
            message = await receive()
            exchange.complete = exchange.complete or not message.get("more_body", False)
            return message

        encoding = headers.get(b"content-encoding", b"identity").decode("latin-1")
        if encoding.lower() != "identity" and INFER_PATH.fullmatch(scope["path"]):
            return inflating(noted, encoding)
        return noted

    def _counted(self, exchange: Exchange, receive: Receive, passing: bool) -> Receive:
        """Wraps `receive`: raises once the body exceeds its limit, or the bodies in memory theirs. A body that is only `passing` through
        memory counts for itself alone."""

        async def counted() -> Message:
            exchange.check_size()
            message = await receive()
            size = len(message.get("body", b""))
            exchange.received += size
            if exchange.received > exchange.limit:
                exchange.refusal = _too_large(exchange.limit)
            elif size and not passing:
                self._hold(exchange, size)
            if exchange.refusal is not None:
                raise exchange.refusal
            return message

        return counted

    def _hold(self, exchange: Exchange, size: int) -> None:
        """Counts bytes of a body that stay in memory. Sets a refusal if the client, or this request of it, has used its share."""
        alone = self.bodies.total == exchange.held
        if alone or self.bodies.fits(exchange.client, exchange, size):
            self.bodies.take(exchange.client, exchange, size)
            exchange.held += size
            self.traffic.held = self.bodies.total
            return
        held = (
            f"the server already holds {self.bodies.total >> 20} MB of requests, or your share of them; try again later"
        )
        exchange.refusal = QueueFull(held, retry_after_s=1.0)

    def _release(self, exchange: Exchange) -> None:
        if exchange.held:
            self.bodies.give(exchange.client, exchange, exchange.held)
            exchange.held, self.traffic.held = 0, self.bodies.total

    def _reply_to(self, exchange: Exchange, send: Send) -> Send:
        async def reply(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                message["headers"] = [
                    *message.get("headers", ()),
                    (b"x-request-id", exchange.request_id),
                    (b"x-content-type-options", b"nosniff"),
                ]
                if exchange.closing:
                    message["headers"].append((b"connection", b"close"))
            await send(message)

        return reply

    async def _refuse(
        self, error: ServiceError | ModelError, path: str, exchange: Exchange, receive: Receive, reply: Send
    ) -> None:
        """Answers an error. If the body was not read to its end, reads on a little so that the sender sees the answer, and closes."""
        count_rejection(self.metrics, error)
        self._release(exchange)  # what was read is dropped, however long the rest of it takes
        exchange.closing = exchange.closing or not exchange.complete
        status, headers, body = render(error, exchange.request_id.decode(), path)
        await reply({"type": "http.response.start", "status": status, "headers": headers})
        if not exchange.complete:
            await reply({"type": "http.response.body", "body": body, "more_body": True})
            body = b""
            with anyio.move_on_after(LINGER_ALL_S):
                await _discard(receive)
        await reply({"type": "http.response.body", "body": body, "more_body": False})

    def _record(self, scope: Scope, exchange: Exchange) -> None:
        reached = (
            scope["path"] if scope["path"] in IMAGE_PATHS else "other"
        )  # a body can be refused before any route is looked for
        matched = scope.get("route")
        route: str = reached if matched is None else matched.path
        seconds = time.perf_counter() - exchange.started
        status = exchange.status or CLIENT_LEFT
        self.metrics.request(route, scope["method"], status, seconds)
        if self.settings.access_log:
            access_log.info(_access_line(scope, route, exchange, seconds))
        if self.traces is not None and exchange.span is not None:
            about: dict[str, Any] = {"imago.request_id": exchange.request_id.decode()}
            if exchange.images:
                about |= {"imago.models": exchange.models, "imago.images": exchange.images}
            self.traces.end(exchange.span, scope["method"], route, status, about)


class UserCORS(CORSMiddleware):
    """Answers cross-origin requests to the user routes only: no page of another origin reaches an admin route."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and _is_user_route(scope):
            await super().__call__(scope, receive, send)
        else:
            await self.app(scope, receive, send)


def render(
    error: ServiceError | ModelError, request_id: str, path: str
) -> tuple[int, list[tuple[bytes, bytes]], bytes]:
    """Returns an error as status, headers and JSON body; under /v2 the body is that of the Open Inference Protocol."""
    status = status_of(error)
    param = getattr(error, "param", None)
    if path == "/v2" or path.startswith("/v2/"):
        body = encode({"error": f"{param}: {error}" if param else str(error)})
    else:
        body = encode(envelope(error.code, str(error), param, request_id) | getattr(error, "beside", {}))
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(name.lower().encode(), value.encode()) for name, value in getattr(error, "headers", {}).items()]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if status in (429, 503):
        seconds = max(1, round(getattr(error, "retry_after_s", None) or 1))
        headers.append((b"retry-after", str(seconds).encode()))
    return status, headers, body


def encode(content: Any) -> bytes:
    """Returns strict JSON. Raises ValueError for NaN and infinity."""
    return _ENCODER.encode(content).encode()


def encode_each(items: Iterable[Any]) -> bytes:
    """Returns a JSON array. A call of the encoder holds the GIL until it returns, so each item has its own call."""
    return b"[" + b",".join(map(encode, items)) + b"]"


def count_rejection(metrics: Metrics, error: ServiceError | ModelError) -> None:
    """Counts a refusal, if its reason is one that the engine does not count itself."""
    if (reason := _REJECTIONS.get(error.code)) is not None:
        metrics.reject(reason)


def _request_id(given: bytes | None) -> bytes:
    if given is not None and _REQUEST_ID.fullmatch(given):
        return given
    return token_hex(8).encode()


def _model_of(scope: Scope) -> str:
    """Returns the models that a request names in its path or query; those in its body are not known yet."""
    path = INFER_PATH.fullmatch(scope["path"])
    models = [path["model"]] if path else parse_qs(scope["query_string"].decode("latin-1")).get("model", [])
    return ",".join(sorted(filter(scope["state"]["engine"].registry.is_served, set(models))))


def _is_upload(scope: Scope) -> bool:
    return (scope["method"], scope["path"]) in UPLOADS


def _is_user_route(scope: Scope) -> bool:
    """Whether a request, or the request that a preflight asks for, is for a user route."""
    method = scope["method"]
    if method == "OPTIONS":
        method = dict(scope["headers"]).get(b"access-control-request-method", b"").decode("latin-1")
    paths = USER_PATHS.get(method)
    return paths is not None and paths.fullmatch(scope["path"]) is not None


def _unforeseen(error: Exception) -> ServiceError:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return InsufficientStorage("the server's disk is full; free some, or delete jobs and models")
    return Internal("internal error; the log has the details")


def _too_large(limit: int) -> PayloadTooLarge:
    size = f"{limit >> 20} MB" if limit >= 2**20 else f"{limit >> 10} KB"
    return PayloadTooLarge(f"the request body is larger than {size}")


async def _discard(receive: Receive) -> None:
    left = LINGER_BYTES
    while left > 0:
        with anyio.move_on_after(LINGER_S):
            message = await receive()
            left -= len(message.get("body", b""))
            if message["type"] == "http.request" and message.get("more_body", False):
                continue
        return


def _access_line(scope: Scope, route: str, exchange: Exchange, seconds: float) -> Fields:
    """Returns at most MAX_LINE characters. The path is percent-encoded, as received, and has the room that the rest leaves."""
    client, id, models = (
        scope.get("client"),
        exchange.request_id.decode(),
        ",".join(exchange.models)[:MAX_LOGGED_MODELS],
    )
    room = max(0, min(MAX_LOGGED_PATH, MAX_LINE - OF_OTHER_FIELDS - len(id) - len(models)))
    line = Fields(
        client=client[0][:45] if client else None,  # the longest an IPv6 address can be
        method=scope["method"][:16],
        route=route,
        path=quote(scope["path"][:room])[:room],
        status=exchange.status or CLIENT_LEFT,
        ms=round(seconds * 1000, 1),
        request_id=id,
    )
    if exchange.images:
        line |= {"models": models, "images": exchange.images}
    if exchange.span is not None:
        line["trace_id"] = f"{exchange.span.get_span_context().trace_id:032x}"
    return line
