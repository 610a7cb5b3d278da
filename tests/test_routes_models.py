"""`/models`: what serves, and the admin's routes."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from support.service_fakes import ADMIN, CLASSES, Service
from support.service_fakes import http as http
from support.service_fakes import service as service

from models import architectures
from models.classifier import Head
from models.errors import DownloadError
from models.progress import DownloadProgress
from models.store.store import ModelStore
from service.routes.models import list_versions

pytestmark = pytest.mark.anyio


async def test_list(http: httpx.AsyncClient) -> None:
    answer = await http.get("/models")
    assert [model["name"] for model in answer.json()["models"]] == ["pets"]


async def test_list_says_what_it_computes_on_and_why_not_on_a_gpu(http: httpx.AsyncClient, service: Service) -> None:
    assert {key: (await http.get("/models")).json()[key] for key in ("devices", "device_note")} == {
        "devices": {"cpu": "works"},
        "device_note": None,
    }
    service.engine.device_note = "running on the CPU: there is no NVIDIA driver; install one"
    assert "no NVIDIA driver" in (await http.get("/models")).json()["device_note"]


async def test_show(http: httpx.AsyncClient) -> None:
    body = (await http.get("/models/pets")).json()
    assert (body["version"], body["classes"], body["state"]) == (1, CLASSES, "ready")


@pytest.mark.abuse("H15")
@pytest.mark.parametrize("name", ["none", "%2e%2e%2fx", "ü", "n" * 10_000])
async def test_show_what_is_not_there(http: httpx.AsyncClient, name: str) -> None:
    answer = await http.get(f"/models/{name}")
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] in ("model_not_found", "not_found")


async def test_activate(http: httpx.AsyncClient) -> None:
    answer = await http.post("/models/pets/activate", json={"version": 2}, headers=ADMIN)
    assert (answer.status_code, answer.json()["version"]) == (200, 2)


async def test_activate_a_version_that_is_not_there(http: httpx.AsyncClient) -> None:
    answer = await http.post("/models/pets/activate", json={"version": 9}, headers=ADMIN)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


async def test_a_version_that_does_not_load_is_not_activated(http: httpx.AsyncClient, service: Service) -> None:
    service.engine.registry.broken = {2}
    answer = await http.post("/models/pets/activate", json={"version": 2}, headers=ADMIN)
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "invalid_weights")
    assert (service.engine.registry.version, service.store.version) == (1, 1)


@pytest.mark.abuse("H15")
@pytest.mark.parametrize(
    ("method", "path"),
    [
        pytest.param("GET", "/models/NOT%20A%20NAME", id="show"),
        pytest.param("POST", "/models/NOT%20A%20NAME/activate", id="activate"),
        pytest.param("POST", "/models/NOT%20A%20NAME/rollback", id="rollback"),
        pytest.param("DELETE", "/models/NOT%20A%20NAME", id="remove"),
        pytest.param("DELETE", "/models/NOT%20A%20NAME/versions/1", id="remove a version"),
    ],
)
async def test_a_name_that_no_model_can_have_is_not_there(http: httpx.AsyncClient, method: str, path: str) -> None:
    body = {"version": 1} if path.endswith("activate") else None
    answer = await http.request(method, path, json=body, headers=ADMIN)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        pytest.param('{"version": "2"}', 422, "validation_error", "version", id="text"),
        pytest.param('{"version": 0}', 422, "validation_error", "version", id="zero"),
        pytest.param('{"version": 2, "force": true}', 422, "unknown_field", "force", id="unknown field"),
        pytest.param("{}", 422, "validation_error", "version", id="missing"),
        pytest.param("{version", 400, "bad_request", None, id="no JSON"),
    ],
)
async def test_activate_refuses_a_wrong_body(
    http: httpx.AsyncClient, body: str, status: int, code: str, param: str | None
) -> None:
    headers = ADMIN | {"Content-Type": "application/json"}
    answer = await http.post("/models/pets/activate", content=body, headers=headers)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (status, code, param)


async def test_roll_back_with_nothing_before(http: httpx.AsyncClient) -> None:
    answer = await http.post("/models/pets/rollback", headers=ADMIN)
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "name_conflict")


async def test_sync(http: httpx.AsyncClient, service: Service) -> None:
    service.store.version = 2
    answer = await http.post("/models/sync", headers=ADMIN)
    assert answer.json()["models"][0]["version"] == 2


async def test_remove(http: httpx.AsyncClient, service: Service) -> None:
    answers = [await http.delete(path, headers=ADMIN) for path in ("/models/pets", "/models/pets/versions/2")]
    assert [answer.status_code for answer in answers] == [204, 204]
    assert service.store.calls == [("remove", "pets", None), ("remove", "pets", 2)]


# Versions


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    """Two versions of `insects`, of which the second serves."""
    store, network = ModelStore(tmp_path / "weights"), architectures.create("lenet5", num_classes=3, channels=3)
    ref = store.put_backbone(network.name, network.backbone, network.preprocessing)
    for version in (1, 2):
        lineage = {"command": f"run {version}"}
        store.publish("insects", [ref], Head.of(network.layer), CLASSES, {"val": {"accuracy": version / 4}}, lineage)
        store.activate("insects", version)
    return store


async def test_versions_and_their_figures(store: ModelStore) -> None:
    latest, first = (await list_versions("insects", store)).versions
    assert (latest.version, latest.state, latest.classes, latest.command) == (2, "serving", 3, "run 2")
    assert (first.version, first.state, first.metrics) == (1, "previous", {"val": {"accuracy": 0.25}})


async def test_a_damaged_version_says_what_ails_it(store: ModelStore) -> None:
    (store.models / "insects" / "1" / "config.json").write_text("{")
    latest, first = (await list_versions("insects", store)).versions
    assert (latest.error, first.state, first.created_at) == (None, "previous", None)
    assert first.error is not None
    assert "config.json" in first.error


async def test_versions_of_what_the_store_has_not(http: httpx.AsyncClient, service: Service, tmp_path: Path) -> None:
    ModelStore.__init__(service.store, tmp_path / "empty")
    answer = await http.get("/models/none/versions", headers=ADMIN)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


# Pull


@pytest.fixture
def pulls(service: Service, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names that were pulled; `broken` cannot be."""
    names: list[str] = []

    async def pull(name: str, progress: DownloadProgress, as_name: str | None) -> Any:
        names.append(name)
        progress(1, 4)
        if name == "broken":
            raise DownloadError("404 Not Found")
        licence = "cc-by-nc-4.0" if name.startswith("timm/") else "MIT"
        return SimpleNamespace(name=as_name or name, version=1, lineage={"licence": licence})

    monkeypatch.setattr(service.engine.registry, "pull", pull)
    monkeypatch.setattr("models.store.pull.check", lambda name: None)
    return names


@pytest.mark.parametrize(
    ("name", "last"),
    [
        pytest.param("good", ["event: end", {"model": "good", "version": 1}], id="pulled"),
        pytest.param("broken", ["event: error", {"code": "download_failed", "message": "404 Not Found"}], id="failed"),
    ],
)
async def test_pull_tells_how_far_it_is(http: httpx.AsyncClient, pulls: list[str], name: str, last: list[Any]) -> None:
    answer = await http.post("/models/pull", json={"name": name}, headers=ADMIN)
    first, *_, end = answer.text.strip().split("\n\n")
    assert json.loads(first.removeprefix("data: ")) == {"bytes": 1, "total": 4}
    assert [end.splitlines()[0], json.loads(end.splitlines()[1].removeprefix("data: "))] == last
    assert pulls == [name]


async def test_pull_warns_of_a_licence(http: httpx.AsyncClient, pulls: list[str]) -> None:
    body = {"name": "timm/vit_tiny_patch16_224.augreg_in21k", "model": "tiny"}
    answer = await http.post("/models/pull", json=body, headers=ADMIN)
    end = json.loads(answer.text.strip().split("\n\n")[-1].splitlines()[1].removeprefix("data: "))
    assert (pulls, end["model"]) == ([body["name"]], "tiny")
    assert "'cc-by-nc-4.0' restricts" in end["warnings"][0]


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "./folder", "a/b", "hf-hub:../x", "hf-hub:a", "timm/a/b", ""])
async def test_pull_takes_no_paths(http: httpx.AsyncClient, name: str) -> None:
    answer = await http.post("/models/pull", json={"name": name}, headers=ADMIN)
    assert answer.status_code == 422


async def test_pull_of_what_nobody_publishes(http: httpx.AsyncClient) -> None:
    answer = await http.post("/models/pull", json={"name": "resnet5"}, headers=ADMIN)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "architecture_not_found")
