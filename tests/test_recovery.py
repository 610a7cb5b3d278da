"""The real trainer, killed with -9 in the middle of its epochs, and then the server too: the weights are those of a run left alone."""

import asyncio
import json
import multiprocessing
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.service_fakes import FakeEngine, FakeStore
from support.training_data import coloured, folder

from models.training.job.request import FinetuneRequest
from service.jobs import Job, Jobs
from service.jobs.events import EVENTS
from service.settings import Settings

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(900)]
PATIENCE_S = 400  # for what takes ten seconds on a machine that has nothing else to do
EPOCHS = 40


@asynccontextmanager
async def jobs_in(root: Path) -> AsyncIterator[Jobs]:
    store = FakeStore()
    settings = Settings(data=root / "data", datasets=root / "datasets", weights=root / "weights", trainer_threads=1)
    jobs = Jobs(settings, FakeEngine(store), store)
    jobs.start()
    yield jobs
    await jobs.close()


def small(name: str) -> FinetuneRequest:
    hyperparameters = {"epochs": EPOCHS, "batch_size": 16}
    stopping = {"criterion": "none"}
    return FinetuneRequest.model_validate(
        {"dataset": "squares", "name": name, "base": "lenet5", "mode": "scratch", "deploy": "never"}
        | {"hyperparameters": hyperparameters, "early_stopping": stopping}
    )


def serve(root: Path) -> None:
    async def main() -> None:
        async with jobs_in(root) as jobs:
            for name in ("alone", "disturbed"):
                await jobs.create(small(name))
            await asyncio.sleep(2 * PATIENCE_S)

    asyncio.run(main())


@contextmanager
def server(root: Path) -> Iterator[psutil.Process]:
    """A process with the jobs `alone` and `disturbed`; it ends by SIGKILL."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["service.app"])
    process = context.Process(target=serve, args=(root,))
    process.start()
    try:
        yield psutil.Process(process.pid)
    finally:
        process.kill()
        process.join()


def events_of(root: Path, name: str) -> list[dict[str, Any]]:
    """Those of the job that makes this model."""
    for order in root.glob("data/jobs/*/job.json"):
        if json.loads(order.read_bytes())["request"]["name"] == name:
            return [json.loads(line) for line in (order.parent / EVENTS).read_bytes().splitlines()]
    return []


def epochs_of(root: Path, attempt: int) -> list[int]:
    """Those that have ended in this attempt at `disturbed`, or after it."""
    events = events_of(root, "disturbed")
    begun = [number for number, event in enumerate(events) if event.get("message") == f"attempt {attempt}"]
    return [event["epoch"] for event in events[begun[0] :] if "epoch" in event] if begun else []


def wait_for_epoch(root: Path, attempt: int, epoch: int) -> None:
    """Until `disturbed` has ended this epoch in this attempt; fails if it is through."""
    ends = time.monotonic() + PATIENCE_S
    while time.monotonic() < ends:
        epochs = epochs_of(root, attempt)
        assert EPOCHS not in epochs, "it was not disturbed"
        if epochs and max(epochs) >= epoch:
            return
        time.sleep(0.01)
    raise AssertionError(f"attempt {attempt} did not come so far: {events_of(root, 'disturbed')[-3:]}")


def trainer_of(server: psutil.Process) -> psutil.Process:
    """The one at work; the spare one began later."""
    trainers = [child for child in server.children() if "models.training" in child.cmdline()]
    return min(trainers, key=lambda trainer: trainer.create_time())


async def ended(jobs: Jobs, name: str) -> Job:
    async with asyncio.timeout(PATIENCE_S):
        while True:
            found, _ = await jobs.page(None, 10)
            (job,) = (job for job in found if job.request["name"] == name)
            if job.terminal:
                return job
            await asyncio.sleep(0.1)


def weights_of(root: Path, name: str) -> tuple[str, str]:
    config = json.loads((root / "weights" / "models" / name / "1" / "config.json").read_bytes())
    return config["head_sha256"], config["backbones"][0]["sha256"]


async def test_a_run_whose_trainer_and_server_are_killed_comes_to_the_same_weights(tmp_path: Path) -> None:
    folder(tmp_path / "datasets" / "squares", coloured(40, side=32))
    with server(tmp_path) as running:
        wait_for_epoch(tmp_path, attempt=1, epoch=5)
        trainer_of(running).kill()
        wait_for_epoch(tmp_path, attempt=2, epoch=20)
    async with jobs_in(tmp_path) as jobs:
        alone, disturbed = await ended(jobs, "alone"), await ended(jobs, "disturbed")
    assert (alone.status, alone.attempt, disturbed.status, disturbed.attempt) == ("succeeded", 1, "succeeded", 3)
    assert (epochs_of(tmp_path, 2)[0] > 5, epochs_of(tmp_path, 3)[0] > 20) == (True, True)  # from its checkpoints
    assert weights_of(tmp_path, "disturbed") == weights_of(tmp_path, "alone")
