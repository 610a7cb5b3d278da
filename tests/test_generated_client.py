"""What openapi-python-client makes of the OpenAPI document, against `imago serve`."""

import asyncio
import io
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from support.landscapes import KINDS, landscape, png
from support.live_server import CLASSES, live_server
from support.live_server import weights as weights
from support.service_fakes import ADMIN, client_of
from test_routes_finetune import Training

README = (Path(__file__).parents[1] / "README.md").read_text()
KEY = "k" * 40
PICTURE = png(landscape("sea", 1, 64))


@pytest.fixture(scope="module")
def url(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    root = tmp_path_factory.mktemp("server")
    (root / "datasets").mkdir()
    with live_server(weights, root, "--datasets", str(root / "datasets"), env={"IMAGO_ADMIN_KEY": KEY}) as server:
        yield server.url


@pytest.fixture(scope="module")
def client(url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Made by the README's command, which fails where a route was skipped or a type was not understood."""
    words = re.findall(r"`openapi-python-client (generate [^`]*)`", README)[0].split()
    words = [word.replace("http://localhost:8000", url) for word in words]
    command = [sys.executable, "-m", "openapi_python_client", *words, "--fail-on-warning"]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}  # it calls ruff
    root = tmp_path_factory.mktemp("generated")
    made = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=120)
    assert made.returncode == 0, made.stdout + made.stderr
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(root / "imago-client"))
        with import_module("imago_client").AuthenticatedClient(base_url=url, token=KEY, timeout=60) as client:
            yield client


def call(client: Any, route: str, **given: Any) -> Any:
    """`images.predict` -> what the client makes of its answer."""
    return import_module(f"imago_client.api.{route}").sync(client=client, **given)


async def call_async(client: Any, route: str, **given: Any) -> Any:
    return await import_module(f"imago_client.api.{route}").asyncio(client=client, **given)


def model(name: str) -> Any:
    return getattr(import_module("imago_client.models"), name)


def file(data: bytes, name: str | None = None) -> Any:
    return import_module("imago_client.types").File(io.BytesIO(data), name)


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for kind in list(KINDS)[:2]:
            for number in range(6):
                archive.writestr(f"{kind}/{number}.png", png(landscape(kind, number, 64)))
    return buffer.getvalue()


def test_every_operation_is_there(client: Any, url: str) -> None:
    document = client.get_httpx_client().get("/openapi.json").json()
    for methods in document["paths"].values():
        for operation in methods.values():
            tag = re.sub(r"\W+", "_", operation["tags"][0].lower())
            assert import_module(f"imago_client.api.{tag}.{operation['operationId']}").sync_detailed


def test_predict_with_two_files(client: Any) -> None:
    body = model("PredictFilesBody")(file=[file(PICTURE, "a.png"), file(PICTURE[:300], "b.png")])
    answer = call(client, "images.predict", body=body, top_k=2)
    good, bad = answer.results
    assert (answer.model, answer.version, good.filename, bad.filename) == ("insects", 1, "a.png", "b.png")
    assert {prediction.label for prediction in good.predictions} < set(CLASSES)
    assert (len(good.predictions), bad.error.code) == (2, "invalid_image")


def test_predict_with_an_image_as_the_body(client: Any) -> None:
    answer = call(client, "images.predict", body=file(PICTURE), model=["insects"])
    assert answer.results[0].filename is None
    assert sum(prediction.probability for prediction in answer.results[0].predictions) == pytest.approx(1, abs=1e-5)


def test_models(client: Any) -> None:
    (found,) = call(client, "models.list_models").models
    assert (found.name, found.state.value, found.classes) == ("insects", "ready", CLASSES)
    (version,) = call(client, "models_admin.list_versions", name="insects").versions
    assert (version.version, version.state.value, version.created_at.year > 2000) == (1, "serving", True)


def test_a_dataset(client: Any) -> None:
    body = model("UploadDatasetFilesBody")(file=file(zipped(), "Views.zip"))
    kept = call(client, "datasets.upload_dataset", body=body)
    assert (kept.name, kept.kind.value) == ("views.zip", "zip")
    assert call(client, "datasets.list_datasets").data == [kept]


@pytest.mark.anyio
async def test_a_job(client: Any, tmp_path: Path) -> None:
    """From its dry run to its end, by the asynchronous half, with the trainer of no substance."""
    jobs = partial(call_async, client)
    async with client_of(Training(tmp_path)) as http:
        client.set_async_httpx_client(http)
        http.headers.update(ADMIN)
        asked = model("FinetuneRequest")(dataset="photos", name="pets", deploy=model("FinetuneRequestDeploy").ALWAYS)
        found = await jobs("fine_tuning.create_job", body=asked, dry_run=True)
        job = await jobs("fine_tuning.create_job", body=asked)
        while not (job := await jobs("fine_tuning.show_job", id=job.id)).terminal:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        events = (await jobs("fine_tuning.list_events", id=job.id)).data
        report = await jobs("fine_tuning.show_report", id=job.id)
    assert (found.audit["images"], found.bases, found.estimate["total"]) == (12, ["pets"], 1.0)
    assert (job.status.value, job.version, job.request["name"]) == ("succeeded", 2, "pets")
    assert (events[0].status, events[-1].status, report["schema"]) == ("queued", "succeeded", 1)


def test_a_refusal_is_read_too(client: Any) -> None:
    error = call(client, "images.predict", body=file(PICTURE), model=["wasps"]).error
    assert (error.code, bool(error.message), bool(error.request_id)) == ("model_not_found", True, True)
    asked = model("FinetuneRequest")(dataset="nowhere", name="views")
    assert call(client, "fine_tuning.create_job", body=asked).error.code == "invalid_dataset"


def test_v2_and_health(client: Any) -> None:
    assert call(client, "open_inference_protocol.v2_metadata", name="insects")["name"] == "insects"
    assert call(client, "open_inference_protocol.v2_metadata", name="wasps").error
    assert call(client, "operations.ready").status == "ready"
