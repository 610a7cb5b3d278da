"""Answers that are the same for everybody are built once for all who wait, and bounded."""

import asyncio
import threading
from dataclasses import replace

import pytest
from support.service_fakes import FakeEngine, FakeRegistry, FakeStore

from service.errors import ValidationFailed
from service.http.schemas import ModelList
from service.inference.registry.loader import ModelStatus
from service.inference.results import DEFAULTS, MAX_MAPS, MAX_PREDICTIONS, PredictOptions, check_size
from service.observability.metrics import Metrics
from service.routes.shared_answers import Listings, Shared

pytestmark = pytest.mark.anyio


class Work:
    """Counts its runs; each waits until it is let go."""

    def __init__(self) -> None:
        self.runs, self.begun, self.let_go = 0, threading.Semaphore(0), threading.Semaphore(0)

    def __call__(self) -> int:
        self.runs += 1
        number = self.runs
        self.begun.release()
        self.let_go.acquire(timeout=10)
        return number


async def test_callers_share_the_next_run_and_never_one_that_began_before() -> None:
    work = Work()
    shared = Shared(work)
    first = asyncio.create_task(shared.get())
    await asyncio.to_thread(work.begun.acquire)
    later = [asyncio.create_task(shared.get()) for _ in range(50)]
    await asyncio.sleep(0)
    later.pop().cancel()
    work.let_go.release()
    work.let_go.release()
    assert await first == 1
    assert await asyncio.gather(*later) == [2] * 49
    assert work.runs == 2


class ManyModels(FakeRegistry):
    def models(self) -> list[ModelStatus]:
        return [ModelStatus(name=name, default=False, state="ready") for name in "abcde"]


@pytest.mark.parametrize(
    ("after", "limit", "names", "more"),
    [
        ("", None, "abcde", False),
        ("", 2, "ab", True),
        ("b", 3, "cde", False),
        ("bb", 1, "c", True),
        ("e", 1, "", False),
    ],
)
async def test_pages_of_models(after: str, limit: int | None, names: str, more: bool) -> None:
    engine = FakeEngine(FakeStore())
    engine.registry = ManyModels(engine.settings, engine.store, engine.metrics, engine.batcher)
    listings = Listings(engine, Metrics())
    page = await listings.models(after, limit)
    found = ModelList.model_validate_json(page)
    assert ([model.name for model in found.models], found.has_more) == (list(names), more)


EXDEFAULTSED = PredictOptions(explain="overlay")


@pytest.mark.abuse("A801")
@pytest.mark.parametrize(
    ("images", "classes", "k", "options", "allowed"),
    [
        pytest.param(32, [1000], 1000, DEFAULTS, True, id="32 images, all of 1,000 classes"),
        pytest.param(32, [1000] * 6, 1000, DEFAULTS, False, id="6 models"),
        pytest.param(32, [3] * 16, 9_999_999, DEFAULTS, True, id="few classes, whatever is asked"),
        pytest.param(32, [1000] * 6, 5, PredictOptions(alpha=0.1), False, id="conformal sets"),
        pytest.param(32, [1000], 10, EXDEFAULTSED, True, id="10 heat maps each"),
        pytest.param(32, [1000] * 16, 5, EXDEFAULTSED, False, id="heat maps of 16 models"),
        pytest.param(1, [MAX_PREDICTIONS], MAX_PREDICTIONS, DEFAULTS, True, id="the most"),
        pytest.param(1, [MAX_PREDICTIONS + 1], MAX_PREDICTIONS + 1, DEFAULTS, False, id="one more"),
        pytest.param(MAX_MAPS + 1, [1], 1, EXDEFAULTSED, False, id="one map more"),
    ],
)
def test_large_answers_are_bounded(
    images: int, classes: list[int], k: int, options: PredictOptions, allowed: bool
) -> None:
    options = replace(options, top_k=k)
    if allowed:
        check_size(images, classes, options)
    else:
        with pytest.raises(ValidationFailed, match="at most"):
            check_size(images, classes, options)
