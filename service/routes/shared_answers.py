"""Answers that are the same for everybody, and take a while where there are many models: built in a thread, once for all who wait."""

import asyncio
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from service.http.middleware import encode, encode_each
from service.inference.engine import Engine
from service.observability.metrics import Metrics
from service.oip import metadata

T = TypeVar("T")


class Shared(Generic[T]):
    """The result of a piece of work, for many callers: one run at a time, and each caller gets one that began after it asked."""

    def __init__(self, work: Callable[[], T]) -> None:
        self._work = work
        self._next: asyncio.Task[T] | None = None
        self._running = asyncio.Lock()

    async def get(self) -> T:
        if self._next is None:
            self._next = asyncio.create_task(self._run())
        return await asyncio.shield(self._next)  # a caller that leaves does not take it from the others

    async def _run(self) -> T:
        async with self._running:
            self._next = None
            return await asyncio.to_thread(self._work)


class Listings:
    """`GET /models`, `GET /v2/models/stats`, `GET /metrics`."""

    def __init__(self, engine: Engine, metrics: Metrics) -> None:
        self._engine = engine
        self._models = Shared(self._encoded_models)
        self.statistics = Shared(self._encoded_statistics)
        self.metrics = Shared(metrics.exposition)

    async def models(self, after: str = "", limit: int | None = None) -> bytes:
        """JSON of a ModelList: the models with a name after `after`, at most `limit` of them."""
        models = await self._models.get()
        start = bisect_right(models, after, key=lambda model: model[0])
        page = models[start:][:limit]
        about = {
            "devices": self._engine.device_states(),
            "device_note": self._engine.device_note,
            "has_more": start + len(page) < len(models),
        }
        return b'{"models":[' + b",".join(body for _, body in page) + b"]," + encode(about)[1:]

    def _encoded_models(self) -> Sequence[tuple[str, bytes]]:
        """Name and JSON of each, by name. A call of an encoder holds the GIL; there is one for each model."""
        return [(model.name, model.model_dump_json().encode()) for model in self._engine.registry.models()]

    def _encoded_statistics(self) -> bytes:
        statistics = map(metadata.statistics_of, self._engine.registry.served.values())
        return b'{"model_stats":' + encode_each(statistics) + b"}"
