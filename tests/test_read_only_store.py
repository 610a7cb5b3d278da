"""A store that cannot be written to serves; what would change it says so at once, and the default model stays what it is."""

import errno
import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.service_fakes import ADMIN, Service, client_of
from support.v2_requests import PICTURES
from test_v2 import CLASSES
from test_v2 import weights as weights

from models.errors import ReadOnlyStore
from models.files import atomic_files
from models.store.store import ModelStore
from service.app import create_app
from service.inference.engine import Engine
from service.inference.registry.served_models import plan_serving
from service.settings import Settings

pytestmark = pytest.mark.anyio


@pytest.fixture
async def http(weights: Path, tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    (tmp_path / "datasets" / "photos").mkdir(parents=True)
    options: dict[str, Any] = {"weights": weights, "datasets": tmp_path / "datasets", "device": "cpu", "threads": 1}
    service = Service(tmp_path / "data", engine="torch", max_batch=8, **options)
    store = ModelStore(weights)
    service.engine = Engine(service.settings, store, service.metrics)  # type: ignore[assignment]
    service.app = create_app(service.settings, service.engine, store, service.metrics, traffic=service.traffic)
    async with client_of(service) as client:
        await service.engine.wait_ready(60)
        client.headers.update(ADMIN)
        yield client


@pytest.fixture
def read_only(weights: Path) -> Iterator[None]:
    """The store, mounted read-only."""
    mount = ["mount", "--bind", str(weights), str(weights)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("root alone may mount a file system, and not in every container")
    subprocess.run(["mount", "-o", "remount,ro,bind", weights], check=True)
    yield
    subprocess.run(["umount", "--lazy", weights], check=True)


CHANGES = [
    ("POST", "/models/tiny/activate", {"version": 2}),
    ("DELETE", "/models/spare", None),
    ("DELETE", "/models/tiny/versions/2", None),
    ("POST", "/v2/repository/models/spare/load", None),
    ("POST", "/v2/repository/models/pair/unload", None),
    ("POST", "/models/pull", {"name": "resnet18"}),
    ("POST", "/finetune", {"dataset": "photos", "name": "photos"}),
]


async def refusals(http: httpx.AsyncClient) -> set[tuple[int, str]]:
    answers = [await http.request(method, path, json=body) for method, path, body in CHANGES]
    found = set()
    for answer in answers:
        error = answer.json()["error"]
        found.add((answer.status_code, error if isinstance(error, str) else error["message"]))
    return found


@pytest.mark.abuse("A1101")
async def test_every_change_of_a_read_only_store_is_507(
    http: httpx.AsyncClient, weights: Path, read_only: None
) -> None:
    [(status, message)] = await refusals(http)
    assert status == 507
    assert message.startswith(f"the model store {weights} cannot be written to (Read-only file system)")
    assert (await http.get("/finetune")).json()["data"] == []
    assert (await http.post("/models/sync")).status_code == 200
    predicted = await http.post("/predict", content=PICTURES[0])
    assert (predicted.status_code, predicted.json()["model"]) == (200, "tiny")


@pytest.mark.abuse("A1101")
@pytest.mark.parametrize("code", [errno.EACCES, errno.EPERM, errno.EROFS])
async def test_a_store_without_permission_is_507(
    http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """Root ignores permissions, so the system's error is made up."""

    def refuse(*args: Any, **options: Any) -> None:
        raise OSError(code, os.strerror(code))

    for function in ("try_write", "replace", "discard", "staging"):
        monkeypatch.setattr(atomic_files, function, refuse)
    [(status, message)] = await refusals(http)
    assert (status, os.strerror(code) in message) == (507, True)


def test_other_errors_of_the_disk_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="full") as raised, atomic_files.writing(tmp_path):
        raise OSError(errno.ENOSPC, "full")
    assert not isinstance(raised.value, ReadOnlyStore)


def test_a_store_that_can_be_written_to_is_left_as_it_is(weights: Path) -> None:
    before = sorted(weights.rglob("*"))
    ModelStore(weights).check_writable()
    assert sorted(weights.rglob("*")) == before


# The default model


@pytest.mark.abuse("A1401")
@pytest.mark.parametrize(
    ("method", "path"),
    [
        pytest.param("POST", "/v2/repository/models/tiny/unload", id="unload"),
        pytest.param("DELETE", "/models/tiny", id="remove"),
    ],
)
async def test_the_default_model_is_not_taken_away(http: httpx.AsyncClient, method: str, path: str) -> None:
    refused = await http.request(method, path)
    predicted = await http.post("/predict", content=PICTURES[0])
    assert (refused.status_code, "imago models default NAME" in refused.text) == (409, True)
    assert (predicted.json()["model"], len(CLASSES)) == ("tiny", 3)


@pytest.mark.abuse("A1401")
@pytest.mark.parametrize("flags", [{"models": ("pair",)}, {"default_model": "pair"}])
@pytest.mark.parametrize(
    ("method", "path"), [("POST", "/v2/repository/models/pair/unload"), ("DELETE", "/models/pair")]
)
async def test_a_model_that_a_setting_names_is_not_taken_away(
    weights: Path, tmp_path: Path, flags: dict[str, Any], method: str, path: str
) -> None:
    """`pair` is not the store's default; without it the next start would not become ready."""
    own = tmp_path / "weights"
    shutil.copytree(weights, own)
    service = Service(tmp_path, weights=own, device="cpu", engine="torch", threads=1, **flags)
    store = ModelStore(own)
    service.engine = Engine(service.settings, store, service.metrics)  # type: ignore[assignment]
    service.app = create_app(service.settings, service.engine, store, service.metrics, traffic=service.traffic)
    async with client_of(service) as http:
        await service.engine.registry.wait_loaded()
        refused = await http.request(method, path, headers=ADMIN)
    assert (refused.status_code, "the setting" in refused.text) == (409, True)
    assert store.versions("pair") == [1]


@pytest.mark.abuse("A1401")
async def test_no_other_model_answers_where_there_is_no_default(weights: Path, tmp_path: Path) -> None:
    """As in a `serving.json` that was edited."""
    record = weights / "serving.json"
    before = record.read_bytes()
    record.write_text('{"models": {"tiny": 1, "pair": 1}}')
    try:
        service = Service(tmp_path, weights=weights, device="cpu", engine="torch", threads=1)
        store = ModelStore(weights)
        assert plan_serving(service.settings, store).default is None
        assert plan_serving(Settings(weights=weights, models=("pair", "tiny")), store).default == "pair"
        service.engine = Engine(service.settings, store, service.metrics)  # type: ignore[assignment]
        service.app = create_app(service.settings, service.engine, store, service.metrics, traffic=service.traffic)
        async with client_of(service) as http:
            await service.engine.registry.wait_loaded()
            refused = await http.post("/predict", content=PICTURES[0])
            named = await http.post("/predict?model=pair", content=PICTURES[0])
    finally:
        record.write_bytes(before)
    assert (refused.status_code, named.status_code) == (503, 200)
    assert "no default model is set: `imago models default NAME`" in refused.json()["error"]["message"]
