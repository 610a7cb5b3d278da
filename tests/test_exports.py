"""`GET /models/{name}/versions/{version}/export`, and the process behind it."""

import asyncio
import io
import os
import subprocess
import sys
import zipfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from support import lively
from support.service_fakes import ADMIN, Service, client_of

from models.classifier import ModelConfig
from models.errors import ExportError, WeightsError
from models.store.export import __main__ as process
from models.store.store import ModelStore
from service.errors import ExportBusy, InsufficientStorage
from service.jobs.exports import Exports
from service.settings import Settings

pytestmark = pytest.mark.anyio

URL = "/models/mine/versions/1/export"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    lively.publish(ModelStore(folder), "mine", "lenet5", lineage={"licence": "CC-BY-NC-4.0"})
    return folder


@pytest.fixture
def config(weights: Path) -> ModelConfig:
    return ModelStore(weights).config("mine")


@pytest.fixture
async def http(tmp_path: Path, weights: Path) -> AsyncIterator[httpx.AsyncClient]:
    service = Service(tmp_path, weights=weights)
    ModelStore.__init__(service.store, weights)
    async with client_of(service) as client:
        yield client


def exports(tmp_path: Path, weights: Path, program: str) -> Exports:
    """With a program of one line instead of the real process."""
    settings = Settings(data=tmp_path / "data", weights=weights)
    return Exports(settings, (sys.executable, "-c", program))


def leftovers(tmp_path: Path) -> list[Path]:
    return [path for path in tmp_path.rglob("exports/**/*") if path.is_file()]


def contents(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


async def test_a_version_is_exported(http: httpx.AsyncClient, tmp_path: Path, weights: Path) -> None:
    before = contents(weights)
    answer = await http.get(URL, params={"format": "store"}, headers=ADMIN)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/octet-stream"
    assert answer.headers["content-disposition"] == 'attachment; filename="mine-1-store.zip"'
    assert int(answer.headers["content-length"]) == len(answer.content)
    assert "CC-BY-NC-4.0" in answer.headers["x-licence-warning"]
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        assert "imago.json" in archive.namelist()
    assert leftovers(tmp_path) == []
    assert contents(weights) == before, "the store is only read"


@pytest.mark.soak
async def test_a_version_is_exported_as_onnx(http: httpx.AsyncClient) -> None:
    answer = await http.get(URL, headers=ADMIN)
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        assert archive.namelist() == ["mine-1.onnx", "predict.py"]


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        pytest.param("/models/none/versions/1/export", 404, "model_not_found", id="no model"),
        pytest.param("/models/mine/versions/9/export", 404, "model_not_found", id="no version"),
        pytest.param("/models/NOT%20ONE/versions/1/export", 404, "model_not_found", id="no name"),
        pytest.param(f"{URL}?format=tflite", 422, "validation_error", id="no format"),
    ],
)
async def test_what_cannot_be_exported(http: httpx.AsyncClient, path: str, status: int, code: str) -> None:
    answer = await http.get(path, headers=ADMIN)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)


async def test_it_wants_the_admin_key(http: httpx.AsyncClient) -> None:
    assert (await http.get(URL)).status_code == 401


async def test_there_is_one_export_at_a_time(tmp_path: Path, weights: Path, config: ModelConfig) -> None:
    one = exports(tmp_path, weights, "import time; time.sleep(60)")
    first = asyncio.create_task(one.make(config, "store"))
    while one._process is None:  # noqa: ASYNC110  (within a second)
        await asyncio.sleep(0.01)
    process = one._process
    with pytest.raises(ExportBusy) as caught:
        await one.make(config, "store")
    assert caught.value.retry_after_s
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    assert await process.wait() < 0
    assert list((tmp_path / "data" / "exports").iterdir()) == []
    with pytest.raises(asyncio.TimeoutError):  # there is room again
        await asyncio.wait_for(one.make(config, "store"), 0.2)


@pytest.mark.parametrize(
    ("program", "error", "message"),
    [
        pytest.param("raise SystemExit('first\\nthe reason')", ExportError, "exit code 1: the reason", id="crash"),
        pytest.param("import os; os.kill(os.getpid(), 9)", ExportError, "SIGKILL: memory ran out", id="killed"),
        pytest.param(
            'print(\'{"code": "invalid_weights", "message": "damaged"}\')', WeightsError, "^damaged$", id="refused"
        ),
        pytest.param('print(\'{"disk": "No space left"}\')', InsufficientStorage, "No space left", id="disk"),
    ],
)
async def test_how_an_export_may_fail(
    tmp_path: Path, weights: Path, config: ModelConfig, program: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        await exports(tmp_path, weights, program).make(config, "store")
    assert list((tmp_path / "data" / "exports").iterdir()) == []


async def test_what_a_killed_server_left_is_removed(tmp_path: Path, weights: Path) -> None:
    left = tmp_path / "data" / "exports" / "x" / "mine-1.zip"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"x")
    await exports(tmp_path, weights, "").start()
    assert not left.exists()


def test_the_process_ends_with_its_stdin(tmp_path: Path, weights: Path) -> None:
    out = tmp_path / "x.zip"
    command = [sys.executable, "-m", "models.store.export", str(weights), "mine", "1", "onnx", str(out)]
    process: Any = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ)
    process.stdin.close()
    assert process.wait(timeout=60) == 1
    process.stdout.close()
    assert not out.exists()


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_memory_that_runs_out_is_one_line(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_arguments: Any) -> None:
        raise error

    monkeypatch.setattr(process, "bound_memory", lambda weights: None)  # it would bound the tests
    monkeypatch.setattr("models.store.export.files.export", fail)
    report = process.main(str(weights), "mine", "1", "onnx", str(tmp_path / "x.zip"))
    assert report == {"code": "export_failed", "message": "there is not enough memory to export mine@1"}
