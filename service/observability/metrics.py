"""The metrics of the server, in a registry of its own. No label holds a value chosen by a caller: routes are templates, or "other"."""

from collections.abc import Iterable, Mapping
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

Stage = Literal["decode", "queue", "compute"]
Rejection = Literal["queue_full", "deadline", "client_left", "draining", "not_ready", "too_large", "unauthorized"]

_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_BATCH = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class Metrics:
    """All metrics of one server. Each may be used from any thread."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "imago_requests",
            "Requests answered; status 499 stands for callers who left",
            ("route", "method", "status"),
            registry=registry,
        )
        self.request_seconds = Histogram(
            "imago_request_seconds",
            "Seconds from a request's head to the end of its answer",
            ("route",),
            buckets=_SECONDS,
            registry=registry,
        )
        self.stage_seconds = Histogram(
            "imago_stage_seconds",
            "Seconds of each image in a stage: decode, queue, compute",
            ("stage",),
            buckets=_SECONDS,
            registry=registry,
        )
        self.batch_size = Histogram(
            "imago_batch_size", "Images per forward pass", ("backbone",), buckets=_BATCH, registry=registry
        )
        self.waiting_images = Gauge(
            "imago_waiting_images", "Images admitted and not yet answered", ("backbone",), registry=registry
        )
        self.rejected = Counter(
            "imago_rejected", "Requests that got no answer, by reason", ("reason",), registry=registry
        )
        self.images = Counter(
            "imago_images", "Images by outcome: ok, or an error's code", ("outcome",), registry=registry
        )
        self.model_info = Gauge(
            "imago_model_info", "Served model versions, always 1", ("model", "version", "backbone"), registry=registry
        )
        self.swap_seconds = Histogram(
            "imago_swap_seconds",
            "Seconds from a sync to the new models serving",
            buckets=(*_SECONDS, 60.0, 120.0),
            registry=registry,
        )
        self.ready = Gauge(
            "imago_ready", "1 while the default model is warm and the server takes work", registry=registry
        )
        self.jobs = Gauge("imago_jobs", "Fine-tuning jobs in the database", ("status",), registry=registry)
        self.background_errors = Counter(
            "imago_background_errors", "Errors logged that are no request's: models, jobs, devices", registry=registry
        )
        self.device_memory_used = Gauge(
            "imago_device_memory_used_bytes", "Memory in use on a GPU, by all processes", ("device",), registry=registry
        )
        self.device_memory_total = Gauge(
            "imago_device_memory_total_bytes", "Memory of a GPU", ("device",), registry=registry
        )
        self._answered: dict[tuple[str, str, int], tuple[Counter, Histogram]] = {}
        ProcessCollector(namespace="imago", registry=registry)

    def request(self, route: str, method: str, status: int, seconds: float) -> None:
        """Counts a request. `route`: a template such as `/models/{name}`, or "other"."""
        method = method if method in _METHODS else "other"
        key = (route, method, status)
        if key not in self._answered:  # looking a series up by its labels takes longer than counting
            self._answered[key] = (
                self.requests.labels(route, method, str(status)),
                self.request_seconds.labels(route),
            )
        count, duration = self._answered[key]
        count.inc()
        duration.observe(seconds)

    def stage(self, stage: Stage, seconds: float) -> None:
        self.stage_seconds.labels(stage).observe(seconds)

    def batch(self, backbone: str, size: int) -> None:
        self.batch_size.labels(backbone).observe(size)

    def waiting(self, backbone: str) -> Gauge:
        """Returns the gauge of one backbone's queue."""
        return self.waiting_images.labels(backbone)

    def reject(self, reason: Rejection, count: int = 1) -> None:
        self.rejected.labels(reason).inc(count)

    def image(self, outcome: str, count: int = 1) -> None:
        """Counts an image. `outcome`: "ok" or the code of a ModelError, never a value chosen by a caller."""
        self.images.labels(outcome).inc(count)

    def serve(self, served: Iterable[tuple[str, int, str]]) -> None:
        """Sets what is served now, as (model, version, backbone); replaces the previous values."""
        self.model_info.clear()
        for model, version, backbone in served:
            self.model_info.labels(model, str(version), backbone).set(1)

    def count_jobs(self, by_status: Mapping[str, int]) -> None:
        """Sets the number of jobs in each status; none if it is not known."""
        self.jobs.clear()
        for status, count in by_status.items():
            self.jobs.labels(status).set(count)

    def device_memory(self, device: str, used: int, total: int) -> None:
        """Bytes."""
        self.device_memory_used.labels(device).set(used)
        self.device_memory_total.labels(device).set(total)

    def forget(self, backbone: str) -> None:
        """Removes the series of a backbone that has left memory."""
        for metric in (self.waiting_images, self.batch_size):
            metric.remove_by_labels({"backbone": backbone})

    def exposition(self) -> bytes:
        """Returns everything in the Prometheus text format."""
        return generate_latest(self.registry)
