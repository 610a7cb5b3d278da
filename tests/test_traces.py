"""Spans of requests and of their images: by the SDK's exporter in memory, and by a collector on the loopback."""

import asyncio
import json
import logging
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import httpx
import pytest
from opentelemetry.exporter.otlp.proto.http import trace_exporter
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from support.image_files import save, solid
from support.live_server import live_server
from support.live_server import weights as weights
from support.service_fakes import GOOD, Service, client_of

from models.store.store import ModelStore
from service.app import create_app
from service.inference.engine import Engine
from service.inference.traces import Traces
from service.settings import Settings, SettingsError

pytestmark = pytest.mark.anyio
IMAGE = save(solid())
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
CARRIED = {"traceparent": f"00-{TRACE}-{PARENT}-01"}


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def traces(exporter: InMemorySpanExporter) -> Traces:
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return Traces(provider)


def traced(tmp_path: Path, traces: Traces) -> Service:
    """The application around a fake engine."""
    service = Service(tmp_path)
    service.app = create_app(service.settings, service.engine, service.store, service.metrics, traces=traces)
    return service


@asynccontextmanager
async def computing(weights: Path, tmp_path: Path, traces: Traces) -> AsyncIterator[httpx.AsyncClient]:
    """The application around an engine that computes."""
    service = Service(tmp_path, weights=weights, device="cpu", engine="torch", threads=1, max_batch=8)
    store = ModelStore(weights)
    engine = Engine(service.settings, store, service.metrics, traces)
    service.app = create_app(service.settings, engine, store, service.metrics, traces=traces)
    async with client_of(service) as http:
        await engine.wait_ready(60)
        yield http


def named(exporter: InMemorySpanExporter, name: str) -> list[ReadableSpan]:
    return [span for span in exporter.get_finished_spans() if span.name == name]


def parent(span: ReadableSpan) -> int:
    assert span.parent is not None
    return span.parent.span_id


async def test_a_request_is_a_span_that_continues_its_callers_trace(
    tmp_path: Path, traces: Traces, exporter: InMemorySpanExporter
) -> None:
    async with client_of(traced(tmp_path, traces)) as http:
        answer = await http.post("/predict?top_k=2", content=GOOD, headers=CARRIED)
    [span] = exporter.get_finished_spans()
    about = dict(span.attributes or {})
    assert (span.name, span.kind.name, f"{span.context.trace_id:032x}") == ("POST /predict", "SERVER", TRACE)
    assert f"{parent(span):016x}" == PARENT
    assert (about["http.route"], about["http.response.status_code"], about["imago.models"]) == (
        "/predict",
        200,
        ("pets@1",),
    )
    assert about["imago.request_id"] == answer.headers["x-request-id"]
    assert "top_k" not in span.to_json()


@pytest.mark.parametrize(
    ("method", "path", "name"),
    [
        pytest.param("GET", "/models/evil", "GET /models/{name}", id="a template, not the path"),
        pytest.param("GET", "/evil", "GET", id="no route"),
        pytest.param("BREW", "/evil", "_OTHER", id="a made-up method"),
    ],
)
async def test_no_name_is_what_a_caller_chose(
    tmp_path: Path, traces: Traces, exporter: InMemorySpanExporter, method: str, path: str, name: str
) -> None:
    async with client_of(traced(tmp_path, traces)) as http:
        await http.request(method, path)
    assert [span.name for span in exporter.get_finished_spans()] == [name]


async def test_a_failure_of_ours_is_an_error(tmp_path: Path, traces: Traces, exporter: InMemorySpanExporter) -> None:
    service = traced(tmp_path, traces)
    service.engine.error = RuntimeError("a bug")
    async with client_of(service) as http:
        await http.post("/predict", content=GOOD)
        service.engine.error = None
        await http.post("/predict", content=b"", headers={"traceparent": "nonsense"})
    assert [span.status.status_code.name for span in exporter.get_finished_spans()] == ["ERROR", "UNSET"]


async def test_health_and_metrics_are_not_traced(
    tmp_path: Path, traces: Traces, exporter: InMemorySpanExporter
) -> None:
    async with client_of(traced(tmp_path, traces)) as http:
        for path in ("/health/live", "/health/ready", "/metrics"):
            await http.get(path)
    assert exporter.get_finished_spans() == ()


async def test_an_image_is_decoded_waits_and_is_computed(
    weights: Path, tmp_path: Path, traces: Traces, exporter: InMemorySpanExporter
) -> None:
    async with computing(weights, tmp_path, traces) as http:
        await http.post("/predict", content=IMAGE, headers=CARRIED)
    [request] = named(exporter, "POST /predict")
    parts = [named(exporter, name)[0] for name in ("decode", "queue", "compute")]
    assert [parent(span) for span in parts] == [request.context.span_id] * 3
    times = [request.start_time, *(t for span in parts for t in (span.start_time, span.end_time)), request.end_time]
    assert [t or 0 for t in times] == pytest.approx(sorted(t or 0 for t in times), abs=2e6)  # ns; clocks apart by less


async def test_a_batch_links_to_all_its_requests_and_they_to_it(
    weights: Path, tmp_path: Path, traces: Traces, exporter: InMemorySpanExporter
) -> None:
    async with computing(weights, tmp_path, traces) as http:
        await asyncio.gather(*(http.post("/predict", content=IMAGE) for _ in range(6)))
    requests = {span.context.span_id for span in named(exporter, "POST /predict")}
    batches = {span.context.span_id: span for span in named(exporter, "batch")}
    linked = [link.context.span_id for span in batches.values() for link in span.links]
    assert (len(linked), set(linked)) == (6, requests)
    assert all(span.parent is None for span in batches.values())
    for compute in named(exporter, "compute"):
        batch = batches[compute.links[0].context.span_id]
        assert parent(compute) in {link.context.span_id for link in batch.links}
        assert dict(compute.attributes or {})["imago.batch.size"] == len(batch.links)


async def test_a_bad_image_is_an_error_in_its_place(
    weights: Path, tmp_path: Path, traces: Traces, exporter: InMemorySpanExporter
) -> None:
    files = [("file", ("good.png", IMAGE)), ("file", ("bad.png", IMAGE[:40]))]
    async with computing(weights, tmp_path, traces) as http:
        await http.post("/predict", files=files)
    assert sorted(span.status.status_code.name for span in named(exporter, "decode")) == ["ERROR", "UNSET"]
    assert len(named(exporter, "compute")) == 1


async def test_what_a_sampler_leaves_out_leaves_no_span(weights: Path, tmp_path: Path) -> None:
    exporter, provider = InMemorySpanExporter(), TracerProvider(sampler=ALWAYS_OFF, shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    async with computing(weights, tmp_path, Traces(provider)) as http:
        assert (await http.post("/predict", content=IMAGE)).status_code == 200
    assert exporter.get_finished_spans() == ()


# The collector


class Collector(HTTPServer):
    """Takes traces as OTLP over HTTP."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Collect)
        self.asked: list[str] = []
        self.received = list[ExportTraceServiceRequest]()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def names(self) -> list[str]:
        scopes = [s for r in self.received for resource in r.resource_spans for s in resource.scope_spans]
        return [span.name for scope in scopes for span in scope.spans]


class Collect(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        self.server.asked.append(self.path)
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.received.append(ExportTraceServiceRequest.FromString(body))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *args: object) -> None: ...


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_a_server_sends_its_traces_and_names_them_in_its_log(
    weights: Path, tmp_path: Path, collector: Collector
) -> None:
    flags = ("--trace-endpoint", collector.url, "--log-format", "json", "--access-log")
    with live_server(weights, tmp_path, *flags) as server:
        httpx.post(f"{server.url}/predict", content=IMAGE, headers={**CARRIED, "X-Request-ID": "mine"})
    assert {"POST /predict", "decode", "queue", "compute", "batch"} <= set(collector.names())
    assert set(collector.asked) == {"/v1/traces"}
    lines = [json.loads(line) for line in server.log.read_text().splitlines()]
    [access] = [line for line in lines if line["logger"] == "service.access" and line["route"] == "/predict"]
    assert (access["trace_id"], access["request_id"], access["status"]) == (TRACE, "mine", 200)
    assert (access["models"], access["images"], access["client"]) == ("insects@1", 1, "127.0.0.1")


def test_a_collector_that_is_away_does_not_hold_up_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.inference.traces.CLOSE_S", 0.2)
    away = Traces.of(Settings(trace_endpoint="http://127.0.0.1:9"))
    assert away is not None
    away.begin({"method": "GET", "path": "/"}, {}).end()
    started = time.monotonic()
    away.close()
    assert time.monotonic() - started < 5  # the SDK itself would try for ten seconds


EXPORTER = "opentelemetry.exporter.otlp.proto.http.trace_exporter"


def test_without_the_setting_nothing_is_asked_of_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("opentelemetry.sdk.trace", EXPORTER):
        monkeypatch.setitem(sys.modules, name, None)
    assert Traces.of(Settings()) is None


def test_without_the_extra_the_setting_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, EXPORTER, None)
    with pytest.raises(SettingsError, match=r"IMAGO_TRACE_ENDPOINT .* pip install 'imago\[otel\]'"):
        Traces.of(Settings(trace_endpoint="http://127.0.0.1:4318"))


def test_a_collector_that_does_not_answer_is_told_of_once_a_minute(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = logging.getLogger(trace_exporter.__name__)
    monkeypatch.setattr(logger, "filters", [])
    traces = Traces.of(Settings.load(trace_endpoint="http://127.0.0.1:9"))
    assert traces is not None
    for attempt in range(3):
        logger.warning("Transient error, attempt %d", attempt)
        logger.error("Failed to export")
    traces.close()
    said = [record.getMessage() for record in caplog.records if record.name == logger.name]
    assert said == ["Transient error, attempt 0", "Failed to export"]
