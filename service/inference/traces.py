"""A trace of each request, sent to an OpenTelemetry collector. Without `trace_endpoint` nothing of it is imported.

    POST /predict    the server's span; continues the trace that the caller's `traceparent` names
      decode         of each image
      queue          of each image and backbone, until its batch is cut
      compute        the forward pass; `imago.batch.size` images travelled in it, and it links to
    batch            the forward pass itself, in a trace of its own, which links to the requests that it answered

Spans of images are made when their times are known, so that neither decoding nor the device thread waits for them. The SDK's own
environment variables hold, as OTEL_TRACES_SAMPLER for a share of the requests and OTEL_EXPORTER_OTLP_HEADERS for a collector's key.
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
CLOSE_S = 3.0  # at the end of the server, for the last spans to be sent
EXPORTER = "opentelemetry.exporter.otlp.proto.http.trace_exporter"  # its logger
SILENT_S = 60.0  # between two of its lines of one level

_request: "ContextVar[Span | None]" = ContextVar("request", default=None)


class Sparse(logging.Filter):
    """A line of each level a minute: of a collector that does not answer the exporter tells at every attempt."""

    def __init__(self) -> None:
        super().__init__()
        self._due: dict[int, float] = {}  # by level

    def filter(self, record: logging.LogRecord) -> bool:
        if time.monotonic() < self._due.get(record.levelno, 0.0):
            return False
        self._due[record.levelno] = time.monotonic() + SILENT_S
        return True


class Traces:
    """Makes the spans of one server; safe to use from the event loop alone."""

    def __init__(self, provider: "TracerProvider") -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._tracer = provider.get_tracer("imago", version("imago"))
        self._propagator = TraceContextTextMapPropagator()

    @classmethod
    def of(cls, settings: Settings) -> "Traces | None":
        """None where no collector is named. Raises SettingsError where the extra is not installed."""
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
        session.trust_env = not is_loopback(urlsplit(url).hostname or "")  # its proxy is not for this machine
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=url, session=session)))
        logging.getLogger(EXPORTER).addFilter(Sparse())
        return cls(provider)

    def close(self) -> None:
        """Sends what is left, for CLOSE_S at most: the SDK's own limit is that of every batch in turn."""
        sending = threading.Thread(target=self._provider.shutdown, daemon=True)
        sending.start()
        sending.join(CLOSE_S)

    # Requests

    def begin(self, scope: Mapping[str, Any], headers: Mapping[bytes, bytes]) -> "Span":
        """The span of a request, from its head; what follows in this task is part of it."""
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
        """The answer is out. `route` is a template, or "other"; `about` are attributes of ours."""
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
        """Of this task, where it is one whose trace is kept."""
        span = _request.get()
        return span if span is not None and span.is_recording() else None

    def decoded(self, span: "Span | None", started: float, error: ModelError | None = None) -> None:
        """An image was decoded, or found bad, from `started` (time.monotonic()) until now."""
        if span is not None:
            self._child(span, "decode", started, time.monotonic(), {"error.type": error.code} if error else {})

    def computed(self, span: "Span | None", outputs: Sequence[Output]) -> None:
        """An image went through its backbones."""
        if span is None:
            return
        for output in outputs:
            forward = output.forward
            about: dict[str, Any] = {"imago.backbone": forward.backbone, "imago.device": forward.device}
            self._child(span, "queue", forward.started - output.timings.queue / 1000, forward.started, about)
            about["imago.batch.size"] = forward.images
            self._child(span, "compute", forward.started, forward.ended, about, [self._batch(forward, about)])

    def _batch(self, forward: Forward, about: Mapping[str, Any]) -> "Span":
        """Made when the first image of the batch is told of, and the same for the others."""
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
        """A span between two times of time.monotonic(); without a parent, the first of its trace."""
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
