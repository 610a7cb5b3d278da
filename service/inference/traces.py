"""Sends a trace of each request to an OpenTelemetry collector. Nothing is imported for it without `trace_endpoint`.

    POST /predict    the server's span; continues the trace of the caller's `traceparent`
      decode         of each image
      queue          of each image and backbone, until its batch is cut
      compute        the forward pass with `imago.batch.size` images; it links to
    batch            the forward pass in a trace of its own, which links to the requests of its images

Spans of images are made afterwards, so that neither decoding nor the device thread waits for them. The SDK's own environment variables
apply, such as OTEL_TRACES_SAMPLER for a share of the requests and OTEL_EXPORTER_OTLP_HEADERS for a collector's key.
"""

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from importlib.metadata import version
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from models.errors import ModelError
from service.inference.results import Forward, Output
from service.settings import Settings, SettingsError
from service.system.hosts import is_loopback

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
MAX_PATH = 240  # characters
CLOSE_S = 3.0  # for sending the last spans when the server ends
EXPORTER = "opentelemetry.exporter.otlp.proto.http.trace_exporter"  # its logger
SILENT_S = 60.0  # between two of its log lines of one level

_request: "ContextVar[Span | None]" = ContextVar("request", default=None)


class Sparse(logging.Filter):
    """Lets one line of each level per minute pass, because the exporter logs every failed attempt."""

    def __init__(self) -> None:
        super().__init__()
        self._due: dict[int, float] = {}  # by level

    def filter(self, record: logging.LogRecord) -> bool:
        if time.monotonic() < self._due.get(record.levelno, 0.0):
            return False
        self._due[record.levelno] = time.monotonic() + SILENT_S
        return True


class Traces:
    """Makes the spans of one server. Used on the event loop only."""

    def __init__(self, provider: "TracerProvider") -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._tracer = provider.get_tracer("imago", version("imago"))
        self._propagator = TraceContextTextMapPropagator()

    @classmethod
    def of(cls, settings: Settings) -> "Traces | None":
        """Return None if no collector is set. Raises SettingsError if the extra is not installed."""
        if settings.trace_endpoint is None:
            return None
        try:
            import requests
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise SettingsError(
                "IMAGO_TRACE_ENDPOINT needs the extra `otel`, which is not installed: pip install 'imago[otel]'"
            ) from error
        about = {
            "service.name": "imago",
            "service.version": version("imago"),
            "service.instance.id": settings.server_name,
        }
        provider = TracerProvider(resource=Resource.create(about), shutdown_on_exit=False)
        url = settings.trace_endpoint.rstrip("/").removesuffix("/v1/traces") + "/v1/traces"
        session = requests.Session()
        session.trust_env = not is_loopback(
            urlsplit(url).hostname or ""
        )  # the environment's proxy does not apply to this machine
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=url, session=session)))
        logging.getLogger(EXPORTER).addFilter(Sparse())
        return cls(provider)

    def close(self) -> None:
        """Send the remaining spans, for at most CLOSE_S, because the SDK's own limit applies to each batch in turn."""
        sending = threading.Thread(target=self._provider.shutdown, daemon=True)
        sending.start()
        sending.join(CLOSE_S)

    # Requests

    def begin(self, scope: Mapping[str, Any], headers: Mapping[bytes, bytes]) -> "Span":
        """Start the span of a request from its head; later spans in this task are parts of it."""
        from opentelemetry.trace import SpanKind

        method = scope["method"] if scope["method"] in METHODS else "_OTHER"
        attributes = {
            "http.request.method": method,
            "url.path": scope["path"][:MAX_PATH],
            "url.scheme": scope.get("scheme", "http"),
        }
        if client := scope.get("client"):
            attributes["client.address"] = client[0]
        carried = {name: headers.get(name.encode(), b"").decode("latin-1") for name in self._propagator.fields}
        parent = self._propagator.extract(carried)
        span = self._tracer.start_span(method, parent, SpanKind.SERVER, attributes)
        _request.set(span)
        return span

    def end(self, span: "Span", method: str, route: str, status: int, about: Mapping[str, Any]) -> None:
        """End a request's span. `route` is a template, or "other"; `about` has our own attributes."""
        from opentelemetry.trace import StatusCode

        if route != "other":
            span.update_name(f"{method} {route}")
            span.set_attribute("http.route", route)
        span.set_attributes({"http.response.status_code": status, **about})
        if status >= 500:
            span.set_attribute("error.type", str(status))
            span.set_status(StatusCode.ERROR)
        span.end()

    # Images

    def request(self) -> "Span | None":
        """Return the span of this task's request; None if its trace is not kept."""
        span = _request.get()
        return span if span is not None and span.is_recording() else None

    def decoded(self, span: "Span | None", started: float, error: ModelError | None = None) -> None:
        """Add a span for an image that was decoded or refused, from `started` (time.monotonic()) until now."""
        if span is not None:
            self._child(span, "decode", started, time.monotonic(), {"error.type": error.code} if error else {})

    def computed(self, span: "Span | None", outputs: Sequence[Output]) -> None:
        """Add the spans of an image that went through its backbones."""
        if span is None:
            return
        for output in outputs:
            forward = output.forward
            about: dict[str, Any] = {"imago.backbone": forward.backbone, "imago.device": forward.device}
            self._child(span, "queue", forward.started - output.timings.queue / 1000, forward.started, about)
            about["imago.batch.size"] = forward.images
            self._child(span, "compute", forward.started, forward.ended, about, [self._batch(forward, about)])

    def _batch(self, forward: Forward, about: Mapping[str, Any]) -> "Span":
        """Return the span of a batch, made for its first image and shared by the others."""
        if forward.span is None:
            requests = list(dict.fromkeys(forward.origins))
            forward.span = self._child(None, "batch", forward.started, forward.ended, about, requests)
        batch: Span = forward.span
        return batch

    def _child(
        self,
        parent: "Span | None",
        name: str,
        started: float,
        ended: float,
        attributes: Mapping[str, Any],
        linked: "Sequence[Span]" = (),
    ) -> "Span":
        """Make a span between two times of time.monotonic(); without a parent it starts a trace."""
        from opentelemetry.context import Context
        from opentelemetry.trace import Link, StatusCode, set_span_in_context

        ahead_ns = time.time_ns() - time.monotonic_ns()
        within = Context() if parent is None else set_span_in_context(parent, Context())
        contexts = [span.get_span_context() for span in linked]
        links = [Link(context) for context in contexts if context.trace_flags.sampled]
        span = self._tracer.start_span(
            name, within, attributes=attributes, links=links, start_time=round(started * 1e9) + ahead_ns
        )
        if "error.type" in attributes:
            span.set_status(StatusCode.ERROR)
        span.end(round(ended * 1e9) + ahead_ns)
        return span
