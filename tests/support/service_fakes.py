"""An engine and a store that answer at once, and a client that talks to the real application around them."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from starlette.types import Receive, Scope, Send
from torch import Tensor

from models.errors import (
    EmptyImage,
    InvalidImage,
    ModelError,
    ModelNotFound,
    NameConflict,
    UnsupportedImage,
    WeightsError,
)
from models.store.store import ModelStore, Serving
from service.app import create_app
from service.http.middleware import Traffic
from service.inference.batcher import Batcher, DeviceState
from service.inference.engine import Engine
from service.inference.registry.loader import ModelStatus, Served
from service.inference.registry.registry import Registry
from service.inference.results import DEFAULTS, ModelResults, Prediction, PredictOptions, Timings
from service.observability.metrics import Metrics
from service.settings import Settings

ADMIN_KEY = "a" * 32
API_KEY = "u" * 32
ADMIN = {"Authorization": f"Bearer {ADMIN_KEY}"}
GOOD, BAD, TEXT = b"good image", b"bad image", b"no image"
CLASSES = ["cat", "dog", "owl"]
TIMINGS = Timings(decode=1.5, queue=0.25, compute=3.0)

FAILURES: dict[bytes, ModelError] = {
    b"": EmptyImage("the file is empty"),
    BAD: InvalidImage("the JPEG is truncated"),
    TEXT: UnsupportedImage("send JPEG, PNG, WebP, GIF or BMP"),
}


class FakeStore(ModelStore):
    """Two versions of `pets`, of which the first serves."""

    def __init__(self) -> None:
        super().__init__(Path("no-such-folder"))
        self.version, self.calls = 1, list[tuple[Any, ...]]()

    def activate(self, name: str, version: int) -> Serving:
        if version > 2:
            raise ModelNotFound(f"no version {version}")
        self.version = version
        return self.serving()

    def rollback(self, name: str) -> Serving:
        raise NameConflict("there is no previous version")

    def serving(self) -> Serving:
        return Serving(default="pets", models={"pets": self.version}, previous={})

    def check_writable(self) -> None: ...

    def remove(self, name: str, version: int | None = None) -> None:
        self.calls.append(("remove", name, version))


class FakeRegistry(Registry):
    """Serves `pets` in the version of the store, but for those that are `broken`."""

    def __init__(self, settings: Settings, store: ModelStore, metrics: Metrics, batcher: Batcher) -> None:
        super().__init__(settings, store, metrics, batcher)
        self.version, self.broken = 1, set[int]()

    async def check_removable(self, name: str) -> None:
        """No setting names a model."""

    def is_served(self, name: str | None) -> bool:
        return name == "pets"

    def bind(self, name: str | None, version: int | None = None) -> Served:
        raise ModelNotFound("no model of that name is served")

    async def sync(self) -> None:
        version = self.store.serving().models.get("pets", self.version)
        if version not in self.broken:
            self.version = version

    async def activate(self, name: str, version: int) -> ModelStatus:
        if version in self.broken:
            raise WeightsError(f"version {version} could not be loaded")
        self.version = self.store.activate(name, version).models[name]
        return self.model(name)

    async def rollback(self, name: str) -> ModelStatus:
        self.version = self.store.rollback(name).models[name]
        return self.model(name)

    def models(self) -> list[ModelStatus]:
        return [self.model("pets")]

    def model(self, name: str) -> ModelStatus:
        if name != "pets":
            raise ModelNotFound("no model of that name is served")
        return ModelStatus(name="pets", default=True, state="ready", version=self.version, classes=CLASSES)


class FakeEngine(Engine):
    """Answers by the bytes of the image; `gate`, when set to an unset event, holds the answers back."""

    registry: FakeRegistry

    def __init__(self, store: ModelStore) -> None:
        settings = Settings(data=Path("no-such-folder"), device="cpu")
        super().__init__(settings, store, Metrics())
        self.registry = FakeRegistry(settings, store, self.metrics, self.batcher)
        self.closed = self.cancelled = False
        self.is_ready = self.is_live = True
        self.asked: dict[str, Any] = {}
        self.options = DEFAULTS
        self.gate: asyncio.Event | None = None
        self.error: Exception | None = None
        self.waiting = asyncio.Event()
        self.idle = asyncio.Event()
        self.idle.set()
        self.under_way = 0

    def start(self) -> None: ...

    def close(self) -> None:
        self.closed = True

    async def wait_ready(self, timeout_s: float | None = None) -> None: ...

    @property
    def ready(self) -> bool:
        return self.is_ready and not self.draining

    @property
    def live(self) -> bool:
        return self.is_live

    def device_states(self) -> dict[str, DeviceState]:
        return {"cpu": "works" if self.is_live else "lost"}

    def not_ready_reason(self) -> str:
        return "the default model is still loading"

    async def drain(self, grace_s: float) -> bool:
        self.draining = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                await self.idle.wait()
        return self.under_way == 0

    async def predict(
        self, files: Sequence[bytes], models: Sequence[str] = (), options: PredictOptions = DEFAULTS
    ) -> list[ModelResults[Prediction]]:
        k, self.options = options.top_k, options
        self.asked = {"files": list(files), "models": list(models), "k": k, "timeout_ms": options.timeout_ms}
        await self._work()
        best = Prediction(CLASSES[:k], [0, 1, 2][:k], [0.5, 0.25, 0.25][:k])
        results = [FAILURES.get(data, best) for data in files]
        return [ModelResults(name, self.registry.version, results, TIMINGS) for name in models or ["pets"]]

    async def embed(
        self, files: Sequence[bytes], model: str | None = None, options: PredictOptions = DEFAULTS
    ) -> ModelResults[Tensor]:
        self.options, self.asked = options, {"model": model, "timeout_ms": options.timeout_ms}
        await self._work()
        return ModelResults("pets", 1, [FAILURES.get(data, torch.tensor([0.5, 2.0])) for data in files], TIMINGS)

    async def _work(self) -> None:
        if self.error:
            raise self.error
        self.under_way += 1
        self.idle.clear()
        self.waiting.set()
        try:
            if self.gate:
                await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled = True
            raise
        finally:
            self.under_way -= 1
            if not self.under_way:
                self.idle.set()


class Service:
    """The application around the fakes; `http` is a client of it, with no socket between."""

    def __init__(self, data: Path, **settings: Any) -> None:
        self.settings = Settings(**{"data": data, "admin_key": ADMIN_KEY, "allowed_hosts": "*", **settings})
        self.store, self.metrics, self.traffic = FakeStore(), Metrics(), Traffic()
        self.engine = FakeEngine(self.store)
        self.app = create_app(self.settings, self.engine, self.store, self.metrics, traffic=self.traffic)
        self.state: dict[str, Any] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI, with the lifespan's state in the scope, as uvicorn puts it there."""
        scope["state"] = dict(self.state)
        await self.app(scope, receive, send)

    def count(self, metric: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(metric, labels) or 0.0


@asynccontextmanager
async def client_of(service: Service) -> AsyncIterator[httpx.AsyncClient]:
    async with service.app.router.lifespan_context(service.app) as state:
        service.state = dict(state or {})
        transport = httpx.ASGITransport(service)
        async with httpx.AsyncClient(transport=transport, base_url="http://imago") as client:
            yield client


@pytest.fixture
def service(tmp_path: Path) -> Service:
    return Service(tmp_path)


@pytest.fixture
async def http(service: Service) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(service) as client:
        yield client
