"""`/finetune`: what the routes make of requests, over the real jobs with a trainer of no substance."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import httpx
import pytest
from support.service_fakes import ADMIN, Service, client_of
from test_jobs import TRAINER, deploy

from service.app import create_app
from service.jobs import Jobs
from service.routes import finetune

pytestmark = pytest.mark.anyio
PATIENCE_S = 60
BODY: dict[str, Any] = {"dataset": "photos", "name": "pets", "deploy": "always"}
NOBODY = "/finetune/ftjob-" + "0" * 32


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


class Training(Service):
    """The service, with the fake trainer."""

    def __init__(self, root: Path, **settings: Any) -> None:
        (root / "datasets" / "photos").mkdir(parents=True)
        super().__init__(root / "data", datasets=root / "datasets", weights=root / "weights", **settings)
        self.jobs = Jobs(self.settings, self.engine, self.store, TRAINER)
        self.app = create_app(
            self.settings, self.engine, self.store, self.metrics, traffic=self.traffic, jobs=self.jobs
        )


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Training]:
    with mock.patch("service.jobs.service.deploy", deploy):
        yield Training(tmp_path_factory.mktemp("service"), max_queued_jobs=2)


@pytest.fixture(scope="module")
async def http(service: Training) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(service) as client:
        client.headers.update(ADMIN)
        yield client


async def start(http: httpx.AsyncClient, do: str = "succeed", **fields: Any) -> str:
    answer = await http.post("/finetune", json=BODY | {"metadata": {"do": do}} | fields)
    assert answer.status_code == 202, answer.text
    return answer.headers["location"]


async def ended(http: httpx.AsyncClient, path: str) -> dict[str, Any]:
    async with asyncio.timeout(PATIENCE_S):
        while not (job := (await http.get(path)).json())["terminal"]:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    return dict(job)


def code_of(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


async def test_a_job_from_202_to_its_report(http: httpx.AsyncClient) -> None:
    path = await start(http)
    job = await ended(http, path)
    assert (job["object"], job["status"], job["deployment"]) == ("fine_tuning.job", "succeeded", "activated")
    assert (job["request"]["name"], job["request"]["dataset"]) == ("pets", "photos")
    assert (await http.get("/finetune")).json()["data"][0] == job
    report = await http.get(f"{path}/report")
    assert (report.json(), report.headers["content-type"]) == ({"schema": 1}, "application/json")


@pytest.mark.abuse("J16")
async def test_a_browser_gets_the_page_and_no_script_runs_in_it(http: httpx.AsyncClient) -> None:
    path = await start(http)
    await ended(http, path)
    browser = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
    pages = [await http.get(f"{path}/report", headers=browser), await http.get(f"{path}/report?format=html")]
    assert all(page.headers["content-type"].startswith("text/html") for page in pages)
    assert all("default-src 'none'" in page.headers["content-security-policy"] for page in pages)


@pytest.mark.parametrize("content", ["[]", "{}"], ids=["no object", "not said to be JSON"])
async def test_a_body_that_is_no_object_is_told_what_to_be(http: httpx.AsyncClient, content: str) -> None:
    kind = "application/json" if content == "[]" else "application/x-www-form-urlencoded"
    error = (await http.post("/finetune", content=content, headers={"Content-Type": kind})).json()["error"]
    assert error["message"] == "the body must be a JSON object, with Content-Type: application/json"


@pytest.mark.abuse("A1611")
async def test_events_by_polling(http: httpx.AsyncClient) -> None:
    path = await start(http)
    await ended(http, path)
    page = (await http.get(f"{path}/events?limit=2")).json()
    refused = await http.get(f"{path}/events?after={2**63}", headers={"Accept": "text/event-stream"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (422, "after")
    rest = (await http.get(f"{path}/events?after=2")).json()
    assert ([event["seq"] for event in page["data"]], page["has_more"]) == ([1, 2], True)
    assert (rest["data"][0]["seq"], rest["has_more"]) == (3, False)


async def test_events_as_a_stream(http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finetune, "POLL_S", 0.1)
    path = await start(http)
    answer = await http.get(f"{path}/events", headers={"Accept": "text/event-stream"})
    *told, end = [
        dict(line.split(": ", 1) for line in block.split("\n")) for block in answer.text.strip().split("\n\n")
    ]
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert [event["id"] for event in told] == [str(seq) for seq in range(1, len(told) + 1)]
    assert (json.loads(told[-1]["data"])["status"], end) == ("succeeded", {"event": "end", "data": "{}"})


async def test_a_stream_is_resumed_and_has_signs_of_life(
    http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finetune, "POLL_S", 0.05)
    monkeypatch.setattr(finetune, "QUIET_S", 0.0)
    path = await start(http, "wait")
    headers = {"Accept": "text/event-stream", "Last-Event-ID": "2"}
    stream = asyncio.create_task(http.get(f"{path}/events", headers=headers))
    await asyncio.sleep(1.0)
    await http.post(f"{path}/cancel")
    text = (await stream).text
    assert "id: 3\n" in text
    assert "id: 2\n" not in text
    assert ": ping\n" in text


async def test_a_stream_ends_when_the_server_leaves(http: httpx.AsyncClient, service: Training) -> None:
    path = await start(http, "wait", name="leaving")
    stream = finetune.stream(service.jobs, service.engine, path.rpartition("/")[2], 0)
    assert b'"queued"' in await anext(stream)
    service.engine.draining = True
    rest = [block async for block in stream]
    service.engine.draining = False
    assert b"event: end\ndata: {}\n\n" not in rest
    await http.post(f"{path}/cancel")


@pytest.mark.parametrize(
    ("fields", "status", "code", "param"),
    [
        pytest.param({"epochs": 3}, 422, "unknown_field", "epochs", id="unknown field"),
        pytest.param({"hyperparameters": {"rl": 1}}, 422, "unknown_field", "hyperparameters.rl", id="unknown within"),
        pytest.param({"name": "../x"}, 422, "validation_error", "name", id="name"),
        pytest.param({"mode": "scratch"}, 422, "validation_error", None, id="contradiction"),
        pytest.param({"dataset": "../data"}, 422, "invalid_dataset", None, id="dataset"),
        pytest.param({"dataset": "none"}, 422, "invalid_dataset", None, id="no dataset"),
        pytest.param({"dataset": 5}, 422, "validation_error", "dataset", id="a number"),
    ],
)
async def test_what_cannot_be_asked_for(
    http: httpx.AsyncClient, fields: dict[str, Any], status: int, code: str, param: str | None
) -> None:
    answer = await http.post("/finetune", json=BODY | fields)
    assert (answer.status_code, answer.json()["error"]["code"], answer.json()["error"]["param"]) == (
        status,
        code,
        param,
    )


@pytest.mark.abuse("J2")
@pytest.mark.parametrize("path", ["/finetune", "/finetune?dry_run=true"])
async def test_a_dataset_that_is_not_allowed_looks_like_one_that_is_not_there(
    http: httpx.AsyncClient, path: str
) -> None:
    answers = [await http.post(path, json=BODY | {"dataset": dataset}) for dataset in ("none", "/etc/passwd")]
    bodies = [answer.json()["error"] | {"request_id": ""} for answer in answers]
    assert bodies[0] == bodies[1]


@pytest.mark.abuse("J5")
async def test_an_idempotency_key(http: httpx.AsyncClient) -> None:
    headers = {"Idempotency-Key": "one"}
    first, again = [await http.post("/finetune", json=BODY, headers=headers) for _ in range(2)]
    assert (first.json()["id"], again.status_code) == (again.json()["id"], 202)
    assert [answer.headers.get("idempotency-replayed") for answer in (first, again)] == [None, "true"]
    other = await http.post("/finetune", json=BODY | {"name": "other"}, headers=headers)
    assert code_of(other) == (409, "idempotency_mismatch")
    await ended(http, first.headers["location"])


@pytest.mark.abuse("J5")
@pytest.mark.parametrize("key", [pytest.param(b"x" * 256, id="long"), pytest.param(b"\xc3\xbc", id="not ASCII")])
async def test_a_key_that_is_none(http: httpx.AsyncClient, key: bytes) -> None:
    answer = await http.post("/finetune", json=BODY, headers={b"Idempotency-Key": key})
    assert code_of(answer) == (422, "validation_error")


async def test_a_dry_run(http: httpx.AsyncClient) -> None:
    answer = await http.post("/finetune?dry_run=true", json=BODY)
    assert (answer.status_code, answer.json()["audit"]) == (200, {"images": 12})


@pytest.mark.abuse("J6")
async def test_stop_cancel_and_delete_at_the_wrong_time(http: httpx.AsyncClient) -> None:
    running = await start(http, "wait", name="first")
    queued = await start(http, name="second")
    assert code_of(await http.post(f"{queued}/stop")) == (409, "job_not_started")
    assert code_of(await http.delete(queued)) == (409, "job_active")
    assert code_of(await http.get(f"{queued}/report")) == (404, "report_not_found")
    assert (await http.post(f"{queued}/cancel")).json()["status"] == "cancelled"
    assert (await http.delete(queued)).status_code == 204
    assert code_of(await http.get(queued)) == (404, "job_not_found")
    assert code_of(await http.post("/finetune", json=BODY | {"name": "first"})) == (409, "name_conflict")
    await http.post(f"{running}/cancel")
    await ended(http, running)
    assert (await http.post(f"{running}/cancel")).json()["status"] == "cancelled"
    assert code_of(await http.post(f"{running}/stop")) == (409, "job_finished")


async def test_no_more_than_so_many_wait(http: httpx.AsyncClient) -> None:
    paths = [await start(http, "wait", name=f"many-{number}") for number in range(2)]
    refused = await http.post("/finetune", json=BODY | {"name": "many-2"})
    if refused.status_code == 202:  # the first had begun already
        paths.append(refused.headers["location"])
        refused = await http.post("/finetune", json=BODY | {"name": "many-3"})
    assert code_of(refused) == (429, "queue_full")
    assert int(refused.headers["retry-after"]) > 0
    for path in paths:
        await http.post(f"{path}/cancel")
        await ended(http, path)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        pytest.param("GET", NOBODY, id="show"),
        pytest.param("GET", NOBODY + "/events", id="events"),
        pytest.param("GET", NOBODY + "/report", id="report"),
        pytest.param("POST", NOBODY + "/cancel", id="cancel"),
        pytest.param("POST", NOBODY + "/stop", id="stop"),
        pytest.param("DELETE", NOBODY, id="delete"),
        pytest.param("GET", "/finetune/%2e%2e%2fjobs.sqlite", id="a path"),
        pytest.param("GET", "/finetune/FTJOB-1", id="no id"),
    ],
)
async def test_a_job_that_is_not_there(http: httpx.AsyncClient, method: str, path: str) -> None:
    status, code = code_of(await http.request(method, path))
    assert (status, code.removeprefix("job_")) == (404, "not_found")


async def test_a_page_after_nobody(http: httpx.AsyncClient) -> None:
    assert code_of(await http.get("/finetune?after=nobody")) == (400, "bad_request")


async def test_the_schema_builds_a_form(http: httpx.AsyncClient) -> None:
    schema = (await http.get("/finetune/schema")).json()
    assert schema["required"] == ["dataset", "name"]
    assert {"hyperparameters", "folds", "selection_epochs"} <= schema["properties"].keys()
    assert [base["name"] for base in schema["bases"]] == [f"efficientnet_lite{n}" for n in (2, 1, 0)]


async def test_folds_are_checked_before_a_job_is_made(http: httpx.AsyncClient) -> None:
    answer = await http.post("/finetune", json={**BODY, "folds": 3})
    assert code_of(answer) == (422, "validation_error")
    assert "mode scratch and several bases" in answer.json()["error"]["message"]
    chosen = {"mode": "scratch", "base": ["lenet5", "nin"], "folds": 3}
    made = await http.post("/finetune", json={**BODY, **chosen})
    assert made.status_code == 202
    assert {key: made.json()["request"][key] for key in chosen} == chosen


async def test_without_the_admin_key(http: httpx.AsyncClient) -> None:
    answer = await http.post("/finetune", json=BODY, headers={"Authorization": "Bearer wrong"})
    assert code_of(answer) == (401, "unauthorized")


@pytest.mark.abuse("J13")
async def test_predict_goes_on_without_a_database(tmp_path: Path) -> None:
    (tmp_path / "data" / "jobs.sqlite").mkdir(parents=True)
    async with client_of(Training(tmp_path)) as http:
        refused = await http.get("/finetune", headers=ADMIN)
        predicted = await http.post("/predict", content=b"good image")
    assert code_of(refused) == (503, "trainer_unavailable")
    assert "unable to open database file" in refused.json()["error"]["message"]
    assert (predicted.status_code, int(refused.headers["retry-after"])) == (200, 10)


async def test_a_member_given_twice_is_400(tmp_path: Path) -> None:
    async with client_of(Training(tmp_path)) as http:
        content = json.dumps(BODY)[:-1] + ', "name": "other"}'
        answer = await http.post("/finetune", content=content, headers={**ADMIN, "Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "name")
