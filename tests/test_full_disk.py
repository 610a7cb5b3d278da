"""A real disk that is full: what serves goes on, what needs space says so, and nothing that was accepted is lost."""

import asyncio
import io
import shutil
import threading
from pathlib import Path

import httpx
import pytest
from PIL import Image
from support.live_server import live_server
from support.live_server import weights as weights
from support.service_fakes import ADMIN_KEY
from support.small_disk import disk as disk
from support.small_disk import full
from test_jobs import ended, jobs_in, waiting, wanting

from service import datasets
from service.errors import TrainerUnavailable

ADMIN = {"Authorization": f"Bearer {ADMIN_KEY}"}


def png(side: int) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((side, side), 60).save(buffer, "PNG")
    return buffer.getvalue()


class Caller(threading.Thread):
    """Classifies large images, one after the other, and keeps what it hears."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self.url, self.heard, self.over = url, list[int](), threading.Event()

    def run(self) -> None:
        large = png(1500)
        while not self.over.is_set():
            answer = httpx.post(f"{self.url}/predict", files=[("file", large), ("file", large)], timeout=60)
            self.heard.append(answer.status_code)


@pytest.mark.abuse("J10")
def test_a_full_disk_stops_nothing_that_needs_none(weights: Path, tmp_path: Path, disk: Path) -> None:
    shutil.copytree(weights, disk / "weights")
    (disk / "datasets" / "squares").mkdir(parents=True)
    flags = ("--datasets", str(disk / "datasets"))
    env = {"IMAGO_ADMIN_KEY": ADMIN_KEY, "IMAGO_DATA": str(disk / "data")}
    with (
        live_server(disk / "weights", disk, *flags, env=env) as server,
        httpx.Client(base_url=server.url, headers=ADMIN, timeout=60) as admin,
    ):
        caller = Caller(server.url)
        caller.start()
        assert admin.get("/finetune").status_code == 200
        with full(disk):
            refused = [
                admin.post("/finetune", json={"dataset": "squares", "name": "squares"}),
                admin.post("/datasets", params={"name": "more"}, content=bytes(1000)),
                admin.post("/models/insects/activate", json={"version": 1}),
            ]
        mended = admin.post("/models/insects/activate", json={"version": 1})
        caller.over.set()
        caller.join()
    codes = [(answer.status_code, answer.json()["error"]["code"]) for answer in refused]
    assert codes == [(507, "insufficient_storage")] * 3
    assert (mended.status_code, set(caller.heard)) == (200, {200})
    assert not list(disk.rglob(".tmp-*"))


@pytest.mark.abuse("J10")
async def test_a_job_outlives_a_disk_that_was_full(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "_NEEDED_BYTES", 0)
    async with jobs_in(disk) as jobs:
        job = await waiting(jobs)
        with full(disk):
            with pytest.raises(TrainerUnavailable, match="full"):
                await jobs.stop(job.id)
            with pytest.raises(TrainerUnavailable, match="full"):
                await jobs.create(wanting("succeed"))
            await asyncio.sleep(1.0)  # the worker has looked at the table meanwhile
        await jobs.stop(job.id)
        assert (await ended(jobs, job.id)).status == "succeeded"
